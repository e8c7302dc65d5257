"""Exact match: a 64-bit hash of raw frames, and an index from hash to row that lives on any device."""

from __future__ import annotations

import torch
from torch import Tensor

BUCKET = 16
MAX_LOAD = 0.7
FIRST_BUCKETS = 64

_MULTIPLIERS = (-7046029254386353131, -4417276706812531889, -8663945395140668459)


def _mix(word: Tensor) -> Tensor:
    """A bijection of int64 that spreads every bit over the word (multiply, shift and exclusive or; arithmetic wraps)."""
    for multiplier, shift in zip(_MULTIPLIERS, (32, 29, 32)):
        word = word * multiplier
        word = word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))
    return word


class FrameHash:
    """Hashes frames to 64 bits: a sum of mixed 8-byte words, each weighted by a random odd number of its place.

    The weights are fixed, so a hash is the same in every run, batch size and device. Two different frames agree with a
    probability of about 2^-58, a few in 10^18.
    """

    def __init__(self, numbers: int, device: torch.device) -> None:
        self._padding = -numbers % 8
        words = (numbers + self._padding) // 8
        self._weights = _mix(torch.arange(1, words + 1, device=device)) | 1

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 (B, ...) -> int64 (B)."""
        numbers = frames.reshape(frames.shape[0], -1)
        if self._padding:
            numbers = torch.nn.functional.pad(numbers, (0, self._padding))
        words = numbers.contiguous().view(torch.int64)
        words = words * _MULTIPLIERS[0]
        words = (words ^ ((words >> 29) & ((1 << 35) - 1))) * self._weights
        return _mix(words.sum(1))


def action_hashes(hashes: Tensor, num_actions: int) -> Tensor:
    """The hashes int64 (B, A) of (frame, action) pairs, from the frames' hashes int64 (B)."""
    actions = torch.arange(1, num_actions + 1, device=hashes.device)
    return _mix(hashes.unsqueeze(1) ^ _mix(actions))


class HashIndex:
    """From 64-bit hash to row number: buckets of 16 slots, and two buckets that a hash may lie in (the emptier one is taken).

    All operations are batched tensor operations, so the index lives on the CPU and on CUDA alike. A slot costs 12 bytes;
    the table doubles beyond a load of 0.7, so an entry costs 17 to 35 bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0
        self._allocate(FIRST_BUCKETS)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes now."""
        return self._hashes.nbytes + self._rows.nbytes

    @staticmethod
    def required_bytes(entries: int) -> int:
        """Bytes that the index takes with `entries` entries, the copy while it doubles included."""
        buckets = FIRST_BUCKETS
        while entries > MAX_LOAD * buckets * BUCKET:
            buckets *= 2
        return buckets * BUCKET * 12 * 3 // 2

    def lookup(self, hashes: Tensor) -> Tensor:
        """int64 (...) -> int64 (...): the rows, -1 where a hash is not in the index."""
        flat = hashes.reshape(-1)
        buckets = self._buckets(flat)
        rows = self._rows[buckets].reshape(flat.shape[0], -1)
        match = self._hashes[buckets].reshape(rows.shape) == flat.unsqueeze(1)  # an empty slot's row is -1, whatever its hash
        return torch.where(match, rows, -1).amax(1).reshape(hashes.shape).to(torch.int64)

    def insert(self, hashes: Tensor, rows: Tensor) -> None:
        """Adds int64 (M) hashes, none of them twice and none in the index yet, with their rows int64 (M)."""
        if self._count + hashes.shape[0] > MAX_LOAD * self._rows.numel():
            self._grow(self._count + hashes.shape[0])
        self._count += hashes.shape[0]
        self._fill(hashes, rows.to(torch.int32))

    def remove(self, hashes: Tensor) -> None:
        """Takes int64 (M) hashes out; each must be in the index."""
        buckets = self._buckets(hashes)
        match = (self._hashes[buckets] == hashes.view(-1, 1, 1)) & (self._rows[buckets] >= 0)
        which, choice, slot = match.nonzero(as_tuple=True)
        if which.unique().shape[0] != hashes.shape[0]:
            raise KeyError("a hash to be removed is not in the index")
        self._rows[buckets[which, choice], slot] = -1
        self._count -= hashes.shape[0]

    def _allocate(self, buckets: int) -> None:
        self._hashes = torch.zeros(buckets, BUCKET, dtype=torch.int64, device=self._device)
        self._rows = torch.full((buckets, BUCKET), -1, dtype=torch.int32, device=self._device)

    def _buckets(self, hashes: Tensor) -> Tensor:
        """int64 (M) -> int64 (M, 2), two different buckets for each hash."""
        mask = self._rows.shape[0] - 1
        first = hashes & mask
        second = (hashes >> 32) & mask
        return torch.stack([first, torch.where(second == first, first ^ 1, second)], dim=1)

    def _fill(self, hashes: Tensor, rows: Tensor) -> None:
        """Inserts in portions of a hash a bucket, so that the choice of the emptier bucket knows how full they are."""
        portion = self._rows.shape[0]
        for part, part_rows in zip(hashes.split(portion), rows.split(portion)):
            while part.shape[0]:
                waiting = self._place(part, part_rows)
                if waiting.shape[0] == part.shape[0]:
                    self._grow(0)
                part, part_rows = part[waiting], part_rows[waiting]

    def _place(self, hashes: Tensor, rows: Tensor) -> Tensor:
        """Puts each hash in the emptier of its buckets where room is left, and returns which (indices) found none."""
        buckets = self._buckets(hashes)
        used = (self._rows[buckets] >= 0).sum(2)
        bucket = buckets.gather(1, used.argmin(1, keepdim=True)).squeeze(1)
        bucket, order = bucket.sort(stable=True)
        place = torch.arange(bucket.shape[0], device=self._device)
        opens = torch.ones_like(bucket, dtype=torch.bool)
        opens[1:] = bucket[1:] != bucket[:-1]
        rank = place - torch.where(opens, place, 0).cummax(0).values
        taken = self._rows[bucket] >= 0
        free_first = taken.to(torch.uint8).sort(dim=1, stable=True).indices
        fits = rank < BUCKET - taken.sum(1)
        slot = free_first.gather(1, rank.clamp(max=BUCKET - 1).unsqueeze(1)).squeeze(1)
        self._hashes[bucket[fits], slot[fits]] = hashes[order][fits]
        self._rows[bucket[fits], slot[fits]] = rows[order][fits]
        return order[~fits]

    def _grow(self, entries: int) -> None:
        old_hashes, old_rows = self._hashes, self._rows
        buckets = old_rows.shape[0] * 2
        while entries > MAX_LOAD * buckets * BUCKET:
            buckets *= 2
        self._allocate(buckets)
        full = old_rows >= 0
        self._fill(old_hashes[full], old_rows[full])
