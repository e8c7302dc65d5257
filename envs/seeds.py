"""Seeds of lanes from the seed of a run."""

from __future__ import annotations


def lane_seed(seed: int, lane: int) -> int:
    """The emulator seed, 0 .. 2^31 - 1, of one lane: SplitMix64 (Steele et al. 2014) of `seed` (any int), then of that and `lane`."""
    return splitmix64(splitmix64(seed) ^ lane) >> 33


def splitmix64(value: int) -> int:
    """The first output of SplitMix64 from state `value` modulo 2^64: 0 .. 2^64 - 1, one to one."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
