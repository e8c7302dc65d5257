"""Fits any Trainable to frames or clips. A generator: whoever wants to log, draw, save or stop listens to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from envs.api import UserError
from generative.api import Clip
from generative.data import ClipSource, FrameSource, image_clip

Precision = Literal["auto", "float32", "bfloat16"]
CHECK_UPDATES_DEVICE = 50


class NonFiniteLoss(FloatingPointError):
    """A loss or its gradient is not finite. The model stands at its last good state, before update `update`."""

    def __init__(self, player: str, update: int) -> None:
        super().__init__(f"the loss of {player} is not finite at update {update}: lower the learning rate")
        self.player, self.update = player, update


class FitTick(NamedTuple):
    """One update: how many are done, the losses' metrics (0-d tensors on the device, with `<player>_loss`), and the host time it took."""

    update: int
    metrics: dict[str, Tensor]
    seconds: float


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products in training; parameters stay float32.

    `auto` is bfloat16 on GPUs that have it and on CPUs with AMX tiles, else float32: on AVX-512 alone bfloat16 made VAE updates slower
    (benchmarks/vae_speed.py). RuntimeError, in torch's words, where the device cannot do what is asked for.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision is one of auto, float32, bfloat16, got {precision}")
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


class Fitter:
    """Owns one optimiser for each of the model's players and counts updates.

    The defaults suit `generative.vae.VAE` on a CPU. Blundell et al. 2016, appendix A, is `optimiser="rmsprop", learning_rate=1e-5,
    batch_size=100, updates=400_000` on 1,000,000 frames of random play; for models whose loss is divided by the number of pixels, as
    `VAE`'s, RMSProp's and Adam's steps are the same but for their epsilon.

    Args:
        model: Trainable, its parameters on the device to fit on.
        frames: what to fit to; batches are drawn with replacement from torch's default generator.
        batch_size: frames, or clips, an update.
        learning_rate: constant step size.
        optimiser: `adam` (betas 0.9 and 0.999) or `rmsprop` (decay 0.99, no momentum).
        updates: where `run` ends.
        precision: see `choose_precision`.
        check_updates: how often the losses' finiteness is looked at. 1, the CPU's default, looks before every step; more (50 on GPUs) never
            waits between, and restores a copy of the state at the last look.
        warmup_updates: how many updates the learning rate grows for, in a straight line. Simulators of Pong learned nothing without it in
            800 updates: the first steps' gradients, large in a network that adds little at first, are long remembered by Adam.
        clip_steps: transitions of a clip, for models that learn from them; `frames` is a ClipSource then. None: single frames.
        clip_lead: how many of them come before the step that is drawn, as far as its episode had begun.
    """

    def __init__(
        self,
        model: Any,
        frames: FrameSource,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        optimiser: Literal["adam", "rmsprop"] = "adam",
        updates: int = 5_000,
        precision: Precision = "auto",
        check_updates: int | None = None,
        warmup_updates: int = 0,
        clip_steps: int | None = None,
        clip_lead: int = 0,
    ) -> None:
        if batch_size < 1 or updates < 1 or learning_rate <= 0 or (check_updates is not None and check_updates < 1):
            raise UserError("batch_size, updates, learning_rate and check_updates must be positive")
        if optimiser not in ("adam", "rmsprop"):
            raise UserError(f"optimiser is one of adam, rmsprop, got {optimiser}")
        if len(frames) == 0:
            raise UserError("there are no frames to fit to")
        if warmup_updates < 0:
            raise UserError(f"warmup_updates must be 0 or more, got {warmup_updates}")
        if clip_steps is not None and clip_steps < 1:
            raise UserError(f"clips have at least 1 transition, got {clip_steps}")
        self.model, self.frames, self.batch_size, self.updates, self.update = model, frames, batch_size, updates, 0
        self.clip_lead = clip_lead
        self.clip_steps, self.learning_rate, self.warmup_updates = clip_steps, learning_rate, warmup_updates
        self.parameters = {name: list(parameters) for name, parameters in model.players().items()}
        self.device = next(parameter.device for parameters in self.parameters.values() for parameter in parameters)
        self.dtype = choose_precision(precision, self.device)
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for name, parameters in self.parameters.items():
            if optimiser == "adam":
                self.optimisers[name] = torch.optim.Adam(parameters, learning_rate, fused=True)
            else:
                self.optimisers[name] = torch.optim.RMSprop(parameters, learning_rate, foreach=True)
        self.check_updates = check_updates or (1 if self.device.type == "cpu" else CHECK_UPDATES_DEVICE)
        self._bad: dict[str, Tensor] = {}
        self._good = self._copy() if self.check_updates > 1 else None

    def run(self, until: int | None = None) -> Iterator[FitTick]:
        """Yields after every update until so many, or `updates`, are done, from where `update` stands. Raises NonFiniteLoss."""
        stop = self.updates if until is None else min(until, self.updates)
        batches = self._batches(stop - self.update)
        while self.update < stop:
            began = time.perf_counter()
            metrics = self.step(next(batches))
            yield FitTick(self.update, metrics, time.perf_counter() - began)

    def retune(self, batch_size: int, learning_rate: float, clip_steps: int | None) -> None:
        """For the updates to come, until told otherwise. Call it between two `run`s, which draw ahead."""
        self.batch_size, self.learning_rate, self.clip_steps = batch_size, learning_rate, clip_steps

    def _batches(self, count: int) -> Iterator[Clip]:
        """What the next updates learn from. A thread puts clips together, one batch ahead; which ones is drawn here, so that results do not
        hang on its pace."""
        if self.clip_steps is None:
            for _ in range(count):
                yield image_clip(self._moved(self.frames.sample(self.batch_size)))
            return
        source, shape = cast(ClipSource, self.frames), (self.clip_steps, self.clip_lead)
        most = max(1, source.starts(*shape))
        with ThreadPoolExecutor(1) as pool:
            draws = (pool.submit(source.clips, torch.randint(most, (self.batch_size,)), *shape) for _ in range(count))
            ahead = next(draws, None)
            while ahead is not None:
                now, ahead = ahead.result(), next(draws, None)
                yield Clip(*(self._moved(part) for part in now))

    def _moved(self, part: Tensor) -> Tensor:
        if self.device.type == "cuda" and part.device.type == "cpu":
            part = part.pin_memory()
        return part.to(self.device, non_blocking=True)

    def step(self, clip: Clip) -> dict[str, Tensor]:
        """One update of every player on a clip on the model's device. Raises NonFiniteLoss."""
        rate = self.learning_rate * min(1.0, (self.update + 1) / max(1, self.warmup_updates))
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate
        metrics: dict[str, Tensor] = {}
        losses = iter(self.model.losses(clip))
        while True:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                item = next(losses, None)
            if item is None:
                break
            player, loss, values = item
            optimiser = self.optimisers[player]
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._watch(player, loss.detach())
            optimiser.step()
            metrics |= values
            metrics[f"{player}_loss"] = loss.detach()
        self.update += 1
        if self.check_updates > 1 and (self.update % self.check_updates == 0 or self.update == self.updates):
            self._settle()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Updates done and the optimisers' memory, tensors and numbers only; the model saves itself. Raises NonFiniteLoss."""
        if self.check_updates > 1:
            self._settle()
        return {
            "update": self.update,
            "optimisers": {
                name: {str(index): dict(memory) for index, memory in optimiser.state_dict()["state"].items()}
                for name, optimiser in self.optimisers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, after the model has loaded its own. What the constructor was told (learning rate, ...) stays."""
        self.update = int(state["update"])
        for name, optimiser in self.optimisers.items():
            memory = {int(index): dict(values) for index, values in state["optimisers"][name].items()}
            optimiser.load_state_dict({"state": memory, "param_groups": optimiser.state_dict()["param_groups"]})
        self._bad = {}
        self._good = self._copy() if self.check_updates > 1 else None

    def _watch(self, player: str, loss: Tensor) -> None:
        """Notes the first update at which the loss or its gradient is not finite; with a check every update, raises before the step."""
        gradients = [parameter.grad for parameter in self.parameters[player] if parameter.grad is not None]
        finite = torch.isfinite(loss) & torch.isfinite(nn.utils.get_total_norm(gradients))
        if self.check_updates == 1:
            if not finite:
                raise NonFiniteLoss(player, self.update + 1)
            return
        unseen = torch.tensor(-1, device=self.device) if player not in self._bad else self._bad[player]
        self._bad[player] = torch.where((unseen < 0) & ~finite, self.update + 1, unseen)

    def _settle(self) -> None:
        """Raises NonFiniteLoss and restores the copy where an update since the last call was bad; else takes a new copy."""
        first = {player: int(update) for player, update in self._bad.items()}
        self._bad = {}
        bad = {player: update for player, update in first.items() if update >= 0}
        if bad:
            player = min(bad, key=lambda name: bad[name])
            assert self._good is not None
            model, fitter = self._good
            self.model.load_state_dict(model)
            self.load_state_dict(fitter)
            raise NonFiniteLoss(player, bad[player])
        self._good = self._copy()

    def _copy(self) -> tuple[dict[str, Any], dict[str, Any]]:
        optimisers = {
            name: {
                str(index): {key: value.clone() if isinstance(value, Tensor) else value for key, value in memory.items()}
                for index, memory in optimiser.state_dict()["state"].items()
            }
            for name, optimiser in self.optimisers.items()
        }
        model = {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.model.state_dict().items()}
        return model, {"update": self.update, "optimisers": optimisers}
