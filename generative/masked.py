"""Networks that predict each pixel of a grey frame from those before it, in raster order: the slim one of counts, and the deep one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.api import UserError

LANES = 16


def gate(x: Tensor) -> Tensor:
    """(B, 2p, ...) -> (B, p, ...): tanh of the first half times sigmoid of the second (van den Oord et al. 2016, equation 2)."""
    signal, opening = x.chunk(2, 1)
    return torch.tanh(signal) * torch.sigmoid(opening)


def _draw(logits: Tensor) -> Tensor:
    """float (n, L) -> int64 (n), drawn with torch's default generator."""
    return torch.multinomial(torch.softmax(logits.double(), 1), 1)[:, 0]


class SlimNet(nn.Module):
    """The slim PixelCNN of Ostrovski et al. 2017: one wide masked convolution, then 1x1 convolutions alone.

    A 7x7 masked convolution to 16 planes, two gated residual blocks (1x1 to twice the planes, gate, 1x1), a rectifier, 1x1 to 64
    planes, a rectifier, 1x1 to the logits. The convolution sees levels one-hot, and cells beyond the border as a level of their
    own: it is a sum of rows of a table, one a cell of the context. A pixel depends on nothing beyond its context of 24 cells.

    All parameters lie in one flat vector, so that a compiled kernel takes them, and an optimiser steps them, as one.

    Args:
        levels: grey levels.
        kernel: side of the convolution, 3, 5 or 7.
        blocks: residual blocks.
        planes: of the blocks; a multiple of 16, the lanes of the kernel's vectors.
        head_planes: of the layer before the logits; likewise.
    """

    def __init__(self, levels: int, kernel: int = 7, blocks: int = 2, planes: int = 16, head_planes: int = 64) -> None:
        super().__init__()
        if kernel not in (3, 5, 7):
            raise UserError(f"first_kernel of the slim network is one of 3, 5, 7, got {kernel}")
        if blocks < 0 or planes < 1 or head_planes < 1 or planes % LANES or head_planes % LANES:
            words = f"blocks >= 0, planes and head_planes in multiples of {LANES}"
            raise UserError(f"the slim network needs {words}, got {blocks}, {planes} and {head_planes}")
        self.levels, self.planes, self.reach = levels, planes, kernel // 2
        self.cells = 2 * self.reach * (self.reach + 1)
        table = self.cells * (levels + 1) * planes
        self.layers: list[tuple[int, int, int, int]] = []  # places of matrix (in, out) and bias, in, out
        size = table + planes
        for inner, outer in [(planes, 2 * planes), (planes, planes)] * blocks + [(planes, head_planes), (head_planes, levels)]:
            self.layers.append((size, size + inner * outer, inner, outer))
            size += inner * outer + outer
        weights = torch.zeros(size)
        weights[:table] = torch.randn(table) / math.sqrt(self.cells)
        for matrix, bias, inner, _ in self.layers:
            weights[matrix:bias] = torch.randn(bias - matrix) / math.sqrt(inner)
        self.weights = nn.Parameter(weights)

    def contexts(self, shown: Tensor) -> Tensor:
        """Levels (B, H, W) -> int64 (B * H * W, cells): rows from above, each from the left; beyond the border, `levels`."""
        height, width = shown.shape[1:]
        padded = functional.pad(shown.long(), (self.reach, self.reach, self.reach, 0), value=self.levels)
        places = [(i, j) for i in range(self.reach + 1) for j in range(2 * self.reach + 1)][: self.cells]
        return torch.stack([padded[:, i : i + height, j : j + width] for i, j in places], -1).flatten(0, 2)

    def predict(self, contexts: Tensor) -> Tensor:
        """int64 (N, cells) -> logits (N, levels)."""
        rows, size = self.levels + 1, self.layers[0][0] - self.planes
        entries = contexts + rows * torch.arange(self.cells, device=contexts.device)
        table, bias = self.weights[:size].view(-1, self.planes), self.weights[size : size + self.planes]
        x = functional.embedding_bag(entries, table, mode="sum") + bias
        for block in range(0, len(self.layers) - 2, 2):
            x = x + self._dense(gate(self._dense(x, block)), block + 1)
        return self._dense(torch.relu(self._dense(torch.relu(x), -2)), -1)

    def forward(self, shown: Tensor) -> Tensor:
        """Levels (B, H, W) -> logits (B, H, W, levels)."""
        return self.predict(self.contexts(shown)).unflatten(0, tuple(shown.shape))

    @torch.no_grad()
    def walk(self, n: int, height: int, width: int, pick: Callable[[Tensor], Tensor] = _draw) -> Tensor:
        """int64 (n, height, width), pixel by pixel; `pick` gets a pixel's logits (n, levels) and gives its level (n)."""
        reach = self.reach
        cells = torch.full((n, height + reach, width + 2 * reach), self.levels, dtype=torch.int64, device=self.weights.device)
        for i in range(height):
            for j in range(width):
                context = cells[:, i : i + reach + 1, j : j + 2 * reach + 1].flatten(1)[:, : self.cells]
                cells[:, i + reach, j + reach] = pick(self.predict(context))
        return cells[:, reach:, reach : reach + width].contiguous()

    def _dense(self, x: Tensor, layer: int) -> Tensor:
        matrix, bias, inner, outer = self.layers[layer]
        return x @ self.weights[matrix:bias].view(inner, outer) + self.weights[bias : bias + outer]


class StackedLayer(nn.Module):
    """A gated layer of two stacks (van den Oord et al. 2016, figure 2). Its vertical output at row i has seen rows up to i, its
    horizontal output rows above i, through the vertical one shifted down, and in row i the columns up to its own.

    Args:
        inputs: channels of both stacks' input; the first layer's is the frame, and its horizontal stack must not see the pixel itself.
    """

    def __init__(self, inputs: int, planes: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.first, self.wing = first, kernel // 2
        self.vertical = nn.Conv2d(inputs, 2 * planes, (self.wing + 1, kernel))
        self.horizontal = nn.Conv2d(inputs, 2 * planes, (1, self.wing if first else self.wing + 1))
        self.link = nn.Conv2d(2 * planes, 2 * planes, 1)
        self.out = nn.Conv2d(planes, planes, 1)

    def down(self, vertical: Tensor) -> Tensor:
        """(B, inputs, h, W) -> the vertical stack before its gate, (B, 2p, h, W)."""
        return self.vertical(functional.pad(vertical, (self.wing, self.wing, self.wing, 0)))

    def across(self, linked: Tensor, cells: Tensor, skip: Tensor) -> Tensor:
        """The horizontal output where the kernel's `cells` (B, inputs, h, w + kernel width - 1) and what is linked (B, 2p, h, w) meet."""
        x = self.out(gate(self.horizontal(cells) + linked))
        return x if self.first else x + skip

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        below = self.down(vertical)
        shifted = functional.pad(below, (0, 0, 1, 0))[:, :, :-1]
        cells = functional.pad(horizontal, (self.wing, -1 if self.first else 0))
        return gate(below), self.across(self.link(shifted), cells, horizontal)


class StackedNet(nn.Module):
    """The gated PixelCNN of van den Oord et al. 2016: every earlier pixel within reach is seen, no blind spot. For offline fitting.

    A layer of `first_kernel`, then layers of `kernel`, then a rectifier, 1x1, a rectifier and 1x1 to the logits. It sees levels one-hot;
    cells beyond the border have none. (Shown as numbers in [-1, 1] they take several times the updates.)

    Args:
        levels: grey levels.
        first_kernel: side of the first layer's masked convolutions, odd, at least 3.
        kernel: side of the others', likewise.
        blocks: layers, the first among them.
        planes: of each stack.
        head_planes: of the layer before the logits.
    """

    def __init__(
        self, levels: int, first_kernel: int = 7, kernel: int = 3, blocks: int = 8, planes: int = 32, head_planes: int = 128
    ) -> None:
        super().__init__()
        if min(first_kernel, kernel) < 3 or first_kernel % 2 == 0 or kernel % 2 == 0:
            raise UserError(f"first_kernel and kernel must be odd and at least 3, got {first_kernel} and {kernel}")
        if blocks < 1 or planes < 1 or head_planes < 1:
            raise UserError(f"blocks, planes and head_planes must be at least 1, got {blocks}, {planes} and {head_planes}")
        self.levels = levels
        sides = [first_kernel] + [kernel] * (blocks - 1)
        self.reach = sum(side // 2 for side in sides)
        self.planes = planes
        self.layers = nn.ModuleList(
            [StackedLayer(planes if index else levels, planes, side, not index) for index, side in enumerate(sides)]
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(planes, head_planes, 1), nn.ReLU(), nn.Conv2d(head_planes, levels, 1))

    def see(self, shown: Tensor) -> Tensor:
        """Levels (B, H, W) -> float32 (B, levels, H, W), one-hot."""
        return functional.one_hot(shown.long(), self.levels).permute(0, 3, 1, 2).float()

    def forward(self, shown: Tensor) -> Tensor:
        """Levels (B, H, W) -> logits (B, H, W, levels)."""
        return self.logits(self.see(shown))

    def logits(self, seen: Tensor) -> Tensor:
        """float (B, levels, H, W), as from `see` -> logits (B, H, W, levels)."""
        vertical = horizontal = seen
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        return self.head(horizontal).permute(0, 2, 3, 1)

    @torch.no_grad()
    def walk(self, n: int, height: int, width: int, pick: Callable[[Tensor], Tensor] = _draw) -> Tensor:
        """int64 (n, height, width), pixel by pixel; `pick` gets a pixel's logits (n, levels) and gives its level (n).

        The vertical stack runs once a row, over the rows within reach; the horizontal one keeps each layer's row and runs one pixel on.
        """
        device = next(self.parameters()).device
        shown = torch.zeros(n, height, width, dtype=torch.int64, device=device)
        for i in range(height):
            linked, layers = self._linked(shown, i), cast("list[StackedLayer]", list(self.layers))
            rows = [torch.zeros(n, layer.horizontal.in_channels, 1, layer.wing + width, device=device) for layer in layers]
            for j in range(width):
                x = torch.zeros(0, device=device)
                for layer, row, above in zip(layers, rows, linked):
                    if not layer.first:
                        row[..., layer.wing + j : layer.wing + j + 1] = x
                    x = layer.across(above[..., j : j + 1], row[..., j : j + layer.horizontal.kernel_size[1]], x)
                shown[:, i, j] = pick(self.head(x)[:, :, 0, 0])
                rows[0][..., layers[0].wing + j : layers[0].wing + j + 1] = self.see(shown[:, i : i + 1, j : j + 1])
        return shown

    def _linked(self, shown: Tensor, i: int) -> list[Tensor]:
        """What each layer's vertical stack tells the horizontal one about row i, (n, 2p, 1, W)."""
        linked, layers = [], cast("list[StackedLayer]", list(self.layers))
        vertical = self.see(shown[:, max(0, i - 1 - self.reach) : i])
        for layer in layers:
            if i == 0:
                linked.append(layer.link(torch.zeros(len(shown), 2 * self.planes, 1, shown.shape[2], device=shown.device)))
                continue
            below = layer.down(vertical)
            linked.append(layer.link(below[:, :, -1:]))
            vertical = gate(below)
        return linked
