"""A lane of a labyrinth seen from above: walls, things, and the body with the way it faces."""

from __future__ import annotations

import math

import numpy as np

from envs.labyrinth import textures
from envs.labyrinth.physics import BODY, Lanes
from envs.labyrinth.raycast import RADIUS

FLOOR = (226, 222, 212)
BODY_COLOUR = (32, 32, 32)


def overview(lanes: Lanes, n: int, side: int) -> np.ndarray:
    """uint8 (side, side, 3): lane n's whole map, north up, in the middle of a square."""
    rows, columns = lanes.grid.shape[1:]
    scale = max(rows, columns) / side
    y, x = (np.mgrid[:side, :side] + 0.5) * scale - np.array([(scale * side - rows) / 2, (scale * side - columns) / 2])[:, None, None]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    colours = np.vstack([FLOOR, *(_mean(picture) for picture in textures.walls()[0]), (255, 255, 255)]).astype(np.uint8)
    looks = np.where(inside, lanes.grid[n][np.clip(y, 0, rows - 1).astype(int), np.clip(x, 0, columns - 1).astype(int)], len(colours) - 1)
    picture = colours[looks]
    tints = [_mean(thing) for thing in textures.things()[0]]
    for kind, (at_x, at_y) in zip(lanes.kinds[n], lanes.places[n]):
        if kind >= 0:
            picture[(x - at_x) ** 2 + (y - at_y) ** 2 < max(RADIUS, scale) ** 2] = tints[kind]
    at_x, at_y, angle = lanes.pose[n]
    ahead, aside = math.cos(angle), math.sin(angle)
    along, across = (x - at_x) * ahead + (y - at_y) * aside, -(x - at_x) * aside + (y - at_y) * ahead
    size = max(1.6 * BODY, 2.5 * scale)
    picture[(np.abs(across) < 0.6 * (size - along)) & (along > -size) & (along < size)] = BODY_COLOUR
    return picture


def _mean(packed: np.ndarray) -> np.ndarray:
    """The mean colour of a packed picture, of what is opaque in it where anything is."""
    shown = packed[packed >> 24 > 0] if (packed >> 24).any() else packed.ravel()
    return np.array([(shown >> shift & 255).mean() for shift in (0, 8, 16)])
