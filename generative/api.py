"""What a generative model can do: train, sample, encode, score, simulate, plan. A model implements the jobs it can do.

Every model is built as `Model(obs_shape, num_actions, device, **knobs)` and has `obs_shape`, `state_dict`, `load_state_dict`, `to`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Clip(NamedTuple):
    """B traces of T transitions. Transition t leads from frames[:, t] by actions[:, t] to frames[:, t + 1], the true successor.

    After a row's first `last` comes padding, which models mask. Where frames before a row's first are wanted, it is repeated, and the
    actions that lead on from these copies are -1: nothing was done, and nothing stood still.

    Attributes:
        frames: uint8 (B, T + 1, C, H, W).
        actions: int64 (B, T).
        rewards: float32 (B, T).
        discounts: float32 (B, T).
        last: bool (B, T).
    """

    frames: Tensor
    actions: Tensor
    rewards: Tensor
    discounts: Tensor
    last: Tensor


class Recoding(NamedTuple):
    """Log-probabilities in nats, float (B), just before and just after one online update on the frame."""

    before: Tensor
    after: Tensor


class PlanStep(NamedTuple):
    """One step of a macro-action plan.

    Attributes:
        logits: float32 (B, A), of this step's actions.
        plan: float32 (B, ...), after the step.
        replanned: bool (B), where the plan was made anew.
        cost: float32 (B), what the step adds to the agent's loss.
        noise: float32 (B, ...), every random draw of the step.
    """

    logits: Tensor
    plan: Tensor
    replanned: Tensor
    cost: Tensor
    noise: Tensor


@runtime_checkable
class Model(Protocol):
    """What every model has."""

    obs_shape: tuple[int, int, int]

    def state_dict(self) -> dict[str, Any]:
        """Everything with memory, by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """The inverse of `state_dict`."""


@runtime_checkable
class Trainable(Protocol):
    """A model that is fitted by gradients."""

    def players(self) -> dict[str, Iterable[Any]]:
        """Name -> parameters; each player has an optimiser of its own. A plain model has one."""

    def losses(self, clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yields (player, scalar loss, metrics); the player's optimiser steps before the next is drawn."""


@runtime_checkable
class Sampler(Protocol):
    """A model that dreams single frames."""

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W)."""


@runtime_checkable
class Encoder(Model, Protocol):
    """A model that represents single frames."""

    features: int

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, D), no gradient, eval mode. The last bits may change with the batch size."""


@runtime_checkable
class Density(Model, Protocol):
    """A model that says how probable a frame is. `exact` is False where the number is a bound."""

    exact: bool
    updates_per_frame: float

    def log_prob(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float (B), nats per frame."""

    def absorb(self, frames: Tensor) -> Recoding:
        """Learns the frames online and tells the log-probability of each just before and just after."""


@runtime_checkable
class Simulator(Model, Protocol):
    """A model that steps like an environment. The state is a value: a tuple of tensors, batch first, copied and branched at will."""

    context_frames: int

    def start(self, clip: Clip) -> tuple[Tensor, ...]:
        """State after the last `context_frames` frames of the clip, the first repeated on the left where fewer are known.

        Actions are those between the frames; -1 leads on from a copy of the first.
        """

    def step(self, state: tuple[Tensor, ...], action: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """int64 (B) action -> (state, frame uint8 (B, C, H, W), reward float32 (B), discount float32 (B) in [0, 1])."""


@runtime_checkable
class Planner(Model, Protocol):
    """A torch module that plans macro-actions; its parameters join the agent's optimiser.

    A plan is a value: one float32 tensor, batch first, whose rows the agent replaces by empty ones where episodes open.
    """

    def connect(self, features: int) -> None:
        """Makes the layers that see `features` (B, D). Called once, by the agent that takes the planner, before all else."""

    def start(self, batch: int) -> Tensor:
        """The empty plans of `batch` lanes, float32 (B, ...)."""

    def advance(self, features: Tensor, plan: Tensor, noise: Tensor | None = None) -> PlanStep:
        """features (B, D). `noise` given back from the agent's notes makes the step repeatable and differentiable."""

    def required_bytes(self, steps: int) -> int:
        """An upper bound of what `steps` steps of single lanes hold until a loss has gone back through them, weights apart."""
