"""The contract of every agent, and what flows through the one loop (`agents.loop`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from envs.api import Step

Metrics = Mapping[str, "Tensor | float"]
"""Name -> 0-d tensor or float. Nothing on the hot path waits for the device; a listener that keeps a tensor clones it."""


class Decision(NamedTuple):
    """What an agent decided for N lanes.

    Attributes:
        action: int64 (N).
        carry: the agent's memory of each lane after `step.obs`, leading N; None for agents without.
        notes: tensors with leading N that come back in `observe`.
    """

    action: Tensor
    carry: Any
    notes: dict[str, Tensor]


@runtime_checkable
class Agent(Protocol):
    """Built as `Agent(spec, device, **knobs, **jobs)`, the jobs (`encoder=`, `density=`, ...) by name."""

    def initial(self, num_envs: int) -> Any:
        """The carry of `num_envs` lanes before an episode's first frame."""

    def act(self, step: Step, carry: Any, explore: bool) -> Decision:
        """Decides on `step.obs`. Changes nothing in the agent; first replaces the carry's rows by `initial` where `step.last`."""

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        """Takes in one transition of every lane: from `step.obs` by `decision.action` to `after.next_obs`."""

    def learn(self) -> Metrics:
        """Learns from what was observed, while the emulators work. Empty when it is not time."""

    def required_bytes(self, steps: int) -> int:
        """An upper bound of the bytes that the agent's memory takes after `steps` agent steps of all lanes together."""

    def state_dict(self) -> dict[str, Any]:
        """Everything with memory: nested dicts of tensors, numbers and strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
