"""What labyrinths look like: pictures of walls, floor, sky and things, drawn by arithmetic. Colours are packed, red in the lowest byte."""

from __future__ import annotations

from functools import cache

import numpy as np

SIDE = 64  # of a wall's or the floor's picture
THING_SIDE = 32
SKY_ROWS, SKY_COLUMNS = 64, 512
SHADES = 16  # from full light to the dark of a distance
DARKEST = 0.35
LOOKS = ("brick", "stone", "wood", "hedge", "red", "green", "blue", "yellow")
"""Of walls, in the order of the pictures. Grids hold them plus 1; 0 is floor."""
THINGS = ("apple", "lemon", "goal")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@cache
def walls(grey: bool = False) -> np.ndarray:
    """uint32 (SHADES, looks, SIDE, SIDE): column, then row from the top."""
    pictures = [_brick(), _stone(), _wood(), _hedge(), *(_plain(name) for name in LOOKS[4:])]
    return _shaded(np.stack([picture.transpose(1, 0, 2) for picture in pictures]), grey)


@cache
def floor(grey: bool = False) -> np.ndarray:
    """uint32 (SHADES, SIDE, SIDE), one cell."""
    rng, tiles = np.random.default_rng(7), np.empty((SIDE, SIDE, 3))
    tiles[:] = (118, 110, 98)
    tiles *= 1 + 0.12 * (_smooth(rng, SIDE, 8) - 0.5)[..., None]
    half = SIDE // 2
    for y in (0, half):
        for x in (0, half):
            tiles[y : y + half, x : x + half] *= rng.uniform(0.88, 1.08)
    tiles[::half], tiles[:, ::half] = tiles[::half] * 0.72, tiles[:, ::half] * 0.72
    return np.ascontiguousarray(_shaded(tiles[None], grey)[:, 0])


@cache
def sky(grey: bool = False) -> np.ndarray:
    """uint32 (SKY_ROWS, SKY_COLUMNS): from the zenith to the horizon, all the way round, with clouds and hills to tell directions by."""
    rng = np.random.default_rng(11)
    height = np.linspace(0, 1, SKY_ROWS)[:, None, None]
    picture = np.array((96, 148, 222.0)) * (1 - height) + np.array((206, 224, 240.0)) * height
    picture = np.repeat(picture, SKY_COLUMNS, 1)
    clouds = np.clip(_round(rng, SKY_ROWS, SKY_COLUMNS, 12) * 2.6 - 1.35, 0, 0.8)[..., None] * (1 - 0.4 * height)
    picture = picture * (1 - clouds) + 250 * clouds
    crest = 0.78 + 0.12 * (_round(rng, 1, SKY_COLUMNS, 9)[0] - 0.5) * 2
    hills = height[..., 0] > crest[None]
    picture[hills] = np.array((104, 126, 112.0)) * (0.85 + 0.3 * _round(rng, SKY_ROWS, SKY_COLUMNS, 40)[hills][:, None])
    return _packed(picture, grey)


@cache
def things(grey: bool = False) -> np.ndarray:
    """uint32 (SHADES, kinds, THING_SIDE, THING_SIDE): column, then row; the highest byte is 255 where the thing is, 0 around it."""
    pictures, masks = zip(_ball((214, 32, 36), 1.0), _ball((240, 214, 40), 1.28), _ball((60, 120, 240), 1.0, ring=True))
    found = _shaded(np.stack([picture.transpose(1, 0, 2) for picture in pictures]), grey)
    mask = np.stack([mask.T for mask in masks])
    return np.ascontiguousarray(np.where(mask, found | np.uint32(0xFF000000), 0).astype(np.uint32))


def _brick() -> np.ndarray:
    rng, picture = np.random.default_rng(1), np.empty((SIDE, SIDE, 3))
    picture[:] = (186, 178, 168)
    for row in range(4):
        shift = 0 if row % 2 else 16
        for column in range(3):
            left, right = max(0, 32 * column - shift + 1), min(SIDE, 32 * column - shift + 31)
            if left < right:
                picture[16 * row + 1 : 16 * row + 15, left:right] = np.array((164, 84, 62)) * rng.uniform(0.85, 1.12)
    return picture * (0.9 + 0.2 * _smooth(rng, SIDE, 16))[..., None]


def _stone() -> np.ndarray:
    rng, picture = np.random.default_rng(2), np.empty((SIDE, SIDE, 3))
    picture[:] = (132, 134, 138)
    picture *= (0.75 + 0.5 * _smooth(rng, SIDE, 8))[..., None]
    picture[::32], picture[:, ::32] = picture[::32] * 0.6, picture[:, ::32] * 0.6
    return picture


def _wood() -> np.ndarray:
    rng, picture = np.random.default_rng(3), np.empty((SIDE, SIDE, 3))
    picture[:] = (150, 106, 62)
    picture *= (0.8 + 0.4 * np.repeat(_smooth(rng, SIDE, 16)[:1], SIDE, 0))[..., None]
    picture[:, ::16] *= 0.55
    return picture


def _hedge() -> np.ndarray:
    rng, picture = np.random.default_rng(4), np.empty((SIDE, SIDE, 3))
    picture[:] = (48, 112, 44)
    return picture * (0.55 + 0.9 * _smooth(rng, SIDE, 24))[..., None]


def _plain(name: str) -> np.ndarray:
    """A painted wall with a darker border: a cue that cannot be mistaken."""
    colours = {"red": (216, 36, 36), "green": (36, 190, 60), "blue": (44, 84, 220), "yellow": (232, 208, 48)}
    picture = np.empty((SIDE, SIDE, 3))
    picture[:] = colours[name]
    picture[:3], picture[-3:] = picture[:3] * 0.7, picture[-3:] * 0.7
    picture[:, :3], picture[:, -3:] = picture[:, :3] * 0.7, picture[:, -3:] * 0.7
    return picture


def _ball(colour: tuple[int, int, int], length: float, ring: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A lit ellipsoid, `length` times as wide as high, in its bounding square, and its mask."""
    rows, columns = np.mgrid[:THING_SIDE, :THING_SIDE] * (2 / THING_SIDE) - 1 + 1 / THING_SIDE
    x, y = columns, rows * length
    inside = x * x + y * y < 1
    z = np.sqrt(np.clip(1 - x * x - y * y, 0, 1))
    light = np.clip(-0.45 * x - 0.6 * y + 0.66 * z, 0, 1)
    picture = np.array(colour) * (0.35 + 0.7 * light)[..., None] + 200 * (light**24)[..., None]
    if ring:
        picture[np.abs(y) < 0.22] = 245
    return picture, inside


def _smooth(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Noise in 0..1 (side, side) that tiles."""
    return _round(rng, side, side, cells)


def _round(rng: np.random.Generator, rows: int, columns: int, cells: int) -> np.ndarray:
    """Noise in 0..1 (rows, columns) of about `cells` bumps a row; its left and right edges meet."""
    coarse = rng.random((max(2, cells * rows // columns) + 1, cells))
    coarse = np.concatenate([coarse, coarse[:, :1]], 1)
    coarse[-1] = coarse[0]
    y, x = np.linspace(0, coarse.shape[0] - 1, rows, endpoint=False), np.linspace(0, cells, columns, endpoint=False)
    top, left = y.astype(int), x.astype(int)
    v, u = (y - top)[:, None], (x - left)[None]
    upper = coarse[top][:, left] * (1 - u) + coarse[top][:, left + 1] * u
    lower = coarse[top + 1][:, left] * (1 - u) + coarse[top + 1][:, left + 1] * u
    return upper * (1 - v) + lower * v


def _shaded(pictures: np.ndarray, grey: bool) -> np.ndarray:
    """float (n, H, W, 3) -> uint32 (SHADES, n, H, W)."""
    return np.stack([_packed(pictures * light, grey) for light in np.linspace(1, DARKEST, SHADES)])


def _packed(picture: np.ndarray, grey: bool) -> np.ndarray:
    picture = np.clip(picture, 0, 255)
    if grey:
        picture = np.repeat((picture * LUMA).sum(-1, keepdims=True), 3, -1)
    red, green, blue = np.rint(picture).astype(np.uint32).transpose(-1, *range(picture.ndim - 1))
    return np.ascontiguousarray(red | green << np.uint32(8) | blue << np.uint32(16))
