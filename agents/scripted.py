"""The agent that does as it is told: a list of actions, over and over. For recordings with known actions."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from agents.api import Decision
from agents.unlearned import Unlearned
from envs.api import Spec, Step, UserError

MOST_STEPS = 100_000


def script(text: str, names: tuple[str, ...]) -> list[int]:
    """Words such as "UP*3 NOOP" -> the indices of UP, UP, UP and NOOP among `names`, in any case. UserError for other words."""
    steps, index = [], {name.lower(): number for number, name in enumerate(names)}
    for word in text.split():
        name, star, count = word.partition("*")
        if name.lower() not in index:
            raise UserError(f"agent.actions: there is no action {name}; there are {', '.join(names)}")
        if star and not (re.fullmatch(r"[0-9]{1,6}", count) and int(count)):
            raise UserError(f"agent.actions: {word} is not NAME*COUNT with a count from 1 to 999999")
        steps += [index[name.lower()]] * (int(count) if star else 1)
        if len(steps) > MOST_STEPS:
            raise UserError(f"agent.actions: at most {MOST_STEPS:,} steps can be told")
    if not steps:
        raise UserError(f'agent.actions tells no action; quote a list such as agent.actions="{names[-1]}*30 {names[0]}"')
    return steps


class ScriptedAgent(Unlearned):
    """Plays the actions one after another, from the first at every episode's start and after the last.

    Args:
        actions: names of the environment's actions, with how many times: "UP*30 NOOP*10 UPFIRE"; None for the first action alone.
    """

    def __init__(self, spec: Spec, device: torch.device, actions: str | None = None) -> None:
        self._device = device
        self._actions = torch.tensor([0] if actions is None else script(actions, spec.action_names), device=device)

    def initial(self, num_envs: int) -> Tensor:
        """Steps played in the episode, int64 (N)."""
        return torch.zeros(num_envs, dtype=torch.int64, device=self._device)

    def act(self, step: Step, carry: Tensor, explore: bool) -> Decision:
        played = torch.where(step.last, 0, carry)
        return Decision(self._actions[played % len(self._actions)], played + 1, {})
