"""What agents share that learn nothing: random and scripted ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agents.api import Decision, Metrics
from envs.api import Step


class Unlearned:
    """Observes nothing, learns nothing and has nothing to save."""

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        pass

    def learn(self) -> Metrics:
        return {}

    def required_bytes(self, steps: int) -> int:
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
