"""Random network distillation (Burda et al. 2018, "Exploration by Random Network Distillation"): a frame is new while a network that learns
to imitate a random one still errs on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from agents.api import Metrics
from agents.bonus import Meter, density_shape, shrink_frames
from agents.nets import orthogonal
from agents.optimise import FlatOptimiser
from envs.api import UserError

CLIP = 5.0
HIDDEN = 256


class RandomNetworkDistillation:
    """Squared error / its running standard deviation; the predictor takes one Adam step a call, on the frames it was asked about.

    Kept from the paper: pixels normalised by running mean and deviation and cut at 5 deviations, a fixed random target, a deeper predictor,
    the error as the bonus. Different: frames are the 42x42 grey ones that densities see; errors are divided by their own running deviation,
    not by that of discounted returns; every frame is trained on.

    Args:
        obs_shape: (C, H, W) of the agent's frames.
        device: of both networks.
        features: that the target gives.
        learning_rate: of Adam.
    """

    exact = True

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        device: torch.device | str,
        features: int = 128,
        learning_rate: float = 1e-4,
    ) -> None:
        if features < 1 or not (math.isfinite(learning_rate) and learning_rate > 0):
            raise UserError(f"bonus.features and bonus.learning_rate must be above 0, got {features} and {learning_rate}")
        self._device = torch.device(device)
        self._shape = density_shape(obs_shape)
        self._target = _network(self._shape, features, deeper=False).to(self._device).requires_grad_(False)
        self._predictor = _network(self._shape, features, deeper=True).to(self._device)
        self._optimiser = FlatOptimiser(self._predictor, "adam", learning_rate, decay=0.999, epsilon=1e-8, player="bonus=rnd")
        zeros = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        self._pixels = {"mean": zeros, "square": torch.zeros_like(zeros)}  # running sums divided by the count below
        self._errors = {name: torch.zeros((), dtype=torch.float64, device=self._device) for name in ("mean", "square")}
        self._seen = 0
        self._meter = Meter()

    def __call__(self, frames: Tensor) -> Tensor:
        shown = shrink_frames(frames.to(self._device), self._shape)
        _absorb(self._pixels, shown.double() / 255, self._seen)
        inputs = ((shown.double() / 255 - self._pixels["mean"]) / _deviation(self._pixels)).clamp(-CLIP, CLIP).float()
        error = (self._predictor(inputs) - self._target(inputs)).square().mean(1)
        self._optimiser.minimise(error.mean())
        error = error.detach()
        _absorb(self._errors, error.double(), self._seen)
        self._seen += len(frames)
        bonus = (error / _deviation(self._errors)).float()
        self._meter.add(bonus)
        return bonus

    def metrics(self) -> Metrics:
        return self._meter.metrics()

    def required_bytes(self, frames: int) -> int:
        return 4 * 4 * sum(parameter.numel() for parameter in self._predictor.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {
            "target": dict(self._target.state_dict()),
            "predictor": dict(self._predictor.state_dict()),
            "optimiser": self._optimiser.state_dict(),
            "pixels": dict(self._pixels),
            "errors": dict(self._errors),
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target.load_state_dict(state["target"])
        self._predictor.load_state_dict(state["predictor"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._pixels = {name: value.to(self._device) for name, value in state["pixels"].items()}
        self._errors = {name: value.to(self._device) for name, value in state["errors"].items()}
        self._seen = int(state["seen"])


def _network(shape: tuple[int, int, int], features: int, deeper: bool) -> nn.Sequential:
    """float (B, 1, h, w) -> (B, features): two strided convolutions, and for the predictor two hidden layers more. Where a side has one
    pixel, a convolution strides no more."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for outputs in (16, 32):
        kernel, stride = (4, 2) if min(height, width) >= 2 else (3, 1)
        layers += [nn.Conv2d(channels, outputs, kernel, stride, 1), nn.LeakyReLU()]
        channels, height, width = outputs, (height + 2 - kernel) // stride + 1, (width + 2 - kernel) // stride + 1
    layers.append(nn.Flatten())
    size = channels * height * width
    if deeper:
        layers += [nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
        size = HIDDEN
    layers.append(nn.Linear(size, features))
    for layer in layers:
        orthogonal(layer, math.sqrt(2.0))
    return nn.Sequential(*layers)


def _absorb(moments: dict[str, Tensor], values: Tensor, seen: int) -> None:
    """Takes values (B, ...) into the running means of themselves and of their squares."""
    share = len(values) / (seen + len(values))
    moments["mean"] = moments["mean"] + share * (values.mean(0) - moments["mean"])
    moments["square"] = moments["square"] + share * (values.square().mean(0) - moments["square"])


def _deviation(moments: dict[str, Tensor]) -> Tensor:
    return (moments["square"] - moments["mean"].square()).clamp(min=0).sqrt().clamp(min=1e-4)
