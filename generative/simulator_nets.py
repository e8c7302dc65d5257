"""Parts of simulators that predict frames: networks, the transform by an action, and what they remember of the frames so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from envs.api import UserError

Memory = tuple[Tensor, ...]
OH_CONVOLUTIONS = ((64, 8, (0, 1)), (128, 6, (1, 1)), (128, 6, (1, 1)), (128, 4, (0, 0)))  # channels, kernel, padding; stride 2
FACTOR_BOUND, ACTION_BOUND, LSTM_BOUND = 1.0, 0.1, 0.08


class Predicted(NamedTuple):
    """What was predicted of `positions`, P indices into a clip's frames, from the frames and actions before each.

    Attributes:
        images: float32 (P, B, C, H, W), pixels / 255 less the mean image.
        hidden: float (P, B, D), what the images were decoded from.
        positions: P frames' indices.
    """

    images: Tensor
    hidden: Tensor
    positions: list[int]


Predict = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""(features (B, D), the frame before or None, int64 (B) actions) -> images float32 (B, C, H, W), hidden (B, D)."""


def oh_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Spatial sizes before and after each convolution of `oh_encoder`. UserError where a frame is too small for them."""
    sizes = [(height, width)]
    for _, kernel, padding in OH_CONVOLUTIONS:
        before = sizes[-1]
        sizes.append(((before[0] + 2 * padding[0] - kernel) // 2 + 1, (before[1] + 2 * padding[1] - kernel) // 2 + 1))
    if min(sizes[-1]) < 1:
        raise UserError(f"frames of {height}x{width} are too small for architecture=paper: use architecture=small")
    return sizes


def oh_encoder(obs_shape: tuple[int, int, int], outputs: int) -> nn.Module:
    """float (B, C, H, W) -> (B, outputs), none below 0. Oh et al. 2015, section 3.1: 210x160 becomes 128 maps of 11x8, then a layer."""
    channels, height, width = obs_shape
    *_, last = oh_sizes(height, width)
    layers: list[nn.Module] = []
    for depth, kernel, padding in OH_CONVOLUTIONS:
        layers += [nn.Conv2d(channels, depth, kernel, 2, padding), nn.ReLU()]
        channels = depth
    return oh_weights(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * last[0] * last[1], outputs), nn.ReLU()))


def oh_decoder(inputs: int, obs_shape: tuple[int, int, int]) -> nn.Module:
    """float (B, inputs) -> (B, C, H, W). The mirror of `oh_encoder` (Oh et al. 2015, section 3.3), with no bound on what comes out.

    At 210x160 everything divides evenly; where a side of another size does not, the missing row is added on the far side.
    """
    maps, height, width = obs_shape
    sizes = oh_sizes(height, width)[::-1]
    channels = OH_CONVOLUTIONS[-1][0]  # of every layer but the last
    layers: list[nn.Module] = [nn.Linear(inputs, channels * sizes[0][0] * sizes[0][1]), nn.ReLU(), nn.Unflatten(1, (channels, *sizes[0]))]
    for (_, kernel, padding), (here, there) in zip(OH_CONVOLUTIONS[::-1], pairwise(sizes)):
        extra = [there[side] - ((here[side] - 1) * 2 + kernel - 2 * padding[side]) for side in (0, 1)]
        depth = maps if there == sizes[-1] else channels
        layers += [nn.ConvTranspose2d(channels, depth, kernel, 2, padding, (extra[0], extra[1])), nn.ReLU()]
    return oh_weights(nn.Sequential(*layers[:-1]))


def oh_weights(network: nn.Sequential) -> nn.Sequential:
    """Draws weights as the authors' code does: uniform, of variance 1 / (weights by the first dimension), biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            bound = math.sqrt(3 / layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network


class ActionTransform(nn.Module):
    """Multiplies what was seen by what is done: W_dec (W_enc h * W_act a) + b, with a one-hot a (Oh et al. 2015, section 3.2).

    That is a bilinear form in h and a, whose weights, one matrix an action, are factored. The bounds of the first weights are those of
    the authors' code: 1 for W_enc and 0.1 for W_act, whose biases there are left out here as in the paper.
    """

    def __init__(self, features: int, num_actions: int, factors: int, outputs: int) -> None:
        super().__init__()
        self.encode_factors = nn.Linear(features, factors, bias=False)
        self.act_factors = nn.Embedding(num_actions, factors)  # a row is W_act a
        self.decode_factors = oh_weights(nn.Sequential(nn.Linear(factors, outputs)))
        nn.init.uniform_(self.encode_factors.weight, -FACTOR_BOUND, FACTOR_BOUND)
        nn.init.uniform_(self.act_factors.weight, -ACTION_BOUND, ACTION_BOUND)

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        """float (B, D), int64 (B) -> float (B, outputs)."""
        hidden: Tensor = self.decode_factors(self.encode_factors(features) * self.act_factors(actions))
        return hidden


class NoAction(nn.Module):
    """One linear layer in the place of `ActionTransform`, which does not see the action: the paper's baseline naFf."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.layer = oh_weights(nn.Sequential(nn.Linear(features, outputs)))

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        """float (B, D), int64 (B) -> float (B, outputs)."""
        hidden: Tensor = self.layer(features)
        return hidden


class FrameStack(nn.Module):
    """Remembers the last K frames and sees them all at once. Memory: (frames float32 (B, K, C, H, W),).

    Args:
        network: float (B, K * C, H, W) -> (B, D).
        frames: K.
    """

    def __init__(self, network: nn.Module, frames: int) -> None:
        super().__init__()
        self.network, self.frames = network, frames

    def start(self, images: Tensor) -> Memory:
        """Memory of float (B, K, C, H, W) frames."""
        return (images,)

    def advance(self, memory: Memory, image: Tensor) -> Memory:
        """Memory with one more frame, float (B, C, H, W)."""
        return (torch.cat((memory[0][:, 1:], image[:, None]), 1),)

    def forward(self, memory: Memory) -> Tensor:
        """Features float (B, D)."""
        features: Tensor = self.network(memory[0].flatten(1, 2))
        return features

    def last(self, memory: Memory) -> Tensor:
        """The last frame, float (B, C, H, W)."""
        return memory[0][:, -1]

    def unroll(self, images: Tensor, actions: Tensor, horizon: int, predict: Predict) -> Predicted:
        """Predicts all of the F frames after the first K. float (B, F, C, H, W), int64 (B, F - 1).

        Every `horizon` predictions the memory starts anew from true frames, so these stretches are independent and run side by side; the
        last may be shorter.
        """
        batch, count = len(images), images.shape[1]
        first = range(self.frames, count, horizon)  # of each stretch
        memory = self.start(torch.cat([images[:, position - self.frames : position] for position in first]))
        parts: list[tuple[Tensor, Tensor]] = []
        positions: list[int] = []
        for depth in range(min(horizon, count - self.frames)):
            here = [position + depth for position in first if position + depth < count]
            if depth:
                memory = self.advance((memory[0][: len(here) * batch],), parts[-1][0][: len(here) * batch])
            taken = torch.cat([actions[:, position - 1] for position in here])
            parts.append(predict(self(memory), self.last(memory), taken))
            positions += here
        predicted, hidden = (torch.cat(part).unflatten(0, (len(positions), batch)) for part in zip(*parts))
        return Predicted(predicted, hidden, positions)


class FrameLSTM(nn.Module):
    """Remembers frames in an LSTM that sees one a step. Memory: (h float32 (B, D), c float32 (B, D)), and the last frame where `residual`.

    Its weights start uniform within 0.08, its biases at 0, as in the authors' code.

    Args:
        network: float (B, C, H, W) -> (B, D).
        hidden: D.
        frames: K, those that it sees before it predicts.
        residual: whether the last frame is remembered too.
    """

    def __init__(self, network: nn.Module, hidden: int, frames: int, residual: bool) -> None:
        super().__init__()
        self.network, self.frames, self.residual = network, frames, residual
        self.lstm = nn.LSTM(hidden, hidden)
        for name, weights in self.lstm.named_parameters():
            nn.init.uniform_(weights, -LSTM_BOUND, LSTM_BOUND) if name.startswith("weight") else nn.init.zeros_(weights)

    def start(self, images: Tensor) -> Memory:
        """Memory after float (B, K, C, H, W) frames."""
        outputs, cell = self._listen(self._see(images), None)
        return self._memory(outputs[-1], cell, images[:, -1])

    def advance(self, memory: Memory, image: Tensor) -> Memory:
        """Memory with one more frame, float (B, C, H, W)."""
        outputs, cell = self._listen(self._see(image[:, None]), memory)
        return self._memory(outputs[-1], cell, image)

    def forward(self, memory: Memory) -> Tensor:
        """Features float (B, D)."""
        return memory[0]

    def last(self, memory: Memory) -> Tensor | None:
        """The last frame, float (B, C, H, W), where it is remembered."""
        return memory[2] if self.residual else None

    def unroll(self, images: Tensor, actions: Tensor, horizon: int, predict: Predict) -> Predicted:
        """Predicts all of the F frames after the first K. float (B, F, C, H, W), int64 (B, F - 1).

        It goes through the frames once: the true frame is seen before every `horizon`-th prediction, before the others the prediction
        that came last. With a horizon of 1, networks run on all frames at once.
        """
        positions = list(range(self.frames, images.shape[1]))
        if horizon == 1:
            outputs, _ = self._listen(self._see(images[:, :-1]), None)
            last = images[:, self.frames - 1 : -1].transpose(0, 1).flatten(0, 1)
            parts = predict(outputs[self.frames - 1 :].flatten(0, 1), last, actions[:, self.frames - 1 :].T.flatten())
            predicted, hidden = (part.unflatten(0, (len(positions), len(images))) for part in parts)
            return Predicted(predicted, hidden, positions)
        memory = self.start(images[:, : self.frames])
        steps: list[tuple[Tensor, Tensor]] = []
        for position in positions:
            if steps:
                true = (position - self.frames) % horizon == 0
                memory = self.advance(memory, images[:, position - 1] if true else steps[-1][0])
            steps.append(predict(self(memory), self.last(memory), actions[:, position - 1]))
        predicted, hidden = (torch.stack(part) for part in zip(*steps))
        return Predicted(predicted, hidden, positions)

    def _memory(self, output: Tensor, cell: Tensor, image: Tensor) -> Memory:
        return (output, cell, image) if self.residual else (output, cell)

    def _see(self, images: Tensor) -> Tensor:
        """float (B, T, C, H, W) -> (T, B, D)."""
        features: Tensor = self.network(images.transpose(0, 1).flatten(0, 1))
        return features.unflatten(0, (images.shape[1], images.shape[0]))

    def _listen(self, features: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """(T, B, D) -> outputs (T, B, D), the cell after the last (B, D)."""
        before = None if memory is None else (memory[0][None].contiguous(), memory[1][None].contiguous())  # cuDNN takes no expanded ones
        outputs, (_, cell) = self.lstm(features, before)
        return outputs.float(), cell[0].float()
