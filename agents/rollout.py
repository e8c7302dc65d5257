"""A rollout: the last few steps of N lanes, and what the agent saw on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.api import Decision
from agents.stack import push_frame
from envs.api import Step


class Carry(NamedTuple):
    """What lanes remember: the frames before, uint8 (N, K - 1, C, H, W), and a state, float32 (N, ...).

    The state is a recurrent core's (N, S, D), with S = 0 for none, or a planner's plan.
    """

    stack: Tensor
    state: Tensor


class Successor(NamedTuple):
    """Where the trace of some lane was cut after step `t`, or goes on beyond the rollout: what came then, of all N lanes.

    Attributes:
        t: the step.
        obs: uint8 (N, C, H, W), its `next_obs`.
        carry: the lanes' memory after the step.
        shown: whether `obs` is what the agent acts on next, no lane having ended.
        value: float32 (N), where the agent knows already what it takes the state to be worth.
    """

    t: int
    obs: Tensor
    carry: Carry
    shown: bool
    value: Tensor | None = None


class Batch(NamedTuple):
    """T steps of N lanes, oldest first.

    Attributes:
        frames: uint8 (N, K, C, H, W), the stacks that the first step was decided on, rebuilt from single frames.
        notes: of the decisions of the steps after the first, T - 1 of them.
        opens: bool (T, N), where a step opened an episode.
        state: float32 (N, ...), before the first step; rows of lanes that open there are to be reset.
        plan_noise: float32 (T, N, ...), a planner's draws, or None.
        action: int64 (T, N).
        reward: float32 (T, N), raw.
        bonus: float32 (T, N), intrinsic, zeros where there is none.
        discount: float32 (T, N).
        last: bool (T, N).
        successors: of those steps after which V(next_obs) is asked for.
    """

    frames: Tensor
    notes: list[dict[str, Tensor]]
    opens: Tensor
    state: Tensor
    plan_noise: Tensor | None
    action: Tensor
    reward: Tensor
    bonus: Tensor
    discount: Tensor
    last: Tensor
    successors: list[Successor]


class Rollout:
    """Holds up to `length` steps of all lanes. Nothing is copied before `take`: a Step's tensors are never written again.

    The notes of a decision name the carry that it was made with by the fields of `Carry`.

    It is full after `length` steps, or where all lanes were cut at once: at an iteration's end, so that nothing outlives it, and where all
    episodes end together, as in A3C, whose workers update when their episode ends.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._steps: list[tuple[Step, Decision, Step]] = []
        self._bonus: list[Tensor] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def full(self) -> bool:
        """Whether it is time to `take`."""
        return self._closed or len(self._steps) == self.length

    def append(self, step: Step, decision: Decision, after: Step) -> None:
        """Adds one step of every lane."""
        if self.full:
            raise RuntimeError("a full rollout is taken before it goes on")
        self._steps.append((step, decision, after))
        if after.next_obs is not after.obs:
            self._closed = bool(after.last.all())

    def add_bonus(self, bonus: Tensor) -> None:
        """The intrinsic reward float32 (N) of the oldest step that has none yet."""
        self._bonus.append(bonus)

    def take(self) -> Batch:
        """All steps; the rollout is empty afterwards."""
        steps, decisions, afters = zip(*self._steps)
        before = Carry(*(decisions[0].notes[name] for name in Carry._fields))
        final = len(afters) - 1
        successors = [
            Successor(t, after.next_obs, decisions[t].carry, shown=after.next_obs is after.obs)
            for t, after in enumerate(afters)
            if t == final or _bootstraps(after)
        ]
        reward = torch.stack([after.reward for after in afters])
        draws = [decision.notes["plan_noise"] for decision in decisions if "plan_noise" in decision.notes]
        batch = Batch(
            frames=push_frame(before.stack, steps[0].obs, steps[0].last)[0],
            notes=[{name: part for name, part in decision.notes.items() if name not in Carry._fields} for decision in decisions[1:]],
            opens=torch.stack([step.last for step in steps]),
            state=before.state,
            plan_noise=torch.stack(draws) if draws else None,
            action=torch.stack([decision.action for decision in decisions]),
            reward=reward,
            bonus=torch.stack(self._bonus) if self._bonus else torch.zeros_like(reward),
            discount=torch.stack([after.discount for after in afters]),
            last=torch.stack([after.last for after in afters]),
            successors=successors,
        )
        self._steps, self._bonus, self._closed = [], [], False
        return batch


def _bootstraps(after: Step) -> bool:
    """Whether V(next_obs) of some cut lane may be asked for. The device is not waited for: there, every step with an end counts."""
    if after.next_obs is after.obs:
        return False
    return after.last.device.type != "cpu" or bool((after.last & (after.discount > 0)).any())
