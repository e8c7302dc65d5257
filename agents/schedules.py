"""Schedules: pure functions of time in environment frames."""

from __future__ import annotations


def linear(frame: int, start: float, end: float, frames: int) -> float:
    """`start` at frame 0, `end` from frame `frames` on, a straight line between."""
    if frames <= 0:
        return end
    share = min(max(frame / frames, 0.0), 1.0)
    return start + share * (end - start)
