"""uint8 codes of one table of keys, kept in step with it: what the `scan` search reads instead of the keys.

**Layout.** Codes are uint8 [block of 16 rows][dims / 4][row of 16][4], dims padded to a multiple of four; beside them one int32 a row,
minus half the squared norm of its code. A code c stands for the integer u = c - 128. A key x is first clipped to the box
centre + step * [-128, 127]: P(x) = centre + step * u + e. `agents.scan` says what the bound on |e| is for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

BLOCK = 16  # rows a vector of int32 sums
MAX_DIMS = 8192  # keeps every int32 sum in range


def bytes_per_row(dims: int) -> int:
    """Bytes a row of `dims` dimensions takes beside its key."""
    return (dims + 3) // 4 * 4 + 4


@njit(cache=True, nogil=True)
def encode(keys, rows, codes, halves, centre, step):
    """Writes codes and half norms of `rows` int64 (M) of `keys` float32 (capacity, D).

    Returns the greatest |e|, computed in float64, and how many rows were clipped.
    """
    dims = centre.shape[0]
    groups = (dims + 3) // 4
    greatest, clipped = 0.0, 0
    for row in rows:
        norm, error, beyond = 0, 0.0, 0
        base = (row // BLOCK) * groups * 64 + (row % BLOCK) * 4
        for d in range(4 * groups):
            code = 0.0
            if d < dims:
                place = (np.float64(keys[row, d]) - centre[d]) / step
                inside = min(max(place, -128.0), 127.0)
                code = np.rint(inside)
                error += (inside - code) * (inside - code)
                if place != inside:
                    beyond = 1
            norm += int(code) * int(code)
            codes[base + (d // 4) * 64 + d % 4] = np.uint8(int(code) + 128)
        halves[row] = -(norm >> 1)
        greatest, clipped = max(greatest, error), clipped + beyond
    return step * np.sqrt(greatest), clipped


@njit(cache=True, nogil=True)
def spread(keys, count, centre, out):
    """out[i] = the greatest |key - centre| over the dimensions of row i, for i < count."""
    for row in range(count):
        far = 0.0
        for d in range(centre.shape[0]):
            far = max(far, abs(np.float64(keys[row, d]) - centre[d]))
        out[row] = far


class Codes:
    """The codes of one table, with one centre and one step for all rows.

    Both are fitted anew at every doubling, and whenever too many rows were clipped (a few are left so on purpose: a single far key must not
    cost all others their resolution).

    Attributes: codes uint8 and halves int32 (aligned to 64 bytes), filled (rows known), centre float64 (D), step, slack (what float64 may
    lose in computing |e|), error (the greatest |e| of all rows, slack included).
    """

    def __init__(self, dims: int) -> None:
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"codes take 1 to {MAX_DIMS} dimensions, got {dims}")
        self.dims, self.filled = dims, 0
        self.codes, self.halves = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int32)
        self.centre = np.zeros(dims)
        self.step, self.slack, self.error = 1.0, 0.0, 0.0
        self._clipped, self._next_fit = 0, 1

    def written(self, keys: Tensor, rows: np.ndarray) -> None:
        """Takes in `rows` int64 (M) of `keys` float32 (capacity, D), which may be a larger copy of the tensor of the call before."""
        self._grow(keys)
        self.filled = max(self.filled, int(rows.max()) + 1)
        if self.filled >= self._next_fit:
            self._fit(keys.numpy())
            return
        self._encode(keys.numpy(), rows)
        if self._clipped > 32 + self.filled // 1024:
            self._fit(keys.numpy())

    def load(self, keys: Tensor, size: int) -> None:
        """Takes in the first `size` rows of `keys`."""
        if size:
            self._grow(keys)
            self.filled = size
            self._fit(keys.numpy())

    def _grow(self, keys: Tensor) -> None:
        if keys.dtype != torch.float32 or not keys.is_contiguous() or keys.shape[1] != self.dims:
            raise ValueError(f"keys must be contiguous float32 (capacity, {self.dims})")
        capacity = -(-keys.shape[0] // (2 * BLOCK)) * 2 * BLOCK
        if capacity <= self.halves.shape[0]:
            return
        # torch aligns to 64 bytes, as the kernel's loads demand; numpy does not.
        codes = torch.empty(capacity * (bytes_per_row(self.dims) - 4), dtype=torch.uint8)
        halves = torch.zeros(capacity, dtype=torch.int32)
        codes[: len(self.codes)], halves[: len(self.halves)] = self.codes, self.halves
        assert codes.data_ptr() % 64 == 0, "torch no longer aligns its memory"
        assert halves.data_ptr() % 64 == 0, "torch no longer aligns its memory"
        self.codes, self.halves = codes, halves

    def _fit(self, keys: np.ndarray) -> None:
        """Centre: median of a sample. Step: all but a few of the farthest rows lie within range, with a tenth to spare."""
        self.centre = np.median(keys[: self.filled : max(1, self.filled // 1024)], axis=0).astype(np.float64)
        far = np.empty(self.filled)
        spread(keys, self.filled, self.centre, far)
        place = max(self.filled - 9 - self.filled // 4096, self.filled // 2)
        radius = float(np.partition(far, place)[place]) or float(far.max()) or 127.0
        self.step = 1.1 * radius / 127
        # Subtraction, division and rounding lose less than 2^-51 of at most 128 steps in each dimension.
        self.slack = 2.0**-50 * 128 * self.step * math.sqrt(self.dims)
        self.error, self._clipped = 0.0, 0
        self._encode(keys, np.arange(self.filled))
        self._next_fit = 2 * self.filled

    def _encode(self, keys: np.ndarray, rows: np.ndarray) -> None:
        codes, halves = self.codes.numpy(), self.halves.numpy()
        greatest, clipped = encode(keys, rows, codes, halves, self.centre, self.step)
        self.error, self._clipped = max(self.error, greatest + self.slack), self._clipped + clipped
