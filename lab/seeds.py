"""Curves of several seeds, or games, as one. A run that was stopped and went on is evaluated at other frames than its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[int, float]]
"""Rows (frames, score), frames rising."""


def at_shared_frames(curves: Sequence[Curve]) -> tuple[list[int], np.ndarray]:
    """Frames at which all curves have something to say, and what they say there, float64 (curves, frames).

    Where all curves have the same frames these are they. Else they are all frames of any curve that lie within every curve, and a
    curve that has no row there is taken as straight between its neighbours.
    """
    if not curves or not all(curves):
        return [], np.zeros((len(curves), 0))
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    frames = sorted({at for curve in curves for at, _ in curve if first <= at <= last})
    return frames, np.array([np.interp(frames, [at for at, _ in curve], [score for _, score in curve]) for curve in curves])
