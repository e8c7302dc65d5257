"""A planner's policy over the steps of a rollout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from generative.api import Planner


class Course(NamedTuple):
    """T steps of N lanes that followed and made plans.

    Attributes:
        logits: float32 (T, N, A).
        plan: float32 (N, ...), after the last step.
        replanned: bool (T, N).
        cost: float32 (T, N).
        noise: float32 (T, N, ...).
    """

    logits: Tensor
    plan: Tensor
    replanned: Tensor
    cost: Tensor
    noise: Tensor


class Planned(nn.Module):
    """Walks a planner over T steps of N lanes, as a recurrent core is walked; the plan is what the lanes remember."""

    def __init__(self, planner: Planner, features: int) -> None:
        super().__init__()
        planner.connect(features)
        self.planner = planner

    def forward(self, features: Tensor, opens: Tensor, plan: Tensor, noise: Tensor | None = None) -> Course:
        """Features (T, N, D), bool (T, N) where an empty plan replaces the lane's before the step, the plan (N, ...), and what was drawn.

        Without `noise` (T, N, ...), all is drawn anew.
        """
        steps, empty = [], self.planner.start(opens.shape[1])
        for t, opening in enumerate(opens):
            plan = torch.where(opening.view(-1, *[1] * (plan.dim() - 1)), empty, plan)
            steps.append(self.planner.advance(features[t], plan, noise[t] if noise is not None else None))
            plan = steps[-1].plan
        logits, _, replanned, cost, drawn = (torch.stack(parts) for parts in zip(*steps))
        return Course(logits, plan, replanned, cost, drawn)


def course_metrics(course: Course) -> dict[str, Tensor]:
    """Of a rollout: the share of steps that planned anew, openings among them, the steps to a plan, and the mean cost of a step."""
    plans = course.replanned.sum()
    return {
        "train/replan_share": plans / course.replanned.numel(),
        "train/commitment_steps": course.replanned.numel() / plans.clamp(min=1),
        "train/plan_cost": course.cost.mean(),
    }
