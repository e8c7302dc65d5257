"""A network for simulators that keeps places apart: what moves is small, and a vector for the whole picture learns it last."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from generative.nets import FIRST_OUTPUT_STD, Patches, Unpatch

SCALES = 3
SMALLEST_SIDE = 4
PATCHED_SIDE = 32  # frames of so many pixels and more are cut into 4x4 patches


class Block(nn.Module):
    """Adds two 3x3 convolutions of what it is given (He et al. 2016, arXiv 1603.05027). The last starts at 0: at first nothing is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        added: Tensor = maps + self.layers(maps)
        return added


class PlacewiseTransform(nn.Module):
    """Adds W_dec (W_enc h * W_act a) + b to the vector h of every place (Oh et al. 2015, section 3.2, there for one vector)."""

    def __init__(self, channels: int, num_actions: int) -> None:
        super().__init__()
        self.encode_factors = nn.Conv2d(channels, channels, 1, bias=False)
        self.act_factors = nn.Embedding(num_actions, channels)  # a row is W_act a
        self.decode_factors = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor, actions: Tensor) -> Tensor:
        """float (B, D, h, w), int64 (B) -> float (B, D, h, w)."""
        changed: Tensor = maps + self.decode_factors(self.encode_factors(maps) * self.act_factors(actions)[:, :, None, None])
        return changed


class PlacewiseNoAction(nn.Module):
    """The same without the action: one linear layer a place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor, actions: Tensor) -> Tensor:
        """float (B, D, h, w), int64 (B) -> float (B, D, h, w)."""
        changed: Tensor = maps + self.layer(maps)
        return changed


class LocalBody(nn.Module):
    """Stacked frames and an action to the change of the last frame, and a vector that tells of the step.

    Patches of 4x4 pixels as places; up to two halvings, on the coarsest of which every place sees all others through one linear layer; and
    back, each scale joined by what was seen at it on the way (Ronneberger et al. 2015, arXiv 1505.04597). The action comes in at the
    coarsest and at the finest scale.

    Args:
        frames: K.
        obs_shape: (C, H, W).
        num_actions: A; 0 for a baseline that does not see the action.
        width: channels of the finest scale; the others have half as many again.
    """

    def __init__(self, frames: int, obs_shape: tuple[int, int, int], num_actions: int, width: int = 64) -> None:
        super().__init__()
        channels, height, across = obs_shape
        patch = 4 if min(height, across) >= PATCHED_SIDE else 1
        sizes = [(math.ceil(height / patch), math.ceil(across / patch))]
        while len(sizes) < SCALES and min(sizes[-1]) > SMALLEST_SIDE:
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        widths, (rows, columns) = (width, *[width * 3 // 2] * (len(sizes) - 1)), sizes[-1]
        self.channels, self.sizes = channels, sizes
        self.patches = Patches(patch)
        self.enter = nn.ModuleList(
            [nn.Conv2d(frames * channels * patch**2, widths[0], 3, padding=1)]
            + [nn.Conv2d(here, there, 3, stride=2, padding=1) for here, there in pairwise(widths)]
        )
        self.descend = nn.ModuleList([Block(depth) for depth in widths])
        self.ascend = nn.ModuleList([Block(depth) for depth in widths])
        self.spread = nn.ModuleList([nn.Conv2d(there, 4 * here, 1) for here, there in pairwise(widths)])
        self.together = nn.Linear(widths[-1] * rows * columns, widths[-1])

        def transform(depth: int) -> nn.Module:
            return PlacewiseTransform(depth, num_actions) if num_actions else PlacewiseNoAction(depth)

        self.fine, self.coarse = transform(widths[0]), transform(widths[-1])
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv2d(widths[0], channels * patch**2, 3, padding=1), Unpatch(patch, (height, across)))
        nn.init.normal_(next(self.leave.parameters()), std=FIRST_OUTPUT_STD)
        self.features = widths[-1] * rows * columns + 2 * widths[0]

    def forward(self, images: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, K * C, H, W), int64 (B) -> images float32 (B, C, H, W), float (B, features)."""
        maps, seen = self.patches(images), []
        for enter, block in zip(self.enter, self.descend):
            maps = block(enter(maps))
            seen.append(maps)
        everywhere: Tensor = self.together(maps.relu().flatten(1))
        maps = self.ascend[-1](self.coarse(maps + everywhere[:, :, None, None], actions))
        coarsest = maps
        for level in range(len(seen) - 2, -1, -1):
            rows, columns = self.sizes[level]
            finer = nn.functional.pixel_shuffle(self.spread[level](maps), 2)[..., :rows, :columns] + seen[level]
            maps = self.ascend[level](self.fine(finer, actions) if level == 0 else finer)
        if len(seen) == 1:
            maps = self.fine(maps, actions)
        change = self.leave(maps).float()
        told = torch.cat((coarsest.relu().flatten(1), maps.relu().mean((2, 3)), maps.relu().amax((2, 3))), 1)
        return images[:, -self.channels :].float() + change, told
