"""Convolutional networks that image models share. Pixels arrive as floats, any size; no layer mixes frames of a batch."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from envs.api import UserError

PAPER_CHANNELS, PAPER_KERNELS = (32, 32, 64, 64), (4, 5, 5, 4)
SMALL_CHANNELS = (32, 64, 64)
SMALLEST_SIDE = 4
FIRST_OUTPUT_STD = 1e-3


def conv_sizes(height: int, width: int, kernels: tuple[int, ...]) -> list[tuple[int, int]]:
    """Spatial sizes before and after each unpadded stride-2 convolution. ValueError where a frame is too small for them."""
    sizes = [(height, width)]
    for kernel in kernels:
        sizes.append(((sizes[-1][0] - kernel) // 2 + 1, (sizes[-1][1] - kernel) // 2 + 1))
    if min(sizes[-1]) < 1:
        raise UserError(f"frames of {height}x{width} are too small for kernels {kernels} of stride 2")
    return sizes


def paper_encoder(obs_shape: tuple[int, int, int], outputs: int) -> nn.Module:
    """float (B, C, H, W) -> (B, outputs). Blundell et al. 2016, appendix A: four unpadded convolutions of stride 2, 512 hidden units."""
    channels, height, width = obs_shape
    *_, last = conv_sizes(height, width, PAPER_KERNELS)
    layers: list[nn.Module] = []
    for depth, kernel in zip(PAPER_CHANNELS, PAPER_KERNELS):
        layers += [nn.Conv2d(channels, depth, kernel, 2), nn.ReLU()]
        channels = depth
    flat = channels * last[0] * last[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 512), nn.ReLU(), nn.Linear(512, outputs))


def paper_decoder(latents: int, obs_shape: tuple[int, int, int], maps: int) -> nn.Module:
    """float (B, latents) -> (B, maps, H, W). The mirror of `paper_encoder` (Blundell et al. 2016, appendix A).

    The kernel of the paper's further transposed convolution, which gives the pixel's means and log-stds, is not stated: 1x1 here, the one
    that keeps 84x84 without padding. Where a frame's side does not divide evenly, the missing row is added on the far side.
    """
    _, height, width = obs_shape
    sizes = conv_sizes(height, width, PAPER_KERNELS)[::-1]
    channels = PAPER_CHANNELS[-1]
    layers: list[nn.Module] = [nn.Linear(latents, 512), nn.ReLU(), nn.Linear(512, channels * sizes[0][0] * sizes[0][1]), nn.ReLU()]
    layers += [nn.Unflatten(1, (channels, *sizes[0]))]
    for depth, kernel, (here, there) in zip(PAPER_CHANNELS[::-1], PAPER_KERNELS[::-1], pairwise(sizes)):
        extra = (there[0] - (here[0] - 1) * 2 - kernel, there[1] - (here[1] - 1) * 2 - kernel)
        layers += [nn.ConvTranspose2d(channels, depth, kernel, 2, output_padding=extra), nn.ReLU()]
        channels = depth
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, maps, 1))


def small_sizes(height: int, width: int) -> tuple[int, list[tuple[int, int]]]:
    """(patch, spatial sizes): frames of 32 pixels or more are cut into 4x4 patches; then two halvings at most, of sides above 4."""
    patch = 4 if min(height, width) >= 32 else 1
    sizes = [(math.ceil(height / patch), math.ceil(width / patch))]
    while len(sizes) < len(SMALL_CHANNELS) and min(sizes[-1]) > SMALLEST_SIDE:
        sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
    return patch, sizes


class Patches(nn.Module):
    """(B, C, H, W) -> (B, C * patch^2, ceil(H / patch), ceil(W / patch)); zeros fill what is missing on the far sides."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        padding = (0, -images.shape[-1] % self.patch, 0, -images.shape[-2] % self.patch)
        return nn.functional.pixel_unshuffle(nn.functional.pad(images, padding), self.patch)


class Unpatch(nn.Module):
    """(B, C * patch^2, h, w) -> (B, C, H, W), cut to `size` (H, W)."""

    def __init__(self, patch: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.size = patch, size

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(images, self.patch)[..., : self.size[0], : self.size[1]]


class Background(nn.Module):
    """Adds a learned picture (maps, H, W), zeros at first, so that what never moves costs the layers before nothing.

    The gain speeds it up: with Adam at 1e-3 it crosses from black to white in some 125 updates instead of 1,000. On Q*bert the small VAE
    reached the error of 500 updates without it in 250 with it.
    """

    GAIN = 8.0

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.zeros(shape))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.GAIN * self.picture


def keep_variance(network: nn.Sequential) -> nn.Sequential:
    """Draws all weights but the last layer's so that ReLU layers keep their inputs' variance (He et al. 2015, equation 10); biases 0.

    Torch's own draw shrinks the signal in every layer, and the latents of an autoencoder of ten then stay unused for hundreds of updates.
    """
    for layer in [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return network


def small_encoder(obs_shape: tuple[int, int, int], outputs: int, hidden: int = 256) -> nn.Module:
    """float (B, C, H, W) -> (B, outputs). Patches first, so that no convolution runs at full resolution; any size of frame."""
    channels, height, width = obs_shape
    patch, sizes = small_sizes(height, width)
    layers: list[nn.Module] = [Patches(patch)]
    channels *= patch**2
    for depth, stride in zip(SMALL_CHANNELS, [1] + [2] * (len(sizes) - 1)):
        layers += [nn.Conv2d(channels, depth, 3, stride, 1), nn.ReLU()]
        channels = depth
    flat = channels * sizes[-1][0] * sizes[-1][1]
    return keep_variance(nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, outputs)))


def small_decoder(latents: int, obs_shape: tuple[int, int, int], maps: int, hidden: int = 256) -> nn.Module:
    """float (B, latents) -> (B, maps, H, W). Doubles by 1x1 convolutions and pixel shuffles, cheaper than transposed convolutions.

    Its last weights start near 0: were its first pictures wild, a VAE would silence the noise of its latents for good, and they would not
    spread as its prior does (Q*bert at 250 updates: rate 77 nats instead of 123 at a higher bound).
    """
    _, height, width = obs_shape
    patch, sizes = small_sizes(height, width)
    depths = SMALL_CHANNELS[: len(sizes)]
    flat = depths[-1] * sizes[-1][0] * sizes[-1][1]
    layers: list[nn.Module] = [nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, flat), nn.ReLU()]
    layers += [nn.Unflatten(1, (depths[-1], *sizes[-1]))]
    for level in range(len(sizes) - 1, 0, -1):
        layers += [nn.Conv2d(depths[level], 4 * depths[level - 1], 1), Unpatch(2, sizes[level - 1]), nn.ReLU()]
    layers += [nn.Conv2d(depths[0], maps * patch**2, 3, padding=1), Unpatch(patch, (height, width))]
    nn.init.normal_(next(iter(layers[-2].parameters())), std=FIRST_OUTPUT_STD)
    return keep_variance(nn.Sequential(*layers, Background((maps, height, width))))


def normalise(frames: Tensor) -> Tensor:
    """uint8 (..., C, H, W) -> float32 in [0, 1], channels last in memory, where convolutions are fastest."""
    return (frames.to(torch.float32) / 255.0).contiguous(memory_format=torch.channels_last)


def to_pixels(images: Tensor) -> Tensor:
    """Floats, 0 black and 1 white, beyond which they are cut -> uint8, rounded to the nearest level."""
    return (images.detach().float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).contiguous()
