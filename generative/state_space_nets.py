"""Networks of state-space models: what a frame is seen as, how memory goes on, what it expects, and the picture that it makes.

Both bodies have one face. A memory h is float (B, *memory_shape), latents z are float (B, *places, numbers), their statistics float
(B, *places, statistics).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from generative.latents import Latents
from generative.local_nets import PATCHED_SIDE, SMALLEST_SIDE, Block
from generative.nets import FIRST_OUTPUT_STD, Patches, Unpatch

FIRST_UPDATE = -1.0  # of a GRU's update gate, before the sigmoid: at first memory is kept rather than replaced (as Hafner et al. have it)
LEAST_HALVED = 8  # sides that `Vector` halves
MOST_PLACES = 24  # a side, of `Places`
MOST_DOUBLINGS = 3  # of the channels


class Vector(nn.Module):
    """Memory and latents are one vector for the whole picture (Hafner et al. 2019, arXiv 1811.04551; 2023, arXiv 2301.04104).

    Strided convolutions to a last side below 8, one layer, a GRU with layer norms, and the way back. Theirs, but for sizes.

    Args:
        obs_shape: (C, H, W), any size.
        num_actions: A.
        latents: of z.
        memory: numbers of h.
        units: of every layer between.
        channels: of the finest convolution; each coarser one has twice as many, up to eight times.
    """

    places: tuple[int, ...] = ()

    def __init__(self, obs_shape: tuple[int, int, int], num_actions: int, latents: Latents, memory: int, units: int, channels: int) -> None:
        super().__init__()
        maps, height, width = obs_shape
        sizes = [(height, width)]
        while min(sizes[-1]) >= LEAST_HALVED:
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
        depths = [channels * 2 ** min(level, MOST_DOUBLINGS) for level in range(max(1, len(sizes) - 1))]
        flat = depths[-1] * sizes[-1][0] * sizes[-1][1]
        self.memory_shape, self.features = (memory,), memory + latents.numbers
        self.down = nn.Sequential(*_strided(maps, depths, len(sizes) > 1), nn.Flatten(), nn.Linear(flat, units))
        self.enter = nn.Linear(latents.numbers, units)
        self.act = nn.Linear(num_actions, units, bias=False)
        self.entered = nn.Sequential(nn.LayerNorm(units), nn.SiLU())
        self.gates = nn.Sequential(nn.Linear(units + memory, 3 * memory, bias=False), nn.LayerNorm(3 * memory))
        self.recall = nn.Linear(memory, units, bias=False)
        self.judge = nn.Sequential(nn.LayerNorm(units), nn.SiLU(), nn.Linear(units, latents.statistics))
        self.expect = nn.Sequential(nn.Linear(memory, units), nn.LayerNorm(units), nn.SiLU(), nn.Linear(units, latents.statistics))
        back = [nn.Linear(self.features, flat), nn.ReLU(), nn.Unflatten(1, (depths[-1], *sizes[-1]))]
        self.up = nn.Sequential(*back, *_widened(maps, depths, sizes))
        for layer in (*self.down, *self.up):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                _keep_variance(layer)
        nn.init.normal_(next(iter(self.up[-1].parameters())), std=FIRST_OUTPUT_STD)

    def see(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) -> what `posterior` takes of a frame, float (B, ...)."""
        seen: Tensor = self.down(images)
        return seen

    def advance(self, memory: Tensor, latents: Tensor, actions: Tensor) -> Tensor:
        """h after z and an action, float (B, A), one-hot or zeros where there was none."""
        entered = self.entered((self.enter(latents) + self.act(actions)).float())
        reset, update, candidate = self.gates(torch.cat((entered, memory), -1)).float().chunk(3, -1)
        return _gated(memory, reset, update, candidate)

    def posterior(self, memory: Tensor, seen: Tensor) -> Tensor:
        """Statistics of q(z | h, frame)."""
        statistics: Tensor = self.judge((self.recall(memory) + seen).float())
        return statistics.float()

    def prior(self, memory: Tensor) -> Tensor:
        """Statistics of p(z | h)."""
        statistics: Tensor = self.expect(memory)
        return statistics.float()

    def draw(self, memory: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(images float32 (B, C, H, W), what heads see (B, features))."""
        both = torch.cat((memory, latents), -1)
        return self.up(both).float(), both


class Places(nn.Module):
    """Memory and latents keep their places in the picture: a small thing is learned once for all of them.

    Patches of 4x4 pixels are places, halved until a side has 24 at most. A convolutional GRU (Shi et al. 2015, arXiv 1506.04214, have an
    LSTM) goes on by what is near; and, through one vector, by what is anywhere. An action scales and shifts channels.

    Args: as `Vector`, with `memory`, `units` and the latents' numbers a place. `channels`: of the encoder and the decoder.
    """

    def __init__(self, obs_shape: tuple[int, int, int], num_actions: int, latents: Latents, memory: int, units: int, channels: int) -> None:
        super().__init__()
        maps, height, width = obs_shape
        patch = 4 if min(height, width) >= PATCHED_SIDE else 1
        sizes = [(math.ceil(height / patch), math.ceil(width / patch))]
        while min(sizes[-1]) > MOST_PLACES:
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        self.places = sizes[-1]
        self.memory_shape = (memory, *self.places)
        down: list[nn.Module] = [Patches(patch), nn.Conv2d(maps * patch**2, channels, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(memory + latents.numbers, channels, 3, padding=1), Block(channels)]
        for here, _ in reversed(list(pairwise(sizes))):
            down += [nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1)]
            up += [nn.ReLU(), nn.Conv2d(channels, 4 * channels, 1), Unpatch(2, here)]
        self.down = nn.Sequential(*down, Block(channels), nn.ReLU(), nn.Conv2d(channels, units, 3, padding=1))
        self.up = nn.Sequential(*up, nn.ReLU(), nn.Conv2d(channels, maps * patch**2, 3, padding=1), Unpatch(patch, (height, width)))
        for layer in (*self.down, *self.up):
            if isinstance(layer, nn.Conv2d):
                _keep_variance(layer)
        nn.init.normal_(next(iter(self.up[-2].parameters())), std=FIRST_OUTPUT_STD)
        self.enter = nn.Conv2d(latents.numbers + memory, units, 3, padding=1)
        self.act = nn.Linear(num_actions, 2 * units, bias=False)
        self.everywhere = Summary(units, units, self.places)
        self.entered = nn.GroupNorm(1, units)
        self.gates = nn.Conv2d(units, 3 * memory, 3, padding=1, bias=False)
        self.keep = nn.Conv2d(memory, 3 * memory, 1, bias=False)
        self.gated = nn.GroupNorm(1, 3 * memory)
        self.recall = nn.Conv2d(memory, units, 3, padding=1, bias=False)
        self.judge = nn.Sequential(nn.GroupNorm(1, units), nn.SiLU(), nn.Conv2d(units, latents.statistics, 1))
        self.expect = nn.Sequential(
            nn.Conv2d(memory, units, 3, padding=1), nn.GroupNorm(1, units), nn.SiLU(), nn.Conv2d(units, latents.statistics, 1)
        )
        self.tell = Summary(memory + latents.numbers, 4 * units, self.places)
        self.features = 4 * units

    def see(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) -> what `posterior` takes of a frame, float (B, ...)."""
        seen: Tensor = self.down(images)
        return seen

    def advance(self, memory: Tensor, latents: Tensor, actions: Tensor) -> Tensor:
        """h after z and an action, float (B, A), one-hot or zeros where there was none."""
        scale, shift = self.act(actions)[:, :, None, None].chunk(2, 1)
        entered = self.entered(self.enter(torch.cat((latents.movedim(-1, 1), memory), 1)))
        entered = nn.functional.silu(entered * (1 + scale) + shift)
        entered = entered + self.everywhere(entered)[:, :, None, None]
        reset, update, candidate = self.gated(self.gates(entered) + self.keep(memory)).float().chunk(3, 1)
        return _gated(memory, reset, update, candidate)

    def posterior(self, memory: Tensor, seen: Tensor) -> Tensor:
        """Statistics of q(z | h, frame)."""
        statistics: Tensor = self.judge(self.recall(memory) + seen)
        return statistics.float().movedim(1, -1)

    def prior(self, memory: Tensor) -> Tensor:
        """Statistics of p(z | h)."""
        statistics: Tensor = self.expect(memory)
        return statistics.float().movedim(1, -1)

    def draw(self, memory: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(images float32 (B, C, H, W), what heads see (B, features))."""
        both = torch.cat((memory, latents.movedim(-1, 1)), 1)
        return self.up(both).float(), self.tell(both).relu()


class Summary(nn.Module):
    """float (B, D, h, w) -> (B, outputs): convolutions of stride 2 until a side has 4, then one layer for all places."""

    def __init__(self, channels: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while min(size) > SMALLEST_SIDE:
            layers += [nn.Conv2d(channels, channels, 3, 2, 1), nn.ReLU()]
            size = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size[0] * size[1], outputs))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _keep_variance(layer)

    def forward(self, maps: Tensor) -> Tensor:
        told: Tensor = self.layers(maps)
        return told


def _gated(memory: Tensor, reset: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
    """A GRU's next memory from its gates before their nonlinearities, reset applied to all of the candidate."""
    share = torch.sigmoid(update + FIRST_UPDATE)
    return memory + share * (torch.tanh(reset.sigmoid() * candidate) - memory)


def _keep_variance(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Draws weights so that a ReLU before keeps its inputs' variance (He et al. 2015, equation 10); biases 0."""
    inputs = layer.weight.shape[0] * layer.weight[0, 0].numel() / 4 if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs))  # of a transposed kernel of stride 2, a quarter meets each pixel
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _strided(maps: int, depths: list[int], halving: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for depth in depths:
        layers += [nn.Conv2d(maps, depth, 4, 2, 1) if halving else nn.Conv2d(maps, depth, 3, 1, 1), nn.ReLU()]
        maps = depth
    return layers


def _widened(maps: int, depths: list[int], sizes: list[tuple[int, int]]) -> list[nn.Module]:
    """The mirror of `_strided`; where a side was odd, the missing row is added on the far side."""
    if len(sizes) == 1:
        return [nn.Conv2d(depths[0], maps, 3, 1, 1)]
    layers: list[nn.Module] = []
    outputs = [maps, *depths[:-1]]
    for level in range(len(depths) - 1, -1, -1):
        (rows, columns), (wanted_rows, wanted_columns) = sizes[level + 1], sizes[level]
        extra = (wanted_rows - 2 * rows, wanted_columns - 2 * columns)
        layers += [nn.ConvTranspose2d(depths[level], outputs[level], 4, 2, 1, extra), nn.ReLU()]
    return layers[:-1]
