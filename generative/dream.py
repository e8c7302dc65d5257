"""A simulator wears an environment's face, so that whatever plays worlds plays dreams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from envs.api import Spec, Step, UserError, check_actions, first_step
from generative.api import Clip, Simulator

ENDS_BELOW = 0.5


class Starts(Protocol):
    """Where dreams begin: `agents.trajectories.Trajectories`."""

    def contexts(self, n: int, length: int, opening: bool = False, generator: torch.Generator | None = None) -> tuple[Clip, Tensor]:
        """A Clip of n rows of `length` pictures, and how many of them are known, int64 (n); with `opening`, where an episode opens: 1."""


class DreamEnv:
    """A VectorEnv of N dreams that begin together in the midst of what was played, and end together `horizon` steps later.

    A dream is cut at the horizon, like an episode at a time limit; it ends before where the simulator expects a discount below 0.5.
    A lane whose dream ended goes on, until the horizon, from where a true episode opened: nothing but an opening follows an end. Rewards
    and discounts are those that the simulator expects.

    A lane begins without an agent's memory of what was seen before. `context` and `known` show it: who wants an agent to begin with that
    memory walks it over the context first (`agents.dreamer.wake`).

    Which starts are drawn follows from the seed of `reset`; a simulator that draws does so from torch's default generator.

    Args:
        simulator: any. Dreams lie where its pictures lie.
        starts: what was played.
        spec: of the world that is dreamt of.
        num_envs: N.
        horizon: steps of a dream at most.
        context: pictures of `context`; the simulator is shown the last of them, as many as it looks at.
        device: of the pictures that are shown to the simulator.
    """

    context: Clip
    """Of the dreams that began together last: pictures uint8 (N, context, C, H, W), the last one what is acted on first."""
    known: Tensor
    """int64 (N): how many of these pictures were seen since the episode opened. The others repeat the first one."""

    def __init__(
        self, simulator: Simulator, starts: Starts, spec: Spec, num_envs: int, horizon: int, context: int, device: torch.device | str
    ) -> None:
        for name, count, least in (("num_envs", num_envs, 1), ("horizon", horizon, 1), ("context", context, simulator.context_frames)):
            if count < least:
                raise UserError(f"{name} of dreams must be at least {least}, got {count}")
        self.spec = Spec(f"dream of {spec.name}", spec.num_actions, spec.action_names, spec.obs_shape, spec.frames_per_step)
        self.num_envs, self.horizon = num_envs, horizon
        self._simulator, self._starts, self._length, self._device = simulator, starts, context, torch.device(device)
        self._generator = torch.Generator()
        self._state: tuple[Tensor, ...] | Callable[[], tuple[Tensor, ...]] | None = None
        self._action: Tensor | None = None
        self._steps = 0

    def reset(self, seed: int) -> Step:
        """Begins N dreams. Drains a pending send."""
        self._generator.manual_seed(seed)
        self._action = None
        return first_step(self._begin())

    def send(self, action: Tensor) -> None:
        """Takes int64 (N) actions on any device. ValueError where one is out of range."""
        if self._state is None or self._action is not None:
            raise RuntimeError("send comes after reset or recv")
        check_actions(action, self.num_envs, self.spec.num_actions)
        self._action = action

    @torch.no_grad()
    def recv(self) -> Step:
        """Dreams the step that `send` began."""
        if self._state is None or self._action is None:
            raise RuntimeError("recv comes after send")
        state = self._state() if callable(self._state) else self._state
        state, frames, reward, discount = self._simulator.step(state, self._action)
        self._state, self._action, self._steps = state, None, self._steps + 1
        if self._steps == self.horizon:
            return Step(self._begin(), reward, discount, torch.ones_like(discount, dtype=torch.bool), frames)
        last = discount < ENDS_BELOW
        ended = last.nonzero().flatten()
        if not len(ended):
            return Step(frames, reward, discount, last, frames)
        clip, _ = self._draw(len(ended), opening=True)
        self._state = tuple(part.index_copy(0, ended, new) for part, new in zip(state, self._simulator.start(clip)))
        return Step(frames.index_copy(0, ended, clip.frames[:, -1]), reward, discount, last, frames)

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Forgets the dreams. Twice is harmless."""
        self._state = self._action = None

    def _begin(self) -> Tensor:
        """Draws where all lanes begin, and returns the pictures to act on, uint8 (N, C, H, W)."""
        self._steps = 0
        clip, self.known = self._draw(self.num_envs)
        self.context = clip
        self._state = lambda: self._simulator.start(clip)  # whoever stops at the horizon never asks for it
        return clip.frames[:, -1]

    def _draw(self, count: int, opening: bool = False) -> tuple[Clip, Tensor]:
        clip, known = self._starts.contexts(count, self._length, opening, self._generator)
        return Clip(*(part.to(self._device) for part in clip)), known.to(self._device)
