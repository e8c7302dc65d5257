"""Dice and random mazes, as plain scalar functions, compiled for CPU threads and for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

DOWN, RIGHT = (-1, 1, 0, 0), (0, 0, -1, 1)  # rows and columns of a step up, down, left, right
SOLID = 255  # wall, in a grid that was carved
_ROOT = 250  # where carving began; _ROOT + 1 + way: by which way a room was reached


def make_functions(compiled: Callable[..., Any]) -> tuple[Any, Any]:
    """(roll, carve), compiled by `compiled`, the decorator of the CPU or of CUDA."""

    def roll(dice, n, sides):
        """A random int in 0 .. sides - 1, sides at most 2^32, from stream n of dice uint64 (N): SplitMix64 (Steele et al. 2014)."""
        state = dice[n] + np.uint64(0x9E3779B97F4A7C15)
        dice[n] = state
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
        return int((state >> np.uint64(32)) * np.uint64(sides) >> np.uint64(32))

    roll = compiled(roll)

    def carve(grid, dice, n):
        """Makes of grid uint8 (R, C), odd sides, a random perfect maze over the cells of odd row and column: 0 floor, SOLID wall.

        Depth-first search, whose way back stands in the rooms themselves.
        """
        rows, columns = grid.shape
        for row in range(rows):
            for column in range(columns):
                grid[row, column] = SOLID
        row, column = 1 + 2 * roll(dice, n, rows // 2), 1 + 2 * roll(dice, n, columns // 2)
        grid[row, column] = _ROOT
        while True:
            chosen, ways = -1, 0
            for way in range(4):
                r, c = row + 2 * DOWN[way], column + 2 * RIGHT[way]
                if 0 < r < rows - 1 and 0 < c < columns - 1 and grid[r, c] == SOLID:
                    ways += 1
                    if roll(dice, n, ways) == 0:
                        chosen = way
            if chosen >= 0:
                grid[row + DOWN[chosen], column + RIGHT[chosen]] = 0
                row, column = row + 2 * DOWN[chosen], column + 2 * RIGHT[chosen]
                grid[row, column] = _ROOT + 1 + chosen
            else:
                came = int(grid[row, column])
                grid[row, column] = 0
                if came == _ROOT:
                    break
                row, column = row - 2 * DOWN[came - _ROOT - 1], column - 2 * RIGHT[came - _ROOT - 1]

    return roll, compiled(carve)
