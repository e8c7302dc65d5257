"""Shrinking a picture by area: an output pixel is the mean of the input rectangle that it covers."""

from __future__ import annotations

from functools import cache

import numpy as np


def shrink(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (height, width[, channels]) from uint8 (H, W[, channels]), H >= height and W >= width.

    Columns first, then rows, float32 sums taken from left to right and from top to bottom, rounded half to even: bit for bit what ale-py's
    vector environment shows (it shrinks by OpenCV's INTER_AREA), which a test compares.
    """
    assert picture.dtype == np.uint8, picture.dtype
    assert picture.shape[0] >= height, picture.shape
    assert picture.shape[1] >= width, picture.shape
    if picture.shape[:2] == (height, width):
        return picture.copy()
    source = picture.astype(np.float32).reshape(*picture.shape[:2], -1)  # H, W, channels
    columns = _weighted_sum(source.transpose(1, 0, 2), width)  # width, H, channels
    rows = _weighted_sum(columns.transpose(1, 0, 2), height)  # height, width, channels
    return np.rint(rows).clip(0, 255).astype(np.uint8).reshape(height, width, *picture.shape[2:])


def _weighted_sum(source: np.ndarray, size: int) -> np.ndarray:
    """(size, ...) means of (S, ...) over its first axis, one tap after another."""
    index, weight = _taps(source.shape[0], size)
    total = np.zeros((size, *source.shape[1:]), np.float32)
    for tap in range(index.shape[0]):
        total += source[index[tap]] * weight[tap].reshape(-1, *[1] * (source.ndim - 1))
    return total


@cache
def _taps(source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The input cells, int (taps, size), that each of `size` output cells covers, and the covered shares, float32 (taps, size)."""
    scale = source / size
    start = np.arange(size) * scale
    first = np.floor(start + 1e-3).astype(np.int64)  # an overlap below a thousandth of a cell is none
    taps = int(np.ceil(scale)) + 1
    index = first + np.arange(taps)[:, None]  # taps, size
    overlap = np.minimum(index + 1, start + scale) - np.maximum(index, start)
    overlap[(overlap < 1e-3) | (index >= source)] = 0
    return np.minimum(index, source - 1), (overlap / scale).astype(np.float32)
