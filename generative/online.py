"""Online learning of a density by gradients: the log-probability before, one step of RMSProp, the log-probability after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from envs.api import UserError
from generative.api import Recoding
from generative.fit import CHECK_UPDATES_DEVICE, NonFiniteLoss

TINY = 1e-30  # on processors, memory below it is forgotten before it becomes denormal, which they are slow at


class OnlineRMSProp(nn.Module):
    """RMSProp with momentum (Tieleman and Hinton 2012); its memory lies in buffers, and so in the model's state dict.

    For the gradient g of the negative log-likelihood in nats a pixel, averaged over the frames of a step, elementwise:

        s = a s + (1 - a) g^2;   v = m v + l g / sqrt(s + epsilon);   p -= v

    The learning rate is that reported of Ostrovski et al. 2017; decay, momentum and epsilon are ours. Epsilon stands inside the root, as in
    the TensorFlow of that year; the loss is in nats a pixel, as in `losses`.

    Args:
        parameters: float32, of the model; changed in place.
        player: named by NonFiniteLoss.
        dims: pixels of a frame.
        learning_rate, decay, momentum, epsilon: l, a, m and epsilon above.
        frames_per_update: frames that share a gradient step. The last step of a call may have fewer.
    """

    square: Tensor
    velocity: Tensor
    updates: Tensor
    _first_bad: Tensor
    _kept: list[Tensor] | None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        player: str,
        dims: int,
        learning_rate: float = 1e-3,
        decay: float = 0.95,
        momentum: float = 0.9,
        epsilon: float = 1e-4,
        frames_per_update: int = 1,
    ) -> None:
        super().__init__()
        if not (0 < learning_rate < math.inf and 0 < epsilon < math.inf):
            raise UserError(f"learning_rate and epsilon must be above 0, got {learning_rate} and {epsilon}")
        if not (0 <= decay < 1 and 0 <= momentum < 1):
            raise UserError(f"decay and momentum lie in [0, 1), got {decay} and {momentum}")
        if frames_per_update < 1:
            raise UserError(f"frames_per_update must be at least 1, got {frames_per_update}")
        self.player, self.dims, self.frames_per_update = player, dims, frames_per_update
        self.learning_rate, self.decay, self.momentum, self.epsilon = learning_rate, decay, momentum, epsilon
        self._held = list(parameters)  # a list, so that they are no parameters of this module too
        size, device = sum(parameter.numel() for parameter in self._held), self._held[0].device
        for name in ("square", "velocity"):
            self.register_buffer(name, torch.zeros(size, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("_first_bad", torch.full((), -1, dtype=torch.int64, device=device), persistent=False)
        self._calls, self._kept = 0, None

    @property
    def numbers(self) -> tuple[np.float32, ...]:
        """What the compiled rule takes: learning rate, decay, momentum, epsilon and TINY."""
        rule = (self.learning_rate, self.decay, self.momentum, self.epsilon, TINY)
        return tuple(np.float32(number) for number in rule)

    def absorb(self, shown: Tensor, nats: Callable[[Tensor], Tensor]) -> Recoding:
        """Learns the frames `shown` (B, ...), a step for each `frames_per_update` in turn; float64 (B) nats. Raises NonFiniteLoss.

        Args:
            nats: (b, ...) -> log-probabilities (b), differentiable with respect to the parameters.
        """
        if len(shown) == 0:
            nothing = torch.empty(0, dtype=torch.float64, device=self.square.device)
            return Recoding(nothing, nothing)
        steps = []
        for part in shown.split(self.frames_per_update):
            steps.append(self._step(part, nats))
            if self.square.device.type == "cpu":
                self._settle()
        self._calls += 1
        if self._calls % CHECK_UPDATES_DEVICE == 0:
            self._settle()
        before, after = (torch.cat(parts) for parts in zip(*steps))
        return Recoding(before, after)

    def _settle(self) -> None:
        """Raises NonFiniteLoss where a step's loss before or after, or its gradient, was not finite. No step from it on changed anything.

        Waits for the device, and so is called after every step on a CPU, else every 50 calls.
        """
        update = int(self._first_bad)
        if update >= 0:
            self._first_bad.fill_(-1)
            raise NonFiniteLoss(self.player, update)

    def _step(self, part: Tensor, nats: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            before = nats(part)
            loss = -before.sum() / (len(part) * self.dims)
            gradient = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, self._held)])
        with torch.no_grad():
            good = (self._first_bad < 0) & torch.isfinite(loss) & torch.isfinite(torch.linalg.vector_norm(gradient))
            on_device = gradient.device.type != "cpu"
            if not (on_device or good):
                self._first_bad.copy_(self.updates + 1)
                return before.detach().double(), before.detach().double()
            if self._kept is None:
                self._kept = [torch.empty_like(tensor) for tensor in self._memory()]
            for kept, tensor in zip(self._kept, self._memory()):
                kept.copy_(tensor)
            self._move(gradient)
            after = nats(part)
            good &= torch.isfinite(after.sum())
            if on_device or not good:
                for kept, tensor in zip(self._kept, self._memory()):
                    tensor.copy_(torch.where(good, tensor, kept))
            self._first_bad.copy_(torch.where((self._first_bad < 0) & ~good, self.updates + 1, self._first_bad))
            self.updates += good
        return before.detach().double(), after.double()

    def _memory(self) -> list[Tensor]:
        return [*self._held, self.square, self.velocity]

    def _move(self, gradient: Tensor) -> None:
        """The rule, in place."""
        sizes = [parameter.numel() for parameter in self._held]
        parts = zip(self._held, *(flat.split(sizes) for flat in (self.square, self.velocity, gradient)))
        if gradient.device.type == "cpu":
            from generative.vectors import rmsprop

            for parameter, *flat in parts:
                rmsprop(parameter.detach().view(-1).numpy(), *(part.numpy() for part in flat), *self.numbers)
            return
        self.square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        self.velocity.mul_(self.momentum).addcdiv_(gradient, (self.square + self.epsilon).sqrt_(), value=self.learning_rate)
        for parameter, _, velocity, _ in parts:
            parameter.sub_(velocity.view_as(parameter))
