"""Shrinking a picture by area: an output pixel is the mean of the input rectangle that it covers."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit


def shrink(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (height, width[, channels]) from uint8 (H, W[, channels]), H >= height and W >= width. As `shrink_planes` does it."""
    planes = picture.reshape(*picture.shape[:2], -1).transpose(2, 0, 1)
    small = shrink_planes(planes, height, width).transpose(1, 2, 0)
    return np.ascontiguousarray(small).reshape(height, width, *picture.shape[2:])


def shrink_planes(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (channels, height, width) from uint8 (channels, H, W), H >= height and W >= width. Compiled, and frees other threads.

    Columns first, then rows, float32 sums taken from left to right and from top to bottom, rounded half to even: bit for bit what ale-py's
    vector environment shows (it shrinks by OpenCV's INTER_AREA), which a test compares.
    """
    assert planes.dtype == np.uint8, planes.dtype
    assert planes.shape[1] >= height, planes.shape
    assert planes.shape[2] >= width, planes.shape
    small = np.empty((planes.shape[0], height, width), np.uint8)
    if planes.shape == small.shape:
        small[...] = planes
    else:
        _shrink(np.ascontiguousarray(planes), *_taps(planes.shape[1], height), *_taps(planes.shape[2], width), small)
    return small


@njit(cache=True, nogil=True)
def _shrink(planes, rows, row_shares, columns, column_shares, small):
    """Writes small uint8 (C, height, width), from planes uint8 (C, H, W) and the taps of both sides."""
    width = small.shape[2]
    narrow, total = np.empty((planes.shape[1], width), np.float32), np.empty(width, np.float32)
    for plane in range(planes.shape[0]):
        for row in range(planes.shape[1]):
            total[:] = 0
            for tap in range(columns.shape[0]):
                for x in range(width):
                    total[x] += np.float32(planes[plane, row, columns[tap, x]]) * column_shares[tap, x]
            narrow[row] = total
        for y in range(small.shape[1]):
            total[:] = 0
            for tap in range(rows.shape[0]):
                for x in range(width):
                    total[x] += narrow[rows[tap, y], x] * row_shares[tap, y]
            for x in range(width):
                small[plane, y, x] = np.uint8(np.rint(total[x]))


@cache
def _taps(source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The input cells, uint32 (taps, size), that each of `size` output cells covers, and the covered shares, float32 (taps, size)."""
    scale = source / size
    start = np.arange(size) * scale
    first = np.floor(start + 1e-3).astype(np.int64)  # an overlap below a thousandth of a cell is none
    taps = int(np.ceil(scale)) + 1
    index = first + np.arange(taps)[:, None]  # taps, size
    overlap = np.minimum(index + 1, start + scale) - np.maximum(index, start)
    overlap[(overlap < 1e-3) | (index >= source)] = 0
    return np.minimum(index, source - 1).astype(np.uint32), (overlap / scale).astype(np.float32)
