"""Bonuses: what a new frame is worth to an explorer. A bonus learns from every frame that it is asked about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from agents.api import Metrics
from envs.api import UserError
from generative.api import Density, Trainable
from generative.pseudo_count import Form, count_bonus, prediction_gain, pseudo_count, scaled_count

SIDE = 42
GREY = (0.299, 0.587, 0.114)  # luma of red, green and blue (ITU-R BT.601), as the emulator's own grey
GRADIENT_GAIN_SCALE = 0.1


class NonFiniteBonus(FloatingPointError):
    """A bonus is not finite, after `seen` frames."""

    def __init__(self, seen: int) -> None:
        why = "the density gives numbers that are not finite, or bonus=gain a frame that it held impossible"
        super().__init__(f"the bonus is not finite after {seen:,} frames: {why}")


@runtime_checkable
class Bonus(Protocol):
    """Intrinsic reward. Agents add `agent.bonus_scale` times it to their clipped reward; scores never hold it."""

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W), as the agent sees them -> float32 (B). Learns the frames, in their order."""

    def metrics(self) -> Metrics:
        """What came since the last call; empty where nothing did."""

    def required_bytes(self, frames: int) -> int:
        """An upper bound of the bytes that its memory takes after so many frames."""

    def state_dict(self) -> dict[str, Any]:
        """Everything with memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


def density_shape(obs_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(1, h, w) of the frames that densities see: grey, at most 42x42 (Bellemare et al. 2016)."""
    _, height, width = obs_shape
    return 1, min(height, SIDE), min(width, SIDE)


def shrink_frames(frames: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 (B, C, H, W) -> uint8 (B, 1, h, w): grey, each pixel the mean of the area it covers, rounded half to even."""
    if tuple(frames.shape[1:]) == shape:
        return frames
    values = frames.float()
    if frames.shape[1] == 3:
        values = (values * values.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif frames.shape[1] != 1:
        values = values.mean(1, keepdim=True)
    if all(source % side == 0 for source, side in zip(frames.shape[2:], shape[1:])):
        means = functional.interpolate(values, shape[1:], mode="area")  # elsewhere it takes means of whole pixels, some of them twice
    else:
        rows, columns = (_shares(source, side).to(values.device) for source, side in zip(frames.shape[2:], shape[1:]))
        means = rows @ values @ columns.T
    return means.round_().clamp_(0, 255).to(torch.uint8)


@cache
def _shares(source: int, size: int) -> Tensor:
    """float32 (size, source): what part of each of `size` equal stretches lies in each of `source` cells; rows sum to 1."""
    stops, cells = torch.arange(1, size + 1, dtype=torch.float64).unsqueeze(1) * source / size, torch.arange(source)
    starts = stops - source / size
    return ((torch.minimum(cells + 1, stops) - torch.maximum(cells, starts)).clamp(min=0) * size / source).float()


class Meter:
    """Mean and largest of what a bonus gave since it was last asked, kept on the device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._largest: Tensor | None = None
        self._count = 0

    def add(self, bonus: Tensor) -> None:
        """Takes in float (B)."""
        total, largest = bonus.sum(), bonus.max()
        self._total = total if self._total is None else self._total + total
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._count += len(bonus)

    def metrics(self) -> dict[str, Tensor | float]:
        """`bonus/mean` and `bonus/max` since the last call."""
        if self._total is None or self._largest is None:
            return {}
        shown: dict[str, Tensor | float] = {"bonus/mean": self._total / self._count, "bonus/max": self._largest}
        self._total, self._largest, self._count = None, None, 0
        return shown


class CountBonus:
    """(N + 0.01)^(-1/2), or another form, of a density's pseudo-count N (Bellemare et al. 2016, section 5).

    Args:
        obs_shape: (C, H, W) of the agent's frames, which are shrunk to the density's.
        device: of what it returns.
        density: learns every frame online. One that gives a bound is refused unless `allow_bound`.
        form: inverse_sqrt (MBIE-EB), inverse (BEB) or gain (the prediction gain itself).
        gain_scale: c of Ostrovski et al. (2017), by which gains are scaled as c / sqrt(n). null: 0.1 for densities that are learnt by
            gradients, none (0) for those that count. The 0.01 above is added to a scaled count too, so that no bonus is above 10.
        allow_bound: take a density whose number is only a bound of the log-probability.
    """

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        device: torch.device | str,
        density: Density,
        form: Form = "inverse_sqrt",
        gain_scale: float | None = None,
        allow_bound: bool = False,
    ) -> None:
        if form not in get_args(Form):
            raise UserError(f"bonus.form is one of {', '.join(get_args(Form))}, got {form}")
        if gain_scale is not None and not (math.isfinite(gain_scale) and gain_scale >= 0):
            raise UserError(f"bonus.gain_scale must be null, 0 (none) or more, got {gain_scale}")
        if not density.exact and not allow_bound:
            name = type(density).__name__
            raise UserError(
                f"the density {name} gives a bound, from which no count follows; say bonus.allow_bound=true to use it all the same"
            )
        if form == "gain" and torch.isneginf(density.log_prob(torch.zeros(1, *density.obs_shape, dtype=torch.uint8))).any():
            raise UserError(f"bonus=gain needs a density that holds no frame impossible; {type(density).__name__} gives new ones log 0")
        if gain_scale is None:
            gain_scale = GRADIENT_GAIN_SCALE if isinstance(density, Trainable) else 0.0
        self.density, self.exact = density, density.exact
        self._shape, self._device, self._form, self._gain_scale = density.obs_shape, torch.device(device), form, gain_scale
        self._seen = 0
        self._meter = Meter()

    def __call__(self, frames: Tensor) -> Tensor:
        recoding = self.density.absorb(shrink_frames(frames, self._shape))
        seen = self._seen + torch.arange(1, len(frames) + 1, device=recoding.before.device)
        self._seen += len(frames)
        if self._form == "gain":
            value = prediction_gain(recoding)
            if self._gain_scale:
                value = value * self._gain_scale * seen.double().rsqrt()
        else:
            count = scaled_count(recoding, self._gain_scale, seen) if self._gain_scale else pseudo_count(recoding)
            value = count_bonus(count, self._form)
        bonus = value.to(self._device, torch.float32)
        if bonus.device.type == "cpu" and not torch.isfinite(bonus).all():
            raise NonFiniteBonus(self._seen)
        self._meter.add(bonus)
        return bonus

    def metrics(self) -> Metrics:
        return self._meter.metrics()

    def required_bytes(self, frames: int) -> int:
        grows = getattr(self.density, "required_bytes", None)
        return int(grows(frames) if grows else getattr(self.density, "nbytes", 0))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "density": dict(self.density.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = int(state["seen"])
        self.density.load_state_dict(state["density"])
