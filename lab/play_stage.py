"""What all tabs of job=play share: the kind of world, the fitted simulators, and the trained agent."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from agents.api import Agent
from envs.api import UserError
from generative.api import Simulator
from generative.clips import read_manifest
from lab.evaluate import load_trained
from lab.folder import find_folder, read_config
from lab.play_worlds import WorldKind, kind_of, same_view
from lab.run import forked_seed, make_agent, make_protocol, pick_device
from lab.simulators import Fitted, load_fitted, recorded_world


class Offer(NamedTuple):
    """A simulator that can be played.

    Attributes:
        label: its name, with the run's where two have the same, and a word where it is an agent's own.
        simulator: shared by all tabs.
        view: which of the world's views it foretells.
        lives_end: a discount of 0 may mean a lost life as well as the end.
    """

    label: str
    simulator: Simulator
    view: int
    lives_end: bool


class Player(NamedTuple):
    """A trained agent.

    Attributes:
        label: the agent's name.
        agent: shared by all tabs; `act` changes nothing in it.
        view: which of the world's views it sees.
        device: where it sees it.
        epsilon: share of random actions, as it was evaluated.
    """

    label: str
    agent: Agent
    view: int
    device: torch.device
    epsilon: float


class Stage(NamedTuple):
    """What all tabs share.

    Attributes:
        kind: the world.
        offers: simulators, none where the world is played alone.
        player: an agent, or None.
        turn: whoever calls a model holds it: models take turns, and so do the default random generators.
    """

    kind: WorldKind
    offers: tuple[Offer, ...]
    player: Player | None
    turn: Lock


class Dice:
    """The state of every default random generator, kept for one tab, so that tabs do not disturb one another."""

    def __init__(self, seed: int, turn: Lock) -> None:
        self._turn = turn
        with turn, forked_seed(seed):
            self._states = _random_states()

    @contextmanager
    def rolled(self) -> Iterator[None]:
        """Takes a turn with this tab's own randomness."""
        with self._turn:
            before = _random_states()
            _restore(self._states)
            try:
                yield
            finally:
                self._states = _random_states()
                _restore(before)


def make_stage(settings: Mapping[str, Any]) -> Stage:
    """Loads what `run`, `against` and `data` name, or takes the world of `env`. UserError, in one line, where they do not fit together."""
    device = pick_device(settings["device"])
    run, against = settings["run"], settings["against"]
    if not isinstance(against, list) or not all(isinstance(one, str) for one in against):
        raise UserError(f"against is a list of run folders, such as against=[runs/B,runs/C], got {against}")
    if run is None:
        for key in ("against", "data"):
            if settings[key]:
                raise UserError(f"{key}= goes with run=, a fitted simulator or a trained agent; env= alone plays the world itself")
        return Stage(kind_of([settings]), (), None, Lock())
    trained: dict[str, Any] | None = None
    if read_config(find_folder(run, "run"))["job"] == "train":
        _, trained, loaded = load_trained(run)
    names = against if trained else [run, *against]
    fits = [_load_fit(name, settings["data"], device) for name in names]
    views: list[dict[str, Any]] = []
    for world in ([trained] if trained else []) + [world for _, world in fits]:
        if not any(same_view(world, view) for view in views):
            views.append(world)
    kind = kind_of(views, for_evaluation=trained is not None)
    labels = [fitted.label for fitted, _ in fits]
    offers = []
    for name, (fitted, world) in zip(names, fits):
        view = next(index for index, known in enumerate(views) if same_view(world, known))
        spec, shape = kind.specs[view], tuple(fitted.simulator.obs_shape)
        if (shape, fitted.num_actions) != (spec.obs_shape, spec.num_actions):
            theirs = f"pictures of {spec.obs_shape} and {spec.num_actions} actions"
            raise UserError(f"run={name} simulates pictures of {shape} under {fitted.num_actions} actions, and its world has {theirs}")
        label = fitted.label if labels.count(fitted.label) == 1 else f"{fitted.label} ({Path(name).resolve().name})"
        offers.append(_offer(label, fitted.simulator, view, world))
    if trained is None:
        return Stage(kind, tuple(offers), None, Lock())
    agent, jobs = make_agent(trained, kind.specs[0], device)
    agent.load_state_dict(loaded.state["agent"])
    if "simulator" in jobs:
        offers.insert(0, _offer(f"{trained['choices']['simulator']} (its own)", jobs["simulator"], 0, trained))
    player = Player(trained["choices"]["agent"], agent, 0, device, _epsilon(trained))
    return Stage(kind, tuple(offers), player, Lock())


def _load_fit(name: str, data: str | None, device: torch.device) -> tuple[Fitted, dict[str, Any]]:
    """A fitted simulator, and the world that its clips, in `data` or where they were, say they were recorded in."""
    fitted = load_fitted(name, device)
    folder = Path(data or str(fitted.settings["data"]))
    if data is None and not folder.is_dir():
        raise UserError(f"run={name} was fitted to {folder}, which is not there; data=FOLDER tells where its clips are now")
    return fitted, recorded_world(read_manifest(folder)["source"], folder, "collect clips anew, by job=collect")


def _offer(label: str, simulator: Any, view: int, world: Mapping[str, Any]) -> Offer:
    """A simulator of a world, in the state that it is used in, not the one that it is fitted in."""
    if hasattr(simulator, "eval"):
        simulator.eval()
    protocol = make_protocol(world)
    return Offer(label, simulator, view, protocol is not None and protocol.life_loss)


def _epsilon(trained: Mapping[str, Any]) -> float:
    epsilon = trained["evaluation"].get("epsilon")
    if epsilon is None:
        protocol = make_protocol(trained, for_evaluation=True)
        epsilon = protocol.evaluation_epsilon if protocol else 0.0
    return float(epsilon)


def _random_states() -> tuple[Any, ...]:
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cards


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])
