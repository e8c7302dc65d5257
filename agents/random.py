"""The agent that knows nothing: uniformly random actions. The zero of every score, and the collector of first frames."""

from __future__ import annotations

import torch

from agents.api import Decision
from agents.unlearned import Unlearned
from envs.api import Spec, Step


class RandomAgent(Unlearned):
    """Uniformly random actions, drawn from torch's default generator."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self._num_actions = spec.num_actions
        self._device = device

    def initial(self, num_envs: int) -> None:
        return None

    def act(self, step: Step, carry: None, explore: bool) -> Decision:
        action = torch.randint(self._num_actions, (step.last.shape[0],), device=self._device)
        return Decision(action, None, {})
