"""Half-precision torsos for processors with AVX-512 FP16, which multiply twice as many halves as float32 numbers (`agents.half_kernel`)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numba import config, set_num_threads
from torch import Tensor, nn

from agents import half_kernel
from agents.half_kernel import LONGEST_SUM
from agents.half_writer import LANES, native
from agents.nets import Seen, Torso, torso
from envs.api import UserError

PARTS = 4  # in which a batch is cut where its gradients are added up, whatever the threads
CHUNKS = (64, 32)  # products that are added up in half precision
TALLEST = 12  # tiles of so many rows keep their sums in registers
PATCH = 4  # the side of the patches of pixels that the first layer sees as channels
WEIGHT_SCALE = 256 / 255  # of the first layer: its pixels, exact as halves, come divided by 256 and are meant to be divided by 255
LARGEST_SLOPE = 4.0  # gradients are scaled so that none is larger: far from 65504, even summed, and far above what vanishes


def fastest_torso(obs_shape: tuple[int, int, int], frames: int, precision: str, device: torch.device) -> Torso | HalfTorso:
    """The torso of these frames (`agents.nets.torso`), in half precision where that is asked for or, with `auto`, fast and possible.

    UserError where precision is float16 and there are no kernels.
    """
    plain = torso(obs_shape, frames)
    if precision == "float16" or (precision == "auto" and device.type == "cpu" and half_is_fast()):
        if device.type == "cpu" and half_layers(plain, obs_shape) is not None:
            return HalfTorso(plain, obs_shape)
        if precision == "float16":
            raise UserError("agent.precision=float16 is for frames of 84x84 on a CPU; agent.precision=auto takes what is fast")
    return plain


def half_is_fast() -> bool:
    """Whether this processor has AVX-512 FP16 and nothing better (AMX tiles, which multiply bfloat16)."""
    return native() and not torch.cpu._is_amx_tile_supported()


def share_threads() -> None:
    """As many threads for the kernels as torch has, and no more for torch: numba's start gives OpenMP, which both use, all processors."""
    threads = torch.get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


class HalfConvolution:
    """A convolution without padding, followed by a ReLU, of images that lie channels last, (B, H, W, C) in half precision.

    Images, weights and gradients on their way down are halves; sums are float32 but for the last 64 to 128 products; biases and the
    gradients of weights are float32. `fits` says what there are kernels for.

    Args:
        channels: C, of the input.
        outputs: O, channels of the output.
        kernel: its side.
        stride: in both directions.
        size: rows and columns of the input.
    """

    def __init__(self, channels: int, outputs: int, kernel: int, stride: int, size: tuple[int, int]) -> None:
        assert self.fits(channels, outputs, kernel, stride, size)
        self.channels, self.outputs, self.kernel, self.stride, self.size = channels, outputs, kernel, stride, size
        self.out_size = (size[0] - kernel) // stride + 1, (size[1] - kernel) // stride + 1
        self.taps = kernel // stride
        self.border = self.taps - 1  # of zeros around the output's gradient, which the input's is made of
        wide = self.out_size[1] + 2 * self.border
        self._chunk, self._back_chunk = _chunk(kernel * channels), _chunk(self.taps * outputs)
        self._offsets = _offsets(kernel, kernel * channels, size[1] * channels, self._chunk)
        self._back_offsets = _offsets(self.taps, self.taps * outputs, wide * outputs, self._back_chunk)

    @staticmethod
    def fits(channels: int, outputs: int, kernel: int, stride: int, size: tuple[int, int]) -> bool:
        """Whether there are kernels for it: channels in 32s, 32 or 64 outputs, windows that divide into strides and fill the input."""
        exact = kernel % stride == 0 and all(side >= kernel and (side - kernel) % stride == 0 for side in size)
        return exact and channels % LANES == 0 and outputs in (LANES, 2 * LANES)

    def packed(self, weight: Tensor) -> Tensor:
        """(O, C, kernel, kernel) -> half (kernel, kernel, C, O)."""
        return weight.permute(2, 3, 1, 0).to(torch.float16, memory_format=torch.contiguous_format)

    def turned(self, weight: Tensor) -> Tensor:
        """(O, C, kernel, kernel) -> half (stride, stride, taps, taps, O, C), the windows turned around."""
        classes = weight.view(self.outputs, self.channels, self.taps, self.stride, self.taps, self.stride).flip(2, 4)
        return classes.permute(3, 5, 2, 4, 0, 1).to(torch.float16, memory_format=torch.contiguous_format)

    def forward(self, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """half (B, H, W, C), `packed` weights and float32 biases -> half (B, OH, OW, O)."""
        (high, wide), row = self.out_size, 2 * self.stride * images.stride(1)
        out = torch.empty(images.shape[0], high, wide, self.outputs, dtype=torch.float16)
        half_kernel.convolution(_tile(wide), self.outputs // LANES, self._chunk, 0)(
            images.shape[0], high, wide,
            images.data_ptr(), 2 * images.stride(0), row, 2 * self.stride * self.channels, self._offsets.data_ptr(), len(self._offsets),
            weight.data_ptr(), 0, out.data_ptr(), 2 * out.stride(0), 2 * out.stride(1), 2 * self.outputs, bias.data_ptr(), 0, 0, 0,
        )  # fmt: skip
        return out

    def slopes(self, count: int) -> tuple[Tensor, Tensor]:
        """Zeros half (B, OH + 2 border, OW + 2 border, O) for the output's gradient, and the view (B, OH, OW, O) within the border."""
        high, wide = (side + 2 * self.border for side in self.out_size)
        whole = torch.zeros(count, high, wide, self.outputs, dtype=torch.float16)
        return whole, whole[:, self.border : high - self.border, self.border : wide - self.border]

    def backward_images(self, slopes: Tensor, weight: Tensor, images: Tensor, out: Tensor) -> None:
        """Writes the gradient of `images`, 0 where they are, into `out` half (B, H, W, C), whose last dimension must be contiguous.

        The inputs fall into stride x stride classes, each with a convolution of its own over the output's gradient.

        Args:
            slopes: whole, as `self.slopes` makes them.
            weight: as `turned` makes it.
        """
        stride, (high, wide) = self.stride, (side // self.stride for side in self.size)
        run = half_kernel.convolution(_tile(wide), self.channels // LANES, self._back_chunk, 1)
        for y in range(stride):
            for x in range(stride):
                places = [
                    (
                        at.data_ptr() + 2 * (y * at.stride(1) + x * at.stride(2)),
                        2 * at.stride(0),
                        *(2 * stride * at.stride(n) for n in (1, 2)),
                    )
                    for at in (out, images)
                ]
                run(images.shape[0], high, wide,
                    slopes.data_ptr(), 2 * slopes.stride(0), 2 * slopes.stride(1), 2 * self.outputs,
                    self._back_offsets.data_ptr(), len(self._back_offsets), weight[y, x].data_ptr(), 0, *places[0], *places[1])  # fmt: skip

    def backward_weight(self, inside: Tensor, images: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """`factor` times the gradients of weight float32 (O, C, kernel, kernel) and bias (O), from the output's half (B, OH, OW, O)."""
        (high, wide), segment, vectors = self.out_size, self.kernel * self.channels, self.outputs // LANES
        lines = -(-high // -(-high * wide // LONGEST_SUM))
        sums = torch.zeros(PARTS, self.kernel * segment + 1, self.outputs)
        half_kernel.correlation(16 // vectors, vectors)(
            PARTS, images.shape[0], high, wide, lines, np.float32(factor),
            images.data_ptr(), 2 * images.stride(0), 2 * self.stride * images.stride(1), 2 * self.stride * self.channels,
            2 * images.stride(1), self.kernel, segment,
            inside.data_ptr(), 2 * inside.stride(0), 2 * inside.stride(1), 2 * self.outputs, _one().data_ptr(),
            sums.data_ptr(), 4 * sums.stride(0),
        )  # fmt: skip
        total = sums.sum(0)
        return total[:-1].view(self.kernel, self.kernel, self.channels, self.outputs).permute(3, 2, 0, 1), total[-1]


class HalfDense:
    """A dense layer followed by a ReLU, of inputs half (B, inputs).

    Args:
        inputs: a multiple of 64.
        outputs: a multiple of 64.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        assert self.fits(inputs, outputs)
        self.inputs, self.outputs, self.blocks = inputs, outputs, outputs // (2 * LANES)
        self._offsets = _offsets(1, inputs, 0, 64)

    @staticmethod
    def fits(inputs: int, outputs: int) -> bool:
        """Whether there are kernels for it."""
        return inputs % 64 == 0 and outputs % 64 == 0

    def packed(self, weight: Tensor) -> Tensor:
        """float32 (outputs, inputs) -> half (outputs / 64, inputs, 64)."""
        weight, out = weight.t().contiguous(), torch.empty(self.blocks, self.inputs, 2 * LANES, dtype=torch.float16)
        half_kernel.narrow(self.inputs, self.blocks, weight.data_ptr(), out.data_ptr())
        return out

    def forward(self, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """half (B, inputs), `packed` weights and float32 biases -> half (B, outputs)."""
        count = images.shape[0]
        out = torch.empty(count, self.outputs, dtype=torch.float16)
        half_kernel.convolution(_at_once(count), 2, 64, 0)(
            self.blocks, 1, count, images.data_ptr(), 0, 0, 2 * self.inputs, self._offsets.data_ptr(), len(self._offsets),
            weight.data_ptr(), 2 * weight.stride(0), out.data_ptr(), 4 * LANES, 0, 2 * self.outputs, bias.data_ptr(), 8 * LANES, 0, 0,
        )  # fmt: skip
        return out

    def backward_images(self, slopes: Tensor, weight: Tensor, images: Tensor, out: Tensor) -> None:
        """Writes the gradient of `images` half (B, H, W, C), the inputs, 0 where they are, into `out` half (B, H, W, C), which may lie
        within a border. `slopes` is the outputs' gradient, half (B, outputs)."""
        count, _, wide, channels = images.shape
        half_kernel.dense_images(min(4, _at_once(count)))(
            count, wide, channels, self.inputs, self.blocks, weight.data_ptr(), slopes.data_ptr(), images.data_ptr(),
            out.data_ptr(), 2 * out.stride(0), 2 * out.stride(1),
        )  # fmt: skip

    def backward_weight(self, slopes: Tensor, images: Tensor, factor: float) -> Tensor:
        """`factor` times the gradient of the weight, float32 (outputs, inputs), inputs outermost in memory."""
        out = torch.empty(self.inputs, self.outputs)
        half_kernel.dense_weight(
            slopes.shape[0], LONGEST_SUM, self.inputs, self.blocks, images.data_ptr(), slopes.data_ptr(), np.float32(factor), out.data_ptr()
        )
        return out.t()


class HalfTorso(nn.Module):
    """A `Torso` of patches whose layers are multiplied in half precision; its parameters, and their gradients, stay float32.

    It has the parameters of the torso that it is made of, and its face. What it computes differs by what rounding to 11 bits does: less
    than with bfloat16, which has 8. The gradient on its way down is scaled by a power of two, so that halves neither vanish nor overflow.
    Halves of the parameters are kept: `refresh` must be called when the parameters have changed.
    """

    def __init__(self, torso: Torso, obs_shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers = half_layers(torso, obs_shape)
        assert layers is not None
        self.torso, self.features = torso, torso.features
        self.layers, self.dense = layers, HalfDense(torso.hidden.in_features, torso.hidden.out_features)
        self._packed: list[Tensor] = []

    def refresh(self) -> None:
        """The parameters have changed."""
        self._packed = []

    def forward(self, frames: Tensor) -> Tensor:
        return self.recall(self.look(frames))

    @torch.no_grad()
    def look(self, frames: Tensor) -> Seen:
        """See `Torso.look`; pixels and maps are halves."""
        share_threads()
        images, hidden = pixels(frames), self.torso.hidden
        weights = self.packed()
        seen = {"pixels": images.permute(0, 3, 1, 2)}
        for index, (layer, part) in enumerate(zip(self.layers, _convolutions(self.torso))):
            assert part.bias is not None
            images = layer.forward(images, weights[index], part.bias)
            seen[f"map{index + 1}"] = images.permute(0, 3, 1, 2)
        return seen | {"features": self.dense.forward(images.flatten(1), weights[-1], hidden.bias).float()}

    def recall(self, seen: Seen) -> Tensor:
        """See `Torso.recall`."""
        parameters = [parameter for part in (*_convolutions(self.torso), self.torso.hidden) for parameter in (part.weight, part.bias)]
        features: Tensor = _HalfRecall.apply(self, *seen.values(), *parameters)
        return features

    def packed(self) -> list[Tensor]:
        """The layers' weights as their kernels want them, the dense layer's last."""
        if not self._packed:
            weights = [part.weight.detach() for part in _convolutions(self.torso)]
            weights[0] = weights[0] * WEIGHT_SCALE
            self._packed = [layer.packed(weight) for layer, weight in zip(self.layers, weights)]
            self._packed.append(self.dense.packed(self.torso.hidden.weight.detach()))
        return self._packed


class _HalfRecall(torch.autograd.Function):
    """The backward pass of a HalfTorso."""

    @staticmethod
    def forward(ctx: Any, torso: HalfTorso, *tensors: Tensor) -> Tensor:
        ctx.torso, ctx.dense_weight = torso, torso.packed()[-1]
        ctx.save_for_backward(*tensors)
        return tensors[len(torso.layers) + 1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layers, dense, (gradient,) = ctx.torso.layers, ctx.torso.dense, gradients
        (*maps, features), parameters = ctx.saved_tensors[: len(layers) + 2], ctx.saved_tensors[len(layers) + 2 :]
        images, weights = [seen.permute(0, 2, 3, 1) for seen in maps], parameters[0::2]
        gradient = torch.ops.aten.threshold_backward(gradient, features, 0)
        scale = _scale(gradient)
        slopes = gradient.mul(scale).to(torch.float16)
        found = [gradient.sum(0), dense.backward_weight(slopes, images[-1].flatten(1), 1 / scale)]
        whole, inside = layers[-1].slopes(len(features))
        dense.backward_images(slopes, ctx.dense_weight, images[-1], inside)
        for index in reversed(range(len(layers))):
            of_weight, of_bias = layers[index].backward_weight(inside, images[index], 1 / scale)
            found += [of_bias, of_weight if index else of_weight * WEIGHT_SCALE]
            if index:
                turned, (whole_below, below) = layers[index].turned(weights[index]), layers[index - 1].slopes(len(features))
                layers[index].backward_images(whole, turned, images[index], below)
                whole, inside = whole_below, below
        return (None, *[None] * (len(layers) + 2), *reversed(found))


def half_layers(torso: Torso, obs_shape: tuple[int, int, int]) -> list[HalfConvolution] | None:
    """The convolutions of a torso in half precision, or None where there are no kernels for it."""
    convolutions, hidden = _convolutions(torso), torso.hidden
    channels, size = convolutions[0].in_channels, (obs_shape[1] // PATCH, obs_shape[2] // PATCH)
    if channels % (PATCH**2 * obs_shape[0]):
        return None
    found: list[HalfConvolution] = []
    for layer in convolutions:
        knobs = channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], size
        if layer.padding != (0, 0) or not HalfConvolution.fits(*knobs):
            return None
        found.append(HalfConvolution(*knobs))
        channels, size = layer.out_channels, found[-1].out_size
    dense = hidden.in_features == channels * size[0] * size[1] and HalfDense.fits(hidden.in_features, hidden.out_features)
    return found if dense else None


def _convolutions(torso: Torso) -> list[nn.Conv2d]:
    return cast(list[nn.Conv2d], list(torso.convolutions))


def pixels(frames: Tensor) -> Tensor:
    """uint8 (B, K, C, H, W) -> half (B, H // 4, W // 4, 16 K C): patches as `agents.nets.patches` orders them, divided by 256."""
    frames = frames.contiguous()
    count, stack, channels, high, wide = frames.shape
    out = torch.empty(count, high // PATCH, wide // PATCH, stack * channels * PATCH**2, dtype=torch.float16)
    half_kernel.halve(count, stack * channels, high // PATCH, wide // PATCH,
                      frames.data_ptr(), stack * channels * high * wide, high * wide, wide, out.data_ptr())  # fmt: skip
    return out


def _chunk(segment: int) -> int:
    return next(chunk for chunk in CHUNKS if segment % chunk == 0)


def _at_once(count: int) -> int:
    """Samples of a dense layer's tile; few kinds, each of which takes seconds to compile."""
    return 8 if count >= 8 else 4 if count >= 4 else 1


def _tile(wide: int) -> int:
    """Columns of a tile: as many as make the fewest tiles of a row, evenly."""
    return -(-wide // -(-wide // TALLEST))


def _offsets(rows: int, segment: int, row: int, chunk: int) -> Tensor:
    """Bytes from a window's first input to each of its chunks, int64."""
    return torch.tensor([2 * (line * row + place) for line in range(rows) for place in range(0, segment, chunk)])


@cache
def _one() -> Tensor:
    return torch.ones(1, dtype=torch.float16)


def _scale(gradient: Tensor) -> float:
    """The power of two that brings the largest of `gradient` to half of LARGEST_SLOPE or more, and not above it."""
    largest = float(gradient.abs().amax())
    return math.ldexp(LARGEST_SLOPE, -math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0
