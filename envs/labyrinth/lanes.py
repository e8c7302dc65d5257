"""What moves and draws the lanes of a labyrinth; this file's does so by threads of the processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from envs.labyrinth import physics, raycast
from envs.labyrinth.physics import Lanes, Rules

Result = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Pictures uint8 (N, H, W, C) to act on, reward float32 (N), whether the episode ended bool (N), and pictures of what followed the action,
or None where these are the first."""


class Engine(Protocol):
    """N lanes, somewhere."""

    def start(self, seeds: Sequence[int]) -> Tensor:
        """Begins an episode in every lane, from its own seed. uint8 (N, H, W, C)."""

    def play(self, action: Tensor) -> None:
        """Begins a step by int64 (N) actions, and returns at once."""

    def result(self) -> Result:
        """Waits for the step, and begins anew where an episode ended."""

    def lanes(self) -> Lanes:
        """The state, on the host."""

    def close(self) -> None:
        """Twice is harmless."""


def empty_lanes(rules: Rules, num_envs: int) -> Lanes:
    """Zeros of the right sizes."""
    rows, columns = rules.base.shape
    things = len(rules.kinds)
    return Lanes(
        pose=np.zeros((num_envs, 3)),
        speed=np.zeros((num_envs, 3)),
        grid=np.zeros((num_envs, rows, columns), np.uint8),
        kinds=np.zeros((num_envs, things), np.int8),
        places=np.zeros((num_envs, things, 2), np.float32),
        clock=np.zeros(num_envs, np.int32),
        dice=np.zeros(num_envs, np.uint64),
    )


class Threads:
    """An Engine of threads, each with a run of lanes.

    Args:
        num_threads: at most num_envs.
        rules: of the level.
        num_envs: N.
        shape: (H, W, C) of pictures.
        focal: pixels from the eye to the picture's plane.
        pictures: of walls, floor, sky and things (`envs.labyrinth.textures`).
    """

    def __init__(
        self, num_threads: int, rules: Rules, num_envs: int, shape: tuple[int, int, int], focal: float, pictures: tuple[np.ndarray, ...]
    ) -> None:
        self._rules, self._lanes, self._shape = rules, empty_lanes(rules, num_envs), (num_envs, *shape)
        seen = np.zeros((num_envs, len(rules.kinds) + 1, 4), np.float32)
        np.empty(self._shape, np.uint8)  # MemoryError now, before anything is played or written
        self._look = seen, focal, raycast.floor_depths(shape[0], focal), *pictures
        self._everyone = np.ones(num_envs, np.uint8)
        self._pool = ThreadPoolExecutor(num_threads, "labyrinth")
        self._shares = [(num_envs * k // num_threads, num_envs * (k + 1) // num_threads) for k in range(num_threads)]
        self._pending: list[Future[None]] = []

    def start(self, seeds: Sequence[int]) -> Tensor:
        self._lanes.dice[:] = seeds
        pictures = np.empty(self._shape, np.uint8)
        self._begin(self._everyone, pictures)
        return torch.from_numpy(pictures)

    def play(self, action: Tensor) -> None:
        actions, count = action.cpu().numpy().copy(), self._shape[0]
        self._reward, self._ended = np.empty(count, np.float32), np.empty(count, np.uint8)
        self._seen = np.empty(self._shape, np.uint8)
        self._pending = self._share_out(lambda first, stop: self._play(first, stop, actions))

    def result(self) -> Result:
        _wait(self._pending)
        reward, last, seen = torch.from_numpy(self._reward), torch.from_numpy(self._ended.view(np.bool_)), torch.from_numpy(self._seen)
        if not self._ended.any():
            return seen, reward, last, None
        opened = self._seen.copy()
        self._begin(self._ended, opened)
        return torch.from_numpy(opened), reward, last, seen

    def lanes(self) -> Lanes:
        return self._lanes

    def close(self) -> None:
        self._pool.shutdown()

    def _play(self, first: int, stop: int, actions: np.ndarray) -> None:
        physics.step_lanes(self._rules, self._lanes, first, stop, actions, self._reward, self._ended)
        raycast.draw(self._lanes, first, stop, self._everyone, *self._look, self._seen)

    def _begin(self, which: np.ndarray, pictures: np.ndarray) -> None:
        """Begins an episode in the lanes where which uint8 (N) is not 0, and draws these."""

        def work(first: int, stop: int) -> None:
            physics.open_lanes(self._rules, self._lanes, first, stop, which)
            raycast.draw(self._lanes, first, stop, which, *self._look, pictures)

        _wait(self._share_out(work))

    def _share_out(self, work: Callable[[int, int], None]) -> list[Future[None]]:
        return [self._pool.submit(work, first, stop) for first, stop in self._shares]


def _wait(shares: list[Future[None]]) -> None:
    for share in shares:
        share.result()
