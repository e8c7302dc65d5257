"""SimHash counts: frames by the signs of a random projection, and how often each code was seen. The simple rival of learnt densities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from envs.api import UserError
from generative.api import Recoding
from generative.grey_levels import grey_shape, quantise

WORD = 62  # bits of a code in an int64, clear of its sign
STEPS = 4_096  # of a projection's entries in one standard deviation
RECENT = 4_096  # codes that are kept apart until they are merged with the others
ROWS = 1_024  # frames that are compared with each other at a time
_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)


def _merge(codes: Tensor, counts: Tensor, more: Tensor, more_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Two sorted lists int64 of different codes, with their counts, as one."""
    order = torch.arange(len(more), device=more.device) + torch.searchsorted(codes, more)
    merged, merged_counts = codes.new_empty(len(codes) + len(more)), counts.new_empty(len(codes) + len(more))
    old = torch.ones(len(merged), dtype=torch.bool, device=codes.device)
    old[order] = False
    merged[order], merged_counts[order] = more, more_counts
    merged[old], merged_counts[old] = codes, counts
    return merged, merged_counts


class HashCounts:
    """The empirical density of frames' SimHash codes (Tang et al. 2017, section 2.2): p(x) = how often x's code was seen / frames seen.

    A code holds the signs of `bits` projections of the frame on random Gaussian directions, 1 for 0 and above. Frames are put on [-1, 1]
    first; the paper leaves that open. Directions are rounded to 1/4096 and products summed exactly, so that a frame has the same code in
    any batch and on any device. Codes of up to 62 bits are counted as they are; longer ones by a fingerprint of 62 bits, which two of
    10^7 codes share with a probability of about 10^-5.

    Frames of one `absorb` are counted one after another. The recoding is exact, so a pseudo-count N = p (1 - p') / (p' - p) equals the true
    count, with two edges. A frame whose code is new has log-probability -inf before: its gain is inf and its pseudo-count 0, the limit of
    the formula. While every frame seen has had one and the same code, p = p' = 1, the gain is 0 and the pseudo-count inf; `count` knows.

    Memory grows with the codes seen, 16 bytes each.

    Args:
        obs_shape: (1, H, W) of the frames, any size.
        num_actions: unused, every model takes it.
        device: where the counts lie.
        bits: of a code; more tell more frames apart. The paper has 256 for raw pixels.
        levels: grey levels that frames are cut to first, 2 to 256; 256, the paper's, keeps them as they are.
    """

    exact = True
    updates_per_frame = 1.0

    def __init__(
        self, obs_shape: tuple[int, int, int], num_actions: int, device: torch.device | str, bits: int = 256, levels: int = 256
    ) -> None:
        if bits < 1:
            raise UserError(f"bits must be at least 1, got {bits}")
        self.obs_shape, self.levels, self.bits = grey_shape(obs_shape, levels, "hash counting"), levels, bits
        self.device = torch.device(device)
        self.frames = 0
        directions = (torch.randn(bits, math.prod(self.obs_shape)) * STEPS).round()
        self._directions = directions.clamp(-(1 << 15), (1 << 15) - 1).to(torch.int16).to(self.device)
        self._matrix = self._directions.t().double()
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self._lists = [(nothing, nothing), (nothing, nothing)]  # sorted codes with their counts: the many, and the recent

    def __len__(self) -> int:
        """Codes seen."""
        return sum(len(codes) for codes, _ in self._lists)

    @property
    def nbytes(self) -> int:
        """Bytes that directions and counts take now."""
        return self._directions.nbytes + self._matrix.nbytes + 16 * len(self)

    def required_bytes(self, frames: int) -> int:
        """Bytes that directions and counts take after `frames` frames of which no two share a code, a merge included."""
        return self._directions.nbytes * 5 + frames * 42

    def codes(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> int64 (B), from 0 to 2^62 - 1. UserError for frames of another shape."""
        shown = quantise(frames.to(self.device), self.levels, self.obs_shape, "hash counting").flatten(1)
        centred = shown.double() * 2 - (self.levels - 1)
        signs = (centred @ self._matrix >= 0).long()
        code = torch.zeros(len(signs), dtype=torch.int64, device=self.device)
        for word in signs.split(WORD, 1):
            if self.bits > WORD:
                code = self._mix(code)
            code = code ^ (word << torch.arange(word.shape[1], device=self.device)).sum(1)
        return code if self.bits <= WORD else self._mix(code) & ((1 << WORD) - 1)

    def count(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> int64 (B): how often each frame's code was seen."""
        return sum((self._find(codes, counts, self.codes(frames))[0] for codes, counts in self._lists), torch.zeros((), dtype=torch.int64))

    def log_prob(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> float64 (B), nats; -inf for a code that was never seen. Learns nothing."""
        return self.count(frames).double().log() - math.log(max(self.frames, 1))

    def absorb(self, frames: Tensor) -> Recoding:
        """Counts uint8 (B, 1, H, W) frames, one after another. float64 (B) nats of each just before and just after; see the class."""
        parts = [self._absorb(part) for part in self.codes(frames).split(ROWS)]
        before, after = (torch.cat(each) for each in zip(*parts))
        return Recoding(before, after)

    def state_dict(self) -> dict[str, Any]:
        """Directions int16 (bits, H W), codes int64 (M), ascending, counts int64 (M), and frames seen."""
        codes, counts = _merge(*self._lists[0], *self._lists[1])
        return {"directions": self._directions, "codes": codes, "counts": counts, "frames": self.frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. UserError where it was made with other bits or for other frames."""
        if state["directions"].shape != self._directions.shape:
            here, there = (tuple(found.shape) for found in (self._directions, state["directions"]))
            raise UserError(
                f"the checkpoint's hash counts are of another shape ({there} directions there, {here} here): set bits as it was"
            )
        self._directions = state["directions"].to(self.device)
        self._matrix = self._directions.t().double()
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self._lists = [(state["codes"].to(self.device), state["counts"].to(self.device).clone()), (nothing, nothing)]
        self.frames = int(state["frames"])

    def to(self, device: torch.device | str) -> HashCounts:
        """The same counts, on `device`."""
        self.device = torch.device(device)
        self._directions, self._matrix = self._directions.to(self.device), self._matrix.to(self.device)
        self._lists = [(codes.to(self.device), counts.to(self.device)) for codes, counts in self._lists]
        return self

    def _absorb(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Counts codes int64 (b), b at most ROWS; float64 (b) nats before and after."""
        seen, new = torch.zeros_like(keys), torch.ones_like(keys, dtype=torch.bool)
        for codes, counts in self._lists:
            number, place, found = self._find(codes, counts, keys)
            seen += number
            new &= ~found
            counts.index_add_(0, place[found], torch.ones_like(place[found]))
        earlier = (keys.unsqueeze(1) == keys).tril(-1).sum(1)
        order = self.frames + torch.arange(len(keys), device=self.device, dtype=torch.float64)
        before = (seen + earlier).double().log() - order.clamp(min=1).log()
        after = (seen + earlier + 1).double().log() - (order + 1).log()
        self.frames += len(keys)
        self._lists[1] = _merge(*self._lists[1], *torch.unique(keys[new], return_counts=True))
        if len(self._lists[1][0]) > RECENT:
            nothing = keys[:0]
            self._lists = [_merge(*self._lists[0], *self._lists[1]), (nothing, nothing)]
        return before, after

    @staticmethod
    def _find(codes: Tensor, counts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(counts of keys int64 (b), 0 where there is none; their places; whether they are there)."""
        if len(codes) == 0:
            return torch.zeros_like(keys), torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(codes, keys).clamp(max=len(codes) - 1)
        found = codes[place] == keys
        return torch.where(found, counts[place], 0), place, found

    @staticmethod
    def _mix(code: Tensor) -> Tensor:
        """A bijection of int64 that spreads every bit over the word; arithmetic wraps."""
        for multiplier, shift in zip(_MULTIPLIERS, (32, 29)):
            code = code * multiplier
            code = code ^ ((code >> shift) & ((1 << (64 - shift)) - 1))
        return code
