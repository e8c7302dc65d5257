"""Informed exploration (Oh et al. 2015, arXiv 1507.08750, section 4.2): the action whose foretold picture was seen least of late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from agents.bonus import shrink_frames
from agents.stack import empty_stack
from envs.api import Spec, Step, UserError
from generative.api import Clip, Simulator

SIDE = 84  # pictures are compared at most so large
MOST_DELTA = 255**2 - 1  # beyond it no pixel differs from any other
PICTURES_AT_ONCE = 128  # that are foretold: what their activations take is bounded
TIE = 1e-9  # relative: sums of equal terms in another order


class Carry(NamedTuple):
    """What an agent that explores so remembers of N lanes.

    Attributes:
        stack: uint8 (N, K - 1, C, H, W), of its network.
        past: the last `context_frames` frames that were acted on, and the transitions between them.
        action: int64 (N), taken after the last of them.
    """

    stack: Tensor
    past: Clip
    action: Tensor


def follow(past: Clip, action: Tensor, step: Step) -> Clip:
    """`past` with one more transition, by `action` int64 (N) to `step`, and without its oldest.

    Where `step` opens an episode, its picture stands still instead, the actions are -1, rewards 0 and discounts 1: as `ClipData.clips`
    shows a simulator what it learns from.
    """
    opens, obs = step.last, step.obs.unsqueeze(1)
    before = past.frames[:, 1:] * ~opens.view(-1, 1, 1, 1, 1)  # on the CPU several times faster than where
    before += obs * opens.view(-1, 1, 1, 1, 1)

    def column(before: Tensor, new: Tensor, still: float) -> Tensor:
        return torch.cat((before, new.unsqueeze(1)), 1)[:, 1:].masked_fill(opens.unsqueeze(1), still)

    actions, rewards = column(past.actions, action, -1), column(past.rewards, step.reward, 0)
    return Clip(torch.cat((before, obs), 1), actions, rewards, column(past.discounts, step.discount, 1), past.last)


def visit_counts(foretold: Tensor, seen: Tensor, known: Tensor, delta: int, sigma: float) -> Tensor:
    """n_D of each picture: its likeness to each of those seen, added up (Oh et al. 2015, section 4.2). float64 (B, A).

    k(x, y) = exp(-sum over pixels of min(max((x - y)^2 - delta, 0), 1) / sigma), on levels of 0 to 255. These are whole numbers and so is
    delta: a pixel differs or it does not, and the sum counts those that do.

    Args:
        foretold: uint8 (B, A, P).
        seen: uint8 (B, D, P).
        known: bool (B, D), which of those count.
        delta: squared differences up to it are none.
        sigma: of so many pixels that differ, the likeness is 1 / e.
    """
    differ = _differences_on_host if foretold.device.type == "cpu" else _differences
    return (torch.exp(differ(foretold, seen, math.isqrt(delta)) / -sigma) * known.unsqueeze(1)).sum(2)


def _differences(foretold: Tensor, seen: Tensor, reach: int) -> Tensor:
    """How many pixels of two pictures, of uint8 (B, A, P) and of uint8 (B, D, P), lie more than `reach` apart. float64 (B, A, D)."""
    wide = foretold.unsqueeze(2).to(torch.int16)
    return torch.stack([(pictures - others).abs_().gt_(reach).sum(2) for pictures, others in zip(wide, seen)]).double()


def _differences_on_host(foretold: Tensor, seen: Tensor, reach: int) -> Tensor:
    """The same on the processor: 16 lanes, 6 actions and 20 pictures of 84x84 in 0.7 ms on one core, where tensors took 31."""
    counts = torch.empty(*foretold.shape[:2], seen.shape[1], dtype=torch.float64)
    _count(foretold.contiguous().numpy(), seen.contiguous().numpy(), np.uint8(reach), counts.numpy())
    return counts


@njit(cache=True, nogil=True)
def _count(foretold, seen, reach, counts):
    for n in range(foretold.shape[0]):
        for a in range(foretold.shape[1]):
            for d in range(seen.shape[1]):
                differ = 0
                for p in range(foretold.shape[2]):
                    one, other = foretold[n, a, p], seen[n, d, p]
                    differ += np.uint8(max(one, other) - min(one, other)) > reach
                counts[n, a, d] = differ


class InformedExploration:
    """Chooses actions that lead to what was seen seldom, by a simulator that foretells one step of each.

    Each lane has a memory of the last d pictures that it has seen, those that end episodes and those that open them among them, over the
    ends of episodes; the present one is the newest. Of actions that are equally good one is drawn, so a simulator that does not see the
    action chooses as chance does. The paper has one lane; and that its memory outlasts episodes is ours.

    Args:
        simulator: of the agent's own pictures and actions. It is asked for lanes that explore, and learns nothing.
        spec: of the environment.
        device: of the memory, and of what is chosen.
        visit_frames: d.
        visit_delta: of the kernel, see `visit_counts`; squared grey levels.
        visit_sigma: of the kernel; pixels.
    """

    def __init__(
        self, simulator: Simulator, spec: Spec, device: torch.device, visit_frames: int, visit_delta: int, visit_sigma: float
    ) -> None:
        if visit_frames < 1:
            raise UserError(f"agent.visit_frames must be at least 1, got {visit_frames}")
        if not 0 <= visit_delta <= MOST_DELTA:
            raise UserError(f"agent.visit_delta must lie in 0..{MOST_DELTA}, got {visit_delta}")
        if not 0 < visit_sigma < math.inf:
            raise UserError(f"agent.visit_sigma must be above 0, got {visit_sigma}")
        theirs = tuple(simulator.obs_shape), getattr(simulator, "num_actions", spec.num_actions)
        if theirs != (spec.obs_shape, spec.num_actions):
            ours = f"{spec.name} has pictures of {spec.obs_shape} and {spec.num_actions} actions"
            raise UserError(f"the simulator is of pictures of {theirs[0]} and {theirs[1]} actions, and {ours}")
        self.simulator = simulator
        self._spec, self._device = spec, device
        self._length, self._delta, self._sigma = visit_frames, visit_delta, visit_sigma
        self._shape = 1, min(spec.obs_shape[1], SIDE), min(spec.obs_shape[2], SIDE)
        self._seen, self._written = self._memory(0)
        self._least, self._spread, self._choices = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        self._asked = False

    def initial(self, num_envs: int, stack_frames: int) -> Carry:
        """The carry before an episode's first frame."""
        known = self.simulator.context_frames
        blank = torch.zeros(num_envs, known - 1, device=self._device)
        frames = torch.zeros(num_envs, known, *self._spec.obs_shape, dtype=torch.uint8, device=self._device)
        stack = empty_stack(num_envs, stack_frames, self._spec.obs_shape, self._device)
        nothing = torch.zeros(num_envs, dtype=torch.int64, device=self._device)
        return Carry(stack, Clip(frames, blank.long(), blank, blank + 1, blank.bool()), nothing)

    @torch.no_grad()
    def choose(self, past: Clip, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Actions int64 (M) for the lanes `rows` int64 (M), and n_D of every action's picture, float64 (M, A).

        Args:
            past: of all lanes, its last frames those of `step`.
            step: what is acted on.
        """
        seen, known = self._trajectories(step, rows)
        visits = visit_counts(self._foretell(Clip(*(part[rows] for part in past))), seen, known, self._delta, self._sigma)
        tied = visits <= visits.amin(1, keepdim=True) * (1 + TIE)
        draws = torch.rand(visits.shape, device=self._device)
        return torch.where(tied, draws, -1.0).argmax(1), visits

    def observe(self, step: Step, visits: Tensor | None, after: Step) -> None:
        """Remembers what one step of every lane has shown.

        Args:
            visits: float64 (N, A), what `choose` counted, nan where a lane did not explore; None where none did.
        """
        if not len(self._written):
            self._seen, self._written = self._memory(len(step.last))
        self._write(step.obs, step.last)
        self._write(after.next_obs, torch.ones_like(step.last))
        if visits is not None:
            least, most = visits.amin(1), visits.amax(1)
            self._least, self._spread = self._least + least.nansum(), self._spread + (most - least).nansum()
            self._choices, self._asked = self._choices + least.isfinite().sum(), True

    def metrics(self) -> dict[str, Tensor | float]:
        """Since the last call: means of n_D of the pictures that were chosen, and of how much more the most visited ones had."""
        if not self._asked:
            return {}
        shown: dict[str, Tensor | float] = {"visits/least": self._least / self._choices, "visits/spread": self._spread / self._choices}
        self._least, self._spread, self._choices = (torch.zeros_like(self._choices) for _ in range(3))
        self._asked = False
        return shown

    def required_bytes(self) -> int:
        """Of the simulator, as it is saved."""
        return sum(part.numel() * part.element_size() for part in self.simulator.state_dict().values() if isinstance(part, Tensor))

    def lane_bytes(self, num_envs: int) -> int:
        """Of the memory of so many lanes."""
        return num_envs * (self._length * math.prod(self._shape) + 8)

    def state_dict(self) -> dict[str, Any]:
        return {"simulator": dict(self.simulator.state_dict()), "seen": self._seen, "written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. UserError where it was saved with another visit_frames."""
        if state["seen"].shape[1:] != self._seen.shape[1:]:
            raise UserError(f"the saved memory of visits is {tuple(state['seen'].shape[1:])}, this one {tuple(self._seen.shape[1:])}")
        self.simulator.load_state_dict(state["simulator"])
        self._seen, self._written = (state[name].to(self._device, copy=True) for name in ("seen", "written"))

    def _memory(self, lanes: int) -> tuple[Tensor, Tensor]:
        """Rings of d pictures uint8 (N, D, P), and how many were ever written into each, int64 (N)."""
        seen = torch.zeros(lanes, self._length, math.prod(self._shape), dtype=torch.uint8, device=self._device)
        return seen, torch.zeros(lanes, dtype=torch.int64, device=self._device)

    def _flat(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> uint8 (B, P): grey, and at most SIDE x SIDE."""
        return shrink_frames(frames, self._shape).flatten(1)

    def _write(self, frames: Tensor, which: Tensor) -> None:
        """Takes in a picture of each of the lanes where `which` bool (N)."""
        lanes, places = torch.arange(len(which), device=self._device), self._written % self._length
        self._seen[lanes, places] = torch.where(which.unsqueeze(1), self._flat(frames), self._seen[lanes, places])
        self._written = self._written + which

    def _trajectories(self, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the rings of `rows`, uint8 (M, D, P), with what opens an episode right now; and which places count, bool (M, D)."""
        seen, written = (self._seen, self._written) if len(self._written) else self._memory(len(step.last))
        assert len(written) == len(step.last), f"pictures of {len(written)} lanes are remembered, {len(step.last)} came"
        seen, written, opens = seen[rows], written[rows], step.last[rows]
        lanes, places = torch.arange(len(rows), device=self._device), written % self._length
        seen[lanes, places] = torch.where(opens.unsqueeze(1), self._flat(step.obs[rows]), seen[lanes, places])
        return seen, torch.arange(self._length, device=self._device) < (written + opens).unsqueeze(1)

    def _foretell(self, past: Clip) -> Tensor:
        """What each action shows next, uint8 (M, A, P)."""
        actions, parts = torch.arange(self._spec.num_actions, device=self._device), []
        for lanes in torch.arange(len(past.frames), device=self._device).split(max(1, PICTURES_AT_ONCE // len(actions))):
            state = self.simulator.start(Clip(*(part[lanes] for part in past)))
            branches = tuple(part.repeat_interleave(len(actions), 0) for part in state)
            _, frames, _, _ = self.simulator.step(branches, actions.repeat(len(lanes)))
            parts.append(self._flat(frames).view(len(lanes), len(actions), -1))
        return torch.cat(parts)
