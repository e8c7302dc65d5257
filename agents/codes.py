"""uint8 codes of one table of keys, kept in step with it: what the `scan` search reads instead of the keys.

**Layout.** Codes are uint8 [block of 16 rows][dims / 4][row of 16][4], dims padded to a multiple of four; beside them one int32 a row,
minus half the squared norm of its code (`ALWAYS` where the row must pass every filter). A code c stands for u = c - 128, and a key is
centre + step * u + e. `agents.scan` says what the bound on |e| is for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

BLOCK = 16  # rows a vector of int32 sums
ALWAYS = 1 << 30
MAX_DIMS = 8192  # keeps every int32 sum below ALWAYS


def bytes_per_row(dims: int) -> int:
    """Bytes a row of `dims` dimensions takes beside its key."""
    return (dims + 3) // 4 * 4 + 4


@njit(cache=True, nogil=True)
def encode(keys, rows, codes, halves, centre, step, cap, slack):
    """Writes codes and half norms of `rows` int64 (M) of `keys` float32 (capacity, D), a row with |e| > cap as one that always passes.

    Returns the greatest |e| of the other rows, and by how many the rows that always pass have grown more.
    """
    dims = centre.shape[0]
    groups = (dims + 3) // 4
    greatest, more = 0.0, 0
    for row in rows:
        norm, error = 0, 0.0
        base = (row // BLOCK) * groups * 64 + (row % BLOCK) * 4
        for d in range(4 * groups):
            code = 0.0
            if d < dims:
                value = np.float64(keys[row, d])
                code = min(max(np.rint((value - centre[d]) / step), -128.0), 127.0)
                gap = value - (centre[d] + step * code)
                error += gap * gap
            norm += int(code) * int(code)
            codes[base + (d // 4) * 64 + d % 4] = np.uint8(int(code) + 128)
        error = np.sqrt(error) + slack
        if halves[row] == ALWAYS:
            more -= 1
        if error <= cap:
            halves[row] = -(norm >> 1)
            greatest = max(greatest, error)
        else:
            halves[row] = ALWAYS
            more += 1
    return greatest, more


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

    Both are fitted anew at every doubling, and whenever too many rows lie beyond the range (such rows pass every filter and are
    measured in every search: a single far key must not cost all others their resolution).

    Attributes: codes uint8 and halves int32 (aligned to 64 bytes), filled (rows known), centre float64 (D), step, slack (what float64 may
    lose in computing |e|), error (the greatest |e| of the filtered rows, slack included).
    """

    def __init__(self, dims: int) -> None:
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"codes take 1 to {MAX_DIMS} dimensions, got {dims}")
        self.dims, self.filled = dims, 0
        self.codes, self.halves = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int32)
        self.centre = np.zeros(dims)
        self.step, self.slack, self.error = 1.0, 0.0, 0.0
        self._cap, self._beyond, self._next_fit = 0.0, 0, 1

    def written(self, keys: Tensor, rows: np.ndarray) -> None:
        """Takes in `rows` int64 (M) of `keys` float32 (capacity, D), which may be a larger copy of the tensor of the call before."""
        self._grow(keys)
        self.filled = max(self.filled, int(rows.max()) + 1)
        if self.filled >= self._next_fit:
            self._fit(keys.numpy())
            return
        self._encode(keys.numpy(), rows)
        if self._beyond > 32 + self.filled // 1024:
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
        root = math.sqrt(self.dims)
        self.slack = 2.0**-50 * (float(np.abs(self.centre).max()) + 128 * self.step) * root
        self._cap = 0.5 * self.step * root * 1.000001 + 2 * self.slack
        self.error, self._beyond = 0.0, 0
        self.halves.zero_()
        self._encode(keys, np.arange(self.filled))
        self._next_fit = 2 * self.filled

    def _encode(self, keys: np.ndarray, rows: np.ndarray) -> None:
        codes, halves = self.codes.numpy(), self.halves.numpy()
        greatest, more = encode(keys, rows, codes, halves, self.centre, self.step, self._cap, self.slack)
        self.error, self._beyond = max(self.error, greatest), self._beyond + more
