"""Labyrinths on CUDA: one thread a lane moves, one thread a column of pixels draws, by the scalar functions of the processor's.

Imported only where tensors lie on CUDA (or numba's simulator is on), since importing numba.cuda takes a while.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from envs.labyrinth import physics, raycast
from envs.labyrinth.lanes import Result, empty_lanes
from envs.labyrinth.physics import END, Lanes, Rules

THREADS = 64
_open_lane, _step_lane = physics.make_functions(cuda.jit(device=True))
_place_things, _column = raycast.make_functions(cuda.jit(device=True))


@cuda.jit
def open_lanes(rules, lanes, which):
    """Begins an episode in the thread's lane where which uint8 (N) is not 0."""
    n = cuda.grid(1)
    if n < which.shape[0] and which[n] != 0:
        _open_lane(rules, lanes, n)


@cuda.jit
def step_lanes(rules, lanes, actions, reward, ended):
    """Plays a step of the thread's lane; see `envs.labyrinth.physics.step_lanes`."""
    n = cuda.grid(1)
    if n < ended.shape[0]:
        gained, over = _step_lane(rules, lanes, n, actions[n])
        reward[n] = gained
        ended[n] = over


@cuda.jit
def place_things(lanes, which, seen, focal, width):
    """Lists what is before the eye of the thread's lane."""
    n = cuda.grid(1)
    if n < which.shape[0] and which[n] != 0:
        _place_things(lanes, n, focal, width, seen)


@cuda.jit
def draw_columns(lanes, which, seen, focal, depths, walls, floor, sky, things, out):
    """Draws the thread's column of pixels into out uint8 (N, H, W, channels)."""
    place = cuda.grid(1)
    n, x = place // out.shape[2], place % out.shape[2]
    if n < out.shape[0] and which[n] != 0:
        _column(lanes, n, x, seen, focal, depths, walls, floor, sky, things, out)


class Card:
    """An Engine on CUDA; see `envs.labyrinth.lanes.Threads` for the arguments. Nothing waits for the card, but where a level has things
    that end an episode: else the host knows by its own clock when lanes begin anew."""

    def __init__(
        self, device: torch.device, rules: Rules, num_envs: int, shape: tuple[int, int, int], focal: float, pictures: tuple[np.ndarray, ...]
    ) -> None:
        self._device, self._shape = device, (num_envs, *shape)
        self._tensors = [torch.from_numpy(array).to(device) for array in empty_lanes(rules, num_envs)]
        self._lanes = Lanes(*(cuda.as_cuda_array(tensor) for tensor in self._tensors))
        self._rules = Rules(*(cuda.to_device(array) for array in rules))
        self._pictures = [cuda.to_device(array) for array in (raycast.floor_depths(shape[0], focal), *pictures)]
        self._seen_things, self._focal = cuda.to_device(np.zeros((num_envs, len(rules.kinds) + 1, 4), np.float32)), focal
        self._everyone = torch.ones(num_envs, dtype=torch.uint8, device=device)
        self._by_clock, self._steps = not (rules.then[rules.kinds[rules.kinds >= 0]] == END).any() and not len(rules.draws), 0
        self._episode_steps = -(-int(rules.limit[0]) // physics.FRAMES_PER_STEP)

    def start(self, seeds: Sequence[int]) -> Tensor:
        self._tensors[-1].copy_(torch.from_numpy(np.array(seeds, np.uint64)))
        self._steps, pictures = 0, self._blank()
        self._begin(self._everyone, pictures)
        return pictures

    def play(self, action: Tensor) -> None:
        count = self._shape[0]
        self._reward = torch.empty(count, device=self._device)
        self._ended = torch.empty(count, dtype=torch.uint8, device=self._device)
        self._seen = self._blank()
        step_lanes[-(-count // THREADS), THREADS](self._rules, self._lanes, action.to(self._device), self._reward, self._ended)
        self._draw(self._everyone, self._seen)
        self._steps += 1

    def result(self) -> Result:
        last = self._ended.view(torch.bool)
        if not (self._steps % self._episode_steps == 0 if self._by_clock else bool(last.any())):
            return self._seen, self._reward, last, None
        opened = self._seen.clone()
        self._begin(self._ended, opened)
        return opened, self._reward, last, self._seen

    def lanes(self) -> Lanes:
        return Lanes(*(tensor.cpu().numpy() for tensor in self._tensors))

    def close(self) -> None:
        pass

    def _blank(self) -> Tensor:
        return torch.empty(self._shape, dtype=torch.uint8, device=self._device)

    def _begin(self, which: Tensor, pictures: Tensor) -> None:
        open_lanes[-(-self._shape[0] // THREADS), THREADS](self._rules, self._lanes, which)
        self._draw(which, pictures)

    def _draw(self, which: Tensor, pictures: Tensor) -> None:
        count, _, width, _ = self._shape
        place_things[-(-count // THREADS), THREADS](self._lanes, which, self._seen_things, self._focal, width)
        columns = draw_columns[-(-count * width // THREADS), THREADS]
        columns(self._lanes, which, self._seen_things, self._focal, *self._pictures, pictures)
