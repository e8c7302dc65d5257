"""One optimiser for agents: all parameters of a network in one flat tensor, one pass an update, no update from a non-finite loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from envs.api import UserError
from generative.fit import NonFiniteLoss, Precision, choose_precision

Kind = Literal["rmsprop", "rmsprop_centred", "adam"]
KINDS = ("rmsprop", "rmsprop_centred", "adam")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
CHECK_UPDATES_DEVICE = 50
LARGEST_THRESHOLD_BYTES = 31 * 2**20
LARGEST_TASK = 2**18  # numbers that one thread updates at a stretch


def working_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a network's own parameters; their masters are kept in float32 all the same (`FlatOptimiser`).

    `auto` as in `generative.fit.choose_precision`: bfloat16 on GPUs that have it and on processors with AMX tiles, else float32. With
    AVX-512 alone, bfloat16 took 1.8 times as long for the network of Mnih et al. 2015. `float16` is a matter of the torso
    (`agents.half`), whose parameters are float32. UserError where the precision has another name.
    """
    if precision not in PRECISIONS:
        raise UserError(f"agent.precision is one of {', '.join(PRECISIONS)}, got {precision}")
    return torch.float32 if precision == "float16" else choose_precision(cast(Precision, precision), device)


def keep_freed_memory() -> None:
    """Makes the process keep the memory of large tensors that it frees on the host, for the next ones.

    glibc gives free memory beyond a threshold back to the system, and fresh memory costs a page fault every 4 KiB: 6,000 of them, a sixth
    of the time, in an update of the actor-critic. The threshold is twice the largest block, up to 32 MiB, that glibc has seen freed
    (mallopt(3), M_MMAP_THRESHOLD), so it is shown one. The block is never written and costs nothing. Elsewhere this does nothing.
    """
    torch.empty(LARGEST_THRESHOLD_BYTES, dtype=torch.uint8)


class FlatOptimiser:
    """Owns the parameters of `network`: float32 masters in one flat tensor, and the network's own in `dtype`, views of a second one.

    With `dtype=torch.float32` both are one. A forward pass in bfloat16 needs no autocast then, and no parameter is cast twice an update.

    The rules, for a gradient g, with decay a and step size l, elementwise:

        rmsprop          s = a s + (1 - a) g^2;  p -= l g / (sqrt(s) + epsilon)
        rmsprop_centred  m = a m + (1 - a) g, s as above;  p -= l g / sqrt(s - m^2 + epsilon)
        adam             m = b m + (1 - b) g, s as above;  p -= l (m / (1 - b^t)) / (sqrt(s / (1 - a^t)) + epsilon)

    The first is that of torch and the A2C baselines, the second that of Graves 2013 (without momentum) and Mnih et al. 2015,
    the third that of Kingma and Ba 2015.

    Args:
        network: on the device already. Its parameters are cast to `dtype` and moved into the flat tensor.
        kind: which rule.
        learning_rate: l, unless `minimise` is told another.
        decay: a; 0.99 for A3C, 0.95 for DQN, 0.999 for Adam.
        momentum: b, of Adam only.
        epsilon: 1e-5 for A2C; 0.01 for DQN.
        dtype: that the network computes in (`working_dtype`).
        player: named by NonFiniteLoss.
        check_updates: how often the device is asked whether all was finite. 1, the CPU's default, looks before every step; more never waits
            between. Either way a step whose loss or gradient is not finite is never taken, and none after it.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: Kind = "rmsprop",
        learning_rate: float = 7e-4,
        decay: float = 0.99,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: torch.dtype = torch.float32,
        player: str = "the agent",
        check_updates: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"agent.optimiser is one of {', '.join(KINDS)}, got {kind}")
        if not 0 < learning_rate < math.inf:
            raise UserError(f"agent.learning_rate must be above 0, got {learning_rate}")
        if not (0 <= decay < 1 and 0 <= momentum < 1 and epsilon > 0):
            raise UserError(f"agent: decay and momentum lie in [0, 1) and epsilon above 0, got {decay}, {momentum}, {epsilon}")
        self.kind, self.learning_rate, self.dtype = kind, learning_rate, dtype
        self.updates = 0
        self._decay, self._momentum, self._epsilon, self._player = decay, momentum, epsilon, player
        self._parameters = list(network.parameters())
        keep_freed_memory()
        self._orders = [_memory_order(parameter) for parameter in self._parameters]
        device = self._parameters[0].device
        self.master = torch.cat([parameter.detach().permute(order).reshape(-1).float() for parameter, order in self._ordered()])
        self._working = self.master if dtype == torch.float32 else self.master.to(dtype)
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.data = _like(self._working[start:stop], parameter.detach())
            start = stop
        self._square = torch.zeros_like(self.master)
        self._mean = torch.zeros_like(self.master if kind != "rmsprop" else self.master[:0])
        self._pool: ThreadPoolExecutor | None = None
        self._check_updates = check_updates or (1 if device.type == "cpu" else CHECK_UPDATES_DEVICE)
        self._compiled = device.type == "cpu" and self._check_updates == 1
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._rate = learning_rate  # of the update that is open, and below it the device's word of it
        self._device_rate = torch.zeros((), device=device)
        self._device_updates = torch.zeros((), dtype=torch.int64, device=device)

    def minimise(self, loss: Tensor, learning_rate: float | None = None, max_norm: float | None = None) -> Tensor:
        """One update down the gradient of the scalar `loss`. Raises NonFiniteLoss.

        Args:
            learning_rate: of this update, where it follows a schedule.
            max_norm: the gradient of all parameters together is scaled down to this Euclidean norm where it is longer.

        Returns:
            float32 (), the gradient's norm before it was scaled.
        """
        self.begin(learning_rate)
        norm = self.descend(loss, max_norm)
        self.finish()
        return norm

    def begin(self, learning_rate: float | None = None) -> None:
        """Opens an update: counts it, and tells the device its learning rate. The host's part, before what may be captured."""
        self.updates += 1
        self._rate = self.learning_rate if learning_rate is None else learning_rate
        if not self._compiled:
            self._device_rate.fill_(self._rate)
            self._device_updates.fill_(self.updates)

    def descend(self, loss: Tensor, max_norm: float | None = None) -> Tensor:
        """The update that `begin` opened, as `minimise` says; where the device is asked seldom, a function of tensors alone."""
        gradients = torch.autograd.grad(loss, self._parameters)
        parts = [part.permute(order).reshape(-1) for part, order in zip(gradients, self._orders)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, dtype=torch.float32)))
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm is not None else torch.ones_like(norm)
        if self._check_updates == 1:
            if not finite:
                self.updates -= 1
                raise NonFiniteLoss(self._player, self.updates + 1)
        else:
            self._first_bad.copy_(torch.where((self._first_bad < 0) & ~finite, self._device_updates, self._first_bad))
        if self._compiled:
            self._step_on_host(parts, float(scale), self._rate)
        else:
            self._step(torch.cat(parts).float() * scale)
        if self._working is not self.master:
            self._working.copy_(self.master)
        return norm

    def finish(self) -> None:
        """Closes an update: asks the device now and then whether all was finite. Raises NonFiniteLoss."""
        if self._check_updates > 1 and self.updates % self._check_updates == 0:
            self.settle()

    def settle(self) -> None:
        """Raises NonFiniteLoss where an update since the last call was not finite. Waits for the device."""
        first = int(self._first_bad)
        if first >= 0:
            self._first_bad.fill_(-1)
            self.updates = first - 1
            raise NonFiniteLoss(self._player, first)

    def state_dict(self) -> dict[str, Any]:
        """The float32 parameters, flat, and the rule's memory. The network needs no saving besides. Raises NonFiniteLoss."""
        self.settle()
        return {"master": self.master, "square": self._square, "mean": self._mean, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; the network's parameters are loaded with it."""
        for name, mine in (("master", self.master), ("square", self._square), ("mean", self._mean)):
            if state[name].shape != mine.shape:
                raise UserError(f"the checkpoint's network has {state[name].numel()} numbers in {name}, this one {mine.numel()}")
            mine.copy_(state[name])
        self.updates = int(state["updates"])
        self._working.copy_(self.master)
        self._first_bad.fill_(-1)

    def _ordered(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        return zip(self._parameters, self._orders)

    def _step(self, gradient: Tensor) -> None:
        """The rule in torch, for any device, for one flat gradient: masked out once a gradient was not finite."""
        square = torch.lerp(gradient * gradient, self._square, self._decay)
        mean, rate = self._mean, self._device_rate
        if self.kind == "rmsprop":
            step = gradient / (square.sqrt() + self._epsilon)
        elif self.kind == "rmsprop_centred":
            mean = torch.lerp(gradient, mean, self._decay)
            step = gradient / ((square - mean * mean).clamp(min=0) + self._epsilon).sqrt()  # below 0 by rounding alone
        else:
            mean = torch.lerp(gradient, mean, self._momentum)
            updates = self._device_updates.double()  # 1 - 0.999^t, as float32 tells it, is off by a ten-thousandth
            rate = (rate / (1 - self._momentum**updates)).float()
            step = mean / ((square / (1 - self._decay**updates).float()).sqrt() + self._epsilon)
        good = self._first_bad < 0
        for old, new in ((self.master, self.master - rate * step), (self._square, square), (self._mean, mean)):
            old.copy_(torch.where(good, new, old))

    def _step_on_host(self, parts: list[Tensor], scale: float, rate: float) -> None:
        """The rule in one compiled pass over each parameter's gradient, flat and in memory order, shared among threads."""
        master, square, mean = self.master.numpy(), self._square.numpy(), self._mean.numpy()
        numbers = [np.float32(number) for number in (scale, rate, self._decay, self._epsilon)]
        if self.kind == "adam":
            powers = self._momentum**self.updates, self._decay**self.updates
            numbers += [np.float32(number) for number in (self._momentum, 1 / (1 - powers[0]), 1 / (1 - powers[1]))]
        rule = {"rmsprop": _rmsprop, "rmsprop_centred": _rmsprop_centred, "adam": _adam}[self.kind]
        tasks, start = [], 0
        for part in parts:
            gradient, stop = part.float().numpy(), start + part.numel()
            for first in range(start, stop, LARGEST_TASK):
                here = slice(first, min(first + LARGEST_TASK, stop))
                means = (mean[here],) if len(mean) else ()
                tasks.append((master[here], gradient[here.start - start : here.stop - start], square[here], *means, *numbers))
            start = stop
        threads = min(torch.get_num_threads(), len(tasks))
        if threads > 1 and len(master) > LARGEST_TASK:
            self._pool = self._pool or ThreadPoolExecutor(threads - 1, "optimiser")
            shares = [self._pool.submit(_run, rule, tasks[share::threads]) for share in range(1, threads)]
            _run(rule, tasks[::threads])
            for share in shares:
                share.result()
        else:
            _run(rule, tasks)


def _run(rule: Callable[..., None], tasks: list[tuple[Any, ...]]) -> None:
    for task in tasks:
        rule(*task)


def _memory_order(parameter: Tensor) -> tuple[int, ...]:
    """The dimensions of a dense parameter from the outermost in memory to the innermost."""
    return tuple(sorted(range(parameter.dim()), key=lambda dim: parameter.stride()[dim], reverse=True))


def _like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` as a view with the shape and memory order of `parameter`."""
    return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())


# One pass over all parameters, three to four times faster than a pass for each operation. What decays towards 0 is kept above the numbers
# that processors handle in microcode (below 1e-38), a hundred times slower: the tiny addends are far below what any epsilon lets through.

_ZERO, _ONE, _TINY_SQUARE, _TINY_MEAN = np.float32(0), np.float32(1), np.float32(1e-30), np.float32(1e-18)


@njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def _rmsprop(p, g, s, scale, rate, decay, epsilon):
    for i in range(p.shape[0]):
        x = g[i] * scale
        s[i] = s[i] * decay + (x * x * (_ONE - decay) + _TINY_SQUARE)
        p[i] -= rate * x / (np.sqrt(s[i]) + epsilon)


@njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def _rmsprop_centred(p, g, s, m, scale, rate, decay, epsilon):
    for i in range(p.shape[0]):
        x = g[i] * scale
        s[i] = s[i] * decay + (x * x * (_ONE - decay) + _TINY_SQUARE)
        m[i] = m[i] * decay + (x * (_ONE - decay) + _TINY_MEAN)
        p[i] -= rate * x / np.sqrt(max(s[i] - m[i] * m[i], _ZERO) + epsilon)


@njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def _adam(p, g, s, m, scale, rate, decay, epsilon, momentum, scale_mean, scale_square):
    for i in range(p.shape[0]):
        x = g[i] * scale
        s[i] = s[i] * decay + (x * x * (_ONE - decay) + _TINY_SQUARE)
        m[i] = m[i] * momentum + (x * (_ONE - momentum) + _TINY_MEAN)
        p[i] -= rate * scale_mean * m[i] / (np.sqrt(s[i] * scale_square) + epsilon)
