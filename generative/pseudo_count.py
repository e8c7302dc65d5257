"""Pseudo-counts and bonuses from how a density's opinion of a frame changes as it learns the frame: pure functions of a `Recoding`.

Bellemare et al. 2016, "Unifying Count-Based Exploration and Intrinsic Motivation", sections 3 and 5; Ostrovski et al. 2017 for the scaled
gain. Everything is float64, in nats. A density that learns nothing from a frame, or unlearns it, has seen it infinitely often.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from generative.api import Recoding

Form = Literal["inverse_sqrt", "inverse", "gain"]
FORMS = ("inverse_sqrt", "inverse", "gain")
OFFSET = 0.01


def prediction_gain(recoding: Recoding) -> Tensor:
    """log rho' - log rho, float64 (B) nats, not below 0; infinite where the frame was impossible before."""
    return (recoding.after.double() - recoding.before.double()).clamp(min=0)


def pseudo_count(recoding: Recoding) -> Tensor:
    """N = rho (1 - rho') / (rho' - rho), float64 (B): how often the density acts as if it had seen the frame (equation 2).

    It is the N of rho = N / n and rho' = (N + 1) / (n + 1), so for an empirical density the true count before the update.
    """
    gain = prediction_gain(recoding)
    return torch.where(gain == 0, torch.inf, -torch.expm1(recoding.after.double().clamp(max=0)) / torch.expm1(gain))


def pseudo_total(recoding: Recoding) -> Tensor:
    """n = (1 - rho') / (rho' - rho), float64 (B): the number of frames that the density acts as if it had seen in all."""
    return pseudo_count(recoding) / recoding.before.double().exp()


def scaled_count(recoding: Recoding, scale: float, frames_seen: Tensor) -> Tensor:
    """1 / (exp(c n^(-1/2) PG) - 1), float64 (B), for densities whose gain does not shrink by itself (Ostrovski et al. 2017).

    Args:
        recoding: of B frames.
        scale: c, 0.1 in the paper.
        frames_seen: n (B), the number of frames seen with this one.
    """
    return 1 / torch.expm1(scale * frames_seen.double().rsqrt() * prediction_gain(recoding))


def count_bonus(count: Tensor, form: Form) -> Tensor:
    """float64 (B) from pseudo-counts (B): (N + 0.01)^(-1/2), or (N + 0.01)^(-1). ValueError for another form."""
    if form == "inverse_sqrt":
        return (count + OFFSET).rsqrt()
    if form == "inverse":
        return 1 / (count + OFFSET)
    raise ValueError(f"a count gives bonuses of the form inverse_sqrt or inverse, not {form}")
