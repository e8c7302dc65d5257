"""The ray caster: what one column of pixels shows, as plain scalar functions, compiled for CPU threads and for CUDA.

The world is a grid of cells of side 1 with walls of height 1; the eye stands at 0.5. x runs to the right and y down the map, so angles grow
clockwise. A column's ray walks from cell to cell to the first wall (Amanatides and Woo 1987); above the wall lies the sky, below it the
floor, and things stand in between, from the farthest to the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from envs.labyrinth.textures import SHADES, SIDE, SKY_COLUMNS, THING_SIDE

EYE = 0.5
NEAREST = 0.15  # things closer than this are behind the eye
RADIUS = 0.22  # of a thing
LIGHT_REACH = 1.1  # shades for every unit of distance
SIDE_SHADE = 2  # by how much walls that run along x are darker, so that corners show


def floor_depths(height: int, focal: float) -> np.ndarray:
    """float64 (height): how far away the floor is in each row of pixels; inf above the horizon."""
    down = np.arange(height) + 0.5 - 0.5 * height
    return np.divide(EYE * focal, down, out=np.full(height, np.inf), where=down > 0)


def make_functions(compiled: Callable[..., Any]) -> tuple[Any, Any]:
    """(place_things, column), compiled by `compiled`, the decorator of the CPU or of CUDA."""

    def shade_of(distance):
        return min(SHADES - 1, int(distance * LIGHT_REACH))

    shade_of = compiled(shade_of)

    def paint(shown, y, x, colour):
        """Writes a packed colour into uint8 (H, W, channels)."""
        shown[y, x, 0] = colour & 255
        if shown.shape[2] == 3:
            shown[y, x, 1] = (colour >> 8) & 255
            shown[y, x, 2] = (colour >> 16) & 255

    paint = compiled(paint)

    def place_things(lanes, n, focal, width, seen):
        """Lists lane n's things before the eye in float32 seen (N, S + 1, 4) rows (depth, centre column, radius in pixels, kind), farthest
        first; the row after the last has depth 0."""
        x, y, angle = lanes.pose[n, 0], lanes.pose[n, 1], lanes.pose[n, 2]
        ahead_x, ahead_y = math.cos(angle), math.sin(angle)
        count = 0
        for s in range(lanes.kinds.shape[1]):
            if lanes.kinds[n, s] < 0:
                continue
            dx, dy = lanes.places[n, s, 0] - x, lanes.places[n, s, 1] - y
            depth = dx * ahead_x + dy * ahead_y
            if depth < NEAREST:
                continue
            centre = 0.5 * width + focal * (dy * ahead_x - dx * ahead_y) / depth
            radius = focal * RADIUS / depth
            if centre + radius < 0 or centre - radius > width:
                continue
            k = count
            while k > 0 and seen[n, k - 1, 0] < depth:
                for part in range(4):
                    seen[n, k, part] = seen[n, k - 1, part]
                k -= 1
            seen[n, k, 0], seen[n, k, 1], seen[n, k, 2], seen[n, k, 3] = depth, centre, radius, lanes.kinds[n, s]
            count += 1
        seen[n, count, 0] = 0.0

    def column(lanes, n, x, seen, focal, depths, walls, floor, sky, things, out):
        """Draws column x of lane n into out uint8 (N, H, W, channels), channels 1 or 3; `depths` as `floor_depths` makes them."""
        shown, height, width = out[n], out.shape[1], out.shape[2]
        px, py, angle = lanes.pose[n, 0], lanes.pose[n, 1], lanes.pose[n, 2]
        ahead_x, ahead_y = math.cos(angle), math.sin(angle)
        aside = (x + 0.5 - 0.5 * width) / focal
        dx, dy = ahead_x - ahead_y * aside, ahead_y + ahead_x * aside
        # the ray, to the first wall
        column_cell, row_cell = int(px), int(py)
        step_x, step_y = (1 if dx > 0 else -1), (1 if dy > 0 else -1)
        delta_x, delta_y = abs(1.0 / dx) if dx != 0 else 1e30, abs(1.0 / dy) if dy != 0 else 1e30
        next_x = (column_cell + 1 - px if dx > 0 else px - column_cell) * delta_x
        next_y = (row_cell + 1 - py if dy > 0 else py - row_cell) * delta_y
        distance, along_x, look = 0.0, False, 0
        while look == 0:
            along_x = next_y <= next_x
            if along_x:
                distance = next_y
                next_y += delta_y
                row_cell += step_y
            else:
                distance = next_x
                next_x += delta_x
                column_cell += step_x
            look = int(lanes.grid[n, row_cell, column_cell])
        distance = max(distance, 1e-3)
        half = 0.5 * focal / distance
        middle = 0.5 * height
        top = max(0, math.ceil(middle - half - 0.5))
        bottom = min(height, math.ceil(middle + half - 0.5))
        # sky
        turn = (angle + math.atan(aside)) * (SKY_COLUMNS / (2.0 * math.pi))
        bearing = math.floor(turn) % SKY_COLUMNS
        fall = sky.shape[0] / middle
        for y in range(top):
            paint(shown, y, x, sky[int((y + 0.5) * fall), bearing])
        # wall
        across = px + distance * dx if along_x else py + distance * dy
        u = int((across - math.floor(across)) * SIDE) & (SIDE - 1)
        shade = min(SHADES - 1, shade_of(distance) + (SIDE_SHADE if along_x else 0))
        rise = SIDE / (2.0 * half)
        v, wall = (top + 0.5 - middle + half) * rise, walls[shade, look - 1, u]
        for y in range(top, bottom):
            paint(shown, y, x, wall[min(SIDE - 1, int(v))])
            v += rise
        # floor
        for y in range(bottom, height):
            depth = depths[y]
            fx, fy = int((px + depth * dx) * SIDE) & (SIDE - 1), int((py + depth * dy) * SIDE) & (SIDE - 1)
            paint(shown, y, x, floor[shade_of(depth), fy, fx])
        # things
        k = 0
        while seen[n, k, 0] > 0:
            depth, centre, radius = seen[n, k, 0], seen[n, k, 1], seen[n, k, 2]
            aside = x + 0.5 - centre + radius
            if depth < distance and 0 <= aside < 2 * radius:
                low = middle + (EYE - RADIUS) * focal / depth - radius  # it lies on the floor
                u = min(THING_SIDE - 1, int(aside / (2 * radius) * THING_SIDE))
                shade, kind = shade_of(depth), int(seen[n, k, 3])
                rise = THING_SIDE / (2 * radius)
                for y in range(max(0, math.ceil(low - 0.5)), min(height, math.ceil(low + 2 * radius - 0.5))):
                    colour = things[shade, kind, u, min(THING_SIDE - 1, int((y + 0.5 - low) * rise))]
                    if colour >> 24:
                        paint(shown, y, x, colour)
            k += 1

    return compiled(place_things), compiled(column)


_place_things, _column = make_functions(njit(nogil=True, inline="always", error_model="numpy"))


@njit(cache=True, nogil=True, error_model="numpy")
def draw(lanes, first, stop, which, seen, focal, depths, walls, floor, sky, things, out):
    """Draws those lanes of first..stop where which uint8 (N) is not 0 into out uint8 (N, H, W, channels)."""
    width = out.shape[2]
    for n in range(first, stop):
        if which[n] != 0:
            _place_things(lanes, n, focal, width, seen)
            for x in range(width):
                _column(lanes, n, x, seen, focal, depths, walls, floor, sky, things, out)
