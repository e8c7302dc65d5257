"""Worlds of one lane, as job=play steps them: an episode waits at its end, and Atari shows its whole screen too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from envs.api import Spec, UserError, VectorEnv
from envs.seeds import lane_seed
from lab.film import OTHER_FPS
from lab.run import BACKENDS, derive_seed, make_env, make_protocol

CPU = torch.device("cpu")
ATARI_FRAMES_PER_SECOND = 60


class Seen(NamedTuple):
    """What a world shows after a step, or where an episode opens.

    Attributes:
        obs: uint8 (1, C, H, W), one a view; at an episode's end its last picture.
        reward: raw.
        discount: 0 where nothing may be expected any more.
        last: the episode is over.
        beside: uint8 (H, W, 3), Atari's screen or a maze's map; None for worlds that have neither.
    """

    obs: tuple[Tensor, ...]
    reward: float
    discount: float
    last: bool
    beside: np.ndarray | None


class World(Protocol):
    """One lane."""

    def open(self) -> Seen:
        """Opens the next episode. All that is random follows from the seed that the world was made with."""

    def step(self, action: int) -> Seen:
        """One step of the episode that is open. It does not begin anew by itself."""

    def close(self) -> None:
        """Twice is harmless."""


class WorldKind(NamedTuple):
    """A world that any number of `World`s can be made of.

    Attributes:
        name: as typed after `env=`.
        specs: of each view.
        views: the configurations that show them, equal but for the picture.
        protocol: of Atari.
        beside: what `Seen.beside` shows: "screen", "map" or nothing.
        steps_per_second: the world's own pace.
    """

    name: str
    specs: tuple[Spec, ...]
    views: tuple[dict[str, Any], ...]
    protocol: Any
    beside: str
    steps_per_second: int

    def make(self, seed: int) -> World:
        return Game(self, seed) if self.protocol else Lane(self, seed)


def kind_of(views: Sequence[Mapping[str, Any]], for_evaluation: bool = False) -> WorldKind:
    """The world that configurations with `env` and `protocol` name, which show one game in one or several ways.

    UserError where a knob is wrong, or two of them are different worlds.
    """
    whole = tuple({**view, "env": _bare(view)} for view in views)
    for other in whole[1:]:
        differing = _difference(whole[0], other)
        if differing:
            names = " and ".join(str(view["choices"]["env"]) for view in (whole[0], other))
            raise UserError(f"{names} are different worlds, {differing}; play them one after the other")
    specs, beside, pace = [], "", OTHER_FPS
    for view in whole:
        env = make_env(view, 1, CPU)
        specs.append(env.spec)
        pace = getattr(env, "steps_per_second", OTHER_FPS)
        beside = "map" if hasattr(env, "overview") else ""
        env.close()
    protocol = make_protocol(whole[0], for_evaluation)
    if protocol:
        beside, pace = "screen", max(1, ATARI_FRAMES_PER_SECOND // protocol.frame_skip)
    return WorldKind(str(whole[0]["choices"]["env"]), tuple(specs), whole, protocol, beside, pace)


class Game:
    """Atari: an emulator a view, which play the same game; what lane 0 of the vector environment plays from the same seed, but for the
    picture after an episode's end, which the latter has lost."""

    def __init__(self, kind: WorldKind, seed: int) -> None:
        from envs.atari import Emulator

        nodes = [view["env"] for view in kind.views]
        self._emulators = [Emulator(node["game"], kind.protocol, node.get("obs", "grey84")) for node in nodes]
        self._seed: int | None = lane_seed(seed, 0)

    def open(self) -> Seen:
        seed, self._seed = self._seed, None
        return self._seen([emulator.reset(seed) for emulator in self._emulators])._replace(last=False)

    def step(self, action: int) -> Seen:
        return self._seen([emulator.step(action) for emulator in self._emulators])

    def close(self) -> None:
        self._emulators = []

    def _seen(self, moments: list[Any]) -> Seen:
        first = moments[0]
        pictures = tuple(torch.from_numpy(moment.obs)[None] for moment in moments)
        return Seen(pictures, first.reward, first.discount, first.last, first.rgb)


class Lane:
    """Any other world: its vector environment with one lane. All views are one."""

    def __init__(self, kind: WorldKind, seed: int) -> None:
        self._env: VectorEnv = make_env(kind.views[0], 1, CPU)
        self._views, self._seed, self._episode = len(kind.views), seed, 0
        self._beside: np.ndarray | None = None

    def open(self) -> Seen:
        self._episode += 1
        step = self._env.reset(derive_seed(self._seed, self._episode, "play"))
        self._look()
        return Seen((step.obs,) * self._views, 0.0, 1.0, False, self._beside)

    def step(self, action: int) -> Seen:
        step = self._env.step(torch.tensor([action]))
        last = bool(step.last)
        if not last:  # the map of an episode's end is gone
            self._look()
        return Seen((step.next_obs,) * self._views, float(step.reward), float(step.discount), last, self._beside)

    def close(self) -> None:
        self._env.close()

    def _look(self) -> None:
        if hasattr(self._env, "overview"):
            self._beside = self._env.overview(0)


def same_view(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations show the same pictures of one world."""
    return _bare(one) == _bare(other) and _difference(one, other) == ""


def _bare(view: Mapping[str, Any]) -> dict[str, Any]:
    """The node of the world without what has no say in a lane of it: threads, and the emulator, as ale-py alone can be looked into."""
    known = view["env"].get("backend") in (None, *BACKENDS)
    return {key: value for key, value in view["env"].items() if key != "num_threads" and not (key == "backend" and known)}


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What makes two configurations different worlds; nothing where they are the same but for the picture."""
    first_node, second_node = _bare(one), _bare(other)
    atari = "game" in first_node and "game" in second_node
    for key in sorted(({*first_node} | {*second_node}) - ({"obs"} if atari else set())):
        if first_node.get(key) != second_node.get(key):
            return f"env.{key.strip('_')} is {first_node.get(key)} in one, {second_node.get(key)} in another"
    first, second = make_protocol(one), make_protocol(other)
    for name in ("sticky", "full_action_set", "frame_skip", "life_loss"):
        if atari and getattr(first, name) != getattr(second, name):
            return f"protocol={first.name} and protocol={second.name} differ in {name}"
    return ""
