"""Networks that agents share: a torso from stacked frames to features, linear heads, a recurrent core. Pixels arrive as uint8."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from envs.api import UserError

NATURE_LEAST_SIDE = 36
SMALL_SIDE = 12  # of the largest frame that the small torso looks at without striding
RELU_GAIN = math.sqrt(2.0)

Seen = dict[str, Tensor]
"""What a torso made of B stacks: `pixels` uint8, `map1`, `map2`, ... (after each convolution's ReLU) and `features`; all lead with B."""


def torso(obs_shape: tuple[int, int, int], frames: int) -> Torso:
    """The network below the heads: uint8 (B, K, C, H, W) -> float (B, features), after a ReLU.

    Frames whose sides are 36 or more get the network of Mnih et al. 2015 (32 8x8 stride 4, 64 4x4 stride 2, 64 3x3 stride 1, 512 units);
    smaller ones, which toys have, 32 3x3, 32 3x3 (of stride 2 while a side is above 12) and 128 units.

    Args:
        obs_shape: (C, H, W) of one frame.
        frames: K, how many frames are stacked.
    """
    if frames < 1:
        raise UserError(f"agent.stack_frames must be at least 1, got {frames}")
    channels, height, width = obs_shape
    if min(height, width) >= NATURE_LEAST_SIDE:
        # 8x8 kernels of stride 4 are 2x2 kernels of stride 1 over patches of 4x4 pixels: the same sums, in the order that memory likes
        layers = [nn.Conv2d(16 * frames * channels, 32, 2), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3)]
        return Torso(layers, (height // 4, width // 4), features=512, patch=4)
    strides = [1 if max(height, width) <= SMALL_SIDE else 2, 1 if max(height, width) <= 2 * SMALL_SIDE else 2]
    layers = [nn.Conv2d(frames * channels, 32, 3, strides[0], 1), nn.Conv2d(32, 32, 3, strides[1], 1)]
    return Torso(layers, (height, width), features=128, patch=1)


class Torso(nn.Module):
    """Convolutions and one hidden layer, each with a ReLU: uint8 (B, K, C, H, W) -> (B, features) in the dtype of the parameters.

    `forward` is `recall(look(frames))`. An agent that has looked once while it acted can recall what it saw, and differentiate it, without
    looking again, as long as the parameters are the same. The backward pass is written by hand; it can be differentiated once.

    Weights are orthogonal, as in the A2C baselines, and biases 0. The division of pixels by 255 is taken into the first layer's weights.

    Args:
        layers: the convolutions, the first for patches of pixels as channels.
        size: rows and columns of patches.
        features: of the hidden layer.
        patch: the side of a patch.
    """

    def __init__(self, layers: list[nn.Conv2d], size: tuple[int, int], features: int, patch: int) -> None:
        super().__init__()
        self.features, self._patch = features, patch
        self.convolutions = nn.ModuleList(layers)
        for layer in layers:
            pad, stride, kernel = int(layer.padding[0]), layer.stride[0], layer.kernel_size[0]
            size = (size[0] + 2 * pad - kernel) // stride + 1, (size[1] + 2 * pad - kernel) // stride + 1
        self.hidden = nn.Linear(layers[-1].out_channels * size[0] * size[1], features)
        for part in (*layers, self.hidden):
            orthogonal(part, RELU_GAIN)
        for layer in layers:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        self.hidden.weight.data = self.hidden.weight.data.t().contiguous().t()  # inputs outermost: a quarter faster for few frames

    def forward(self, frames: Tensor) -> Tensor:
        return self.recall(self.look(frames))

    def refresh(self) -> None:
        """To be called when the parameters have changed; here nothing hangs on it."""

    @torch.no_grad()
    def look(self, frames: Tensor) -> Seen:
        """All that the torso makes of uint8 (B, K, C, H, W), without a gradient; maps lie channels last in memory."""
        pixels = patches(frames, self._patch)
        seen, x = {"pixels": pixels}, pixels.to(self.hidden.weight.dtype)
        for index, layer in enumerate(self.convolutions):
            assert isinstance(layer, nn.Conv2d)
            weight = layer.weight / 255 if index == 0 else layer.weight
            x = nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding).relu_()
            seen[f"map{index + 1}"] = x
        seen["features"] = self.hidden(_rows(x)).relu_()
        return seen

    def recall(self, seen: Seen) -> Tensor:
        """The features (B, features) of what was seen with the present parameters, now with a gradient."""
        parameters = [parameter for part in (*self.convolutions, self.hidden) for parameter in (part.weight, part.bias)]
        features: Tensor = _Recall.apply(self, *seen.values(), *parameters)
        return features


class _Recall(torch.autograd.Function):
    """The backward pass of a Torso. Each weight's gradient lies in memory as the weight does."""

    @staticmethod
    def forward(ctx: Any, torso: Torso, *tensors: Tensor) -> Tensor:
        ctx.torso, ctx.layers = torso, len(torso.convolutions)
        ctx.save_for_backward(*tensors)
        return tensors[ctx.layers + 1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, (gradient,) = ctx.layers, gradients
        (pixels, *maps, features), parameters = ctx.saved_tensors[: count + 2], ctx.saved_tensors[count + 2 :]
        inputs, weights = [pixels.to(features.dtype), *maps], parameters[0::2]
        threshold, convolve = torch.ops.aten.threshold_backward, torch.ops.aten.convolution_backward
        gradient = threshold(gradient, features, 0)
        found = [gradient.sum(0), (_rows(maps[-1]).t() @ gradient).t()]
        gradient = (gradient @ weights[-1]).unflatten(1, (*maps[-1].shape[2:], -1)).permute(0, 3, 1, 2)
        for index in reversed(range(count)):
            layer = ctx.torso.convolutions[index]
            gradient = threshold(gradient, maps[index], 0)
            shape = [layer.out_channels], layer.stride, layer.padding, (1, 1), False, (0, 0), 1
            gradient, of_weight, of_bias = convolve(gradient, inputs[index], weights[index], *shape, (index > 0, True, True))
            found += [of_bias, of_weight if index else of_weight / 255]
        return (None, *[None] * (count + 2), *reversed(found))


def _rows(maps: Tensor) -> Tensor:
    """(B, C, H, W), channels last in memory -> (B, H * W * C), a view."""
    return maps.permute(0, 2, 3, 1).flatten(1)


class Recurrent(nn.Module):
    """An LSTM or a GRU over T steps of N lanes, with orthogonal weights and zero biases.

    Its state is float32 (N, S, units): the output and the cell of an LSTM (S = 2), the output alone of a GRU (S = 1).
    """

    def __init__(self, kind: str, features: int, units: int = 256) -> None:
        super().__init__()
        self.units = units
        self.rows = 2 if kind == "lstm" else 1
        self.cell = nn.LSTMCell(features, units) if kind == "lstm" else nn.GRUCell(features, units)
        orthogonal(self.cell, 1.0)

    def forward(self, features: Tensor, state: Tensor, opens: Tensor) -> tuple[Tensor, Tensor]:
        """Args: (T, N, features), float32 (N, S, units), bool (T, N), where the state is replaced by zeros before the step.

        Returns:
            Outputs (T, N, units) in the dtype of the features, and the state after the last step.
        """
        outputs, memory = [], state.to(features.dtype)
        for feature, opening in zip(features, opens):
            memory = memory.masked_fill(opening.view(-1, 1, 1), 0)
            if self.rows == 2:
                memory = torch.stack(self.cell(feature, (memory[:, 0], memory[:, 1])), 1)
            else:
                memory = self.cell(feature, memory[:, 0]).unsqueeze(1)
            outputs.append(memory[:, 0])
        return torch.stack(outputs), memory.float()


class Head(nn.Linear):
    """(B, features) -> float32 (B, outputs), computed in float32 whatever the dtype of features and parameters: logits and values."""

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features.float(), self.weight.float(), self.bias.float())


def head(features: int, outputs: int, gain: float = 1.0) -> Head:
    """A linear layer with orthogonal weights of `gain` and zero biases. The baselines take 0.01 for logits and 1 for values."""
    layer = Head(features, outputs)
    orthogonal(layer, gain)
    return layer


def orthogonal(layer: nn.Module, gain: float) -> None:
    """Draws orthogonal weights (Saxe et al. 2014, rows of the flattened matrix) from torch's default generator; biases 0."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name.startswith("weight"):
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)


def patches(frames: Tensor, side: int) -> Tensor:
    """uint8 (B, K, C, H, W) -> (B, K * C * side^2, H // side, W // side), channels last in memory; rows and columns beyond are left out.

    Patches of 4x4 are moved in words of four bytes, one frame of the stack after the other: ten times faster than byte by byte.
    """
    batch, stack, channels, height, width = frames.shape
    rows, columns = height // side, width // side
    cut = frames[..., : rows * side, : columns * side].reshape(batch, stack * channels, rows, side, columns * side)
    if side != 4:
        blocks = cut.unflatten(4, (columns, side)).permute(0, 2, 4, 1, 3, 5)
        return blocks.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    words = cut.contiguous().view(torch.int32)  # (B, K * C, rows, side, columns)
    blocks = torch.cat([words[:, plane].transpose(2, 3) for plane in range(stack * channels)], 3)
    return blocks.view(torch.uint8).permute(0, 3, 1, 2)
