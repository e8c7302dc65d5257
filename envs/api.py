"""The contract of every world: N environments that step together, pixels in uint8, time in environment frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class UserError(ValueError):
    """A mistake that a user can put right. The message is one line that says what to do; the door shows it and exits with 2."""


@dataclass(frozen=True)
class Spec:
    """What a world looks like from outside.

    Attributes:
        name: the world's name, as typed after `env=`.
        num_actions: actions are 0 .. num_actions - 1.
        action_names: one name an action.
        obs_shape: (C, H, W) of one uint8 observation.
        frames_per_step: environment frames that one step advances (the action repeat).
    """

    name: str
    num_actions: int
    action_names: tuple[str, ...]
    obs_shape: tuple[int, int, int]
    frames_per_step: int

    def __post_init__(self) -> None:
        if len(self.action_names) != self.num_actions:
            raise ValueError(f"{self.name}: {self.num_actions} actions but {len(self.action_names)} action names")


class Step(NamedTuple):
    """What N environments show after one step. Its tensors are never written again.

    Attributes:
        obs: uint8 (N, C, H, W), what to act on next. Where `last`, it opens a new episode.
        reward: float32 (N), raw and unclipped.
        discount: float32 (N), 0 where nothing may be bootstrapped beyond this step.
        last: bool (N), the trace is cut here: termination (discount 0) or time limit (discount 1).
        next_obs: uint8 (N, C, H, W), the true successor. The same object as `obs` when no lane ended.
    """

    obs: Tensor
    reward: Tensor
    discount: Tensor
    last: Tensor
    next_obs: Tensor


@runtime_checkable
class VectorEnv(Protocol):
    """N environments that reset themselves within a step. The emulators work between `send` and `recv`."""

    spec: Spec
    num_envs: int

    def reset(self, seed: int) -> Step:
        """Starts every lane anew (draining a pending send). Reward 0, discount 1 and last True everywhere."""

    def send(self, action: Tensor) -> None:
        """Takes int64 (N) actions on any device and returns at once. ValueError where one is out of range."""

    def recv(self) -> Step:
        """Waits for the step that `send` began."""

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""

    def close(self) -> None:
        """Ends the emulators. Twice is harmless."""


def first_step(obs: Tensor) -> Step:
    """The Step of a reset that shows `obs` uint8 (N, C, H, W): reward 0, discount 1, last True, `next_obs is obs`."""
    lanes, device = obs.shape[0], obs.device
    ended = torch.ones(lanes, dtype=torch.bool, device=device)
    return Step(obs, torch.zeros(lanes, device=device), torch.ones(lanes, device=device), ended, obs)


def check_actions(action: Tensor, num_envs: int, num_actions: int) -> None:
    """ValueError unless `action` is int64 (num_envs) within 0 .. num_actions - 1."""
    if action.dtype != torch.int64 or tuple(action.shape) != (num_envs,):
        raise ValueError(f"actions must be int64 of shape ({num_envs},), got {action.dtype} of shape {tuple(action.shape)}")
    low, high = (int(bound) for bound in torch.aminmax(action))
    if low < 0 or high >= num_actions:
        raise ValueError(f"actions must lie in 0..{num_actions - 1}, got {low if low < 0 else high}")


def check_step(step: Step, spec: Spec) -> None:
    """AssertionError, naming the field, unless `step` keeps the contract of `Step` for `spec`."""
    lanes = step.last.shape[0]
    for name, shape, dtype in (
        ("obs", (lanes, *spec.obs_shape), torch.uint8),
        ("reward", (lanes,), torch.float32),
        ("discount", (lanes,), torch.float32),
        ("last", (lanes,), torch.bool),
        ("next_obs", (lanes, *spec.obs_shape), torch.uint8),
    ):
        tensor: Tensor = getattr(step, name)
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
        assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
    assert bool(torch.isfinite(step.reward).all()), "reward is not finite"
    assert bool(((step.discount >= 0) & (step.discount <= 1)).all()), "discount lies outside [0, 1]"
    running = ~step.last
    assert torch.equal(step.next_obs[running], step.obs[running]), "next_obs differs from obs where the episode goes on"
    if step.next_obs is not step.obs:
        assert bool(step.last.any()), "next_obs is another tensor although no lane ended"
