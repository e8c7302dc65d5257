"""Charts as inline SVG: shapes stretch with the page while strokes and words keep their size. Values for the pointer ride along as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_POINTS = 2000
_SIDE = 1000.0
_LARGEST = 1e15
Floats = NDArray[np.float64]
Range = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Attributes:
        name: in the legend.
        x: (n), any order; y: (n), where what is not finite makes a gap.
        low, high: (n), a band around y, or None.
        colour: of the palette, counted from 0.
        style: line, faint (thin, in the background), or dots (a line with its points).
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    colour: int = 0
    style: str = "line"


@dataclass(frozen=True)
class Mark:
    """A horizontal line at `value`, such as the score of random play."""

    name: str
    value: float


def thin(y: ArrayLike, most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Indices, ascending, of at most `most` of the n values: the ends, and the lowest and the highest of equal stretches, so peaks stay."""
    values = np.asarray(y, np.float64)
    n = len(values)
    if n <= most:
        return np.arange(n)
    edges = np.linspace(0, n, max(2, most // 2)).astype(np.int64)
    safe = np.nan_to_num(values, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    kept = {0, n - 1}
    for begin, end in pairwise(edges):
        stretch = safe[begin:end]
        kept |= {int(begin + stretch.argmin()), int(begin + stretch.argmax())}
    return np.array(sorted(kept))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step + 0.0 for index in range(first, min(last, first + 50) + 1)]


def label(value: float) -> str:
    """A number in few characters: 1,234.5, 1.2M, 0.034, 2e-05; an em dash where it is not finite."""
    if not math.isfinite(value):
        return "—"
    size, sign = abs(value), "−" if value < 0 else ""
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{sign}{size:.2g}"
    for least, unit, name in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least * (1 - 5e-6):  # so that 999,999 is 1M and not 1,000k
            return sign + f"{size / unit:.2f}".rstrip("0").rstrip(".") + name
    text = f"{size:,.0f}" if size >= 1000 else f"{size:.1f}" if size >= 100 else f"{size:.2f}" if size >= 1 else f"{size:.4f}"
    return sign + (text.rstrip("0").rstrip(".") if "." in text else text)


def line_chart(
    title: str, series: Sequence[Series], marks: Sequence[Mark] = (), x_name: str = "frames", tall: bool = False, percent: bool = False
) -> str:
    """A figure of curves over one x-axis. Empty where no curve has a finite point.

    A mark is drawn as a line where that leaves the curves at least half of the height; else it is named with an arrow only.

    Args:
        title: above the chart.
        series: at least one; together at most about 8,000 points are drawn.
        marks: horizontal lines to compare with.
        x_name: what x counts.
        tall: for the page's main chart.
        percent: y is a share 0..1, shown from 0 to 100 %.
    """
    most = min(MOST_POINTS, max(100, 8000 // max(1, len(series)))) if tall else min(600, max(60, 6000 // max(1, len(series))))
    drawn = [(one, points) for one, points in ((one, _prepare(one, most)) for one in series) if np.isfinite(points.y).any()]
    if not drawn:
        return ""
    x_range = _x_range(_extent([points.x for _, points in drawn]))
    y_range, shown = (0.0, 1.0), list(marks)
    if not percent:
        curves = [part for _, points in drawn for part in (points.y, points.low, points.high) if part is not None]
        y_range, shown = _with_marks(_extent(curves), marks)
    shapes = [_grid(y_range)]
    shapes += [f'<path class="mark" d="M0 {_r(_down(mark.value, y_range))}H1000"/>' for mark in shown]
    pointer = []
    for one, (x, y, low, high) in drawn:
        paint, across, down = colour(one.colour), _across(x, x_range), _down(y, y_range)
        told = {"n": one.name, "c": paint, "x": _numbers(x), "y": _numbers(y)}
        if low is not None and high is not None:
            shapes.append(f'<path class="band" style="{paint}" d="{_band(across, _down(low, y_range), _down(high, y_range))}"/>')
            told |= {"l": _numbers(low), "h": _numbers(high)}
        shapes.append(f'<path class="{one.style}" style="{paint}" d="{_path(across, down)}"/>')
        if one.style == "dots" and len(x) <= 120:
            shapes.append(f'<path class="dot" style="{paint}" d="{_points(across, down)}"/>')
        pointer.append(told)
    notes = [f"{mark.name} {label(mark.value)} {'↑' if mark.value > y_range[1] else '↓'}" for mark in marks if mark not in shown]
    lost = sum(int((~np.isfinite(np.asarray(one.y, np.float64))).sum()) for one in series)
    if lost:
        notes.append(f"{lost:,} of the values were not finite")
    legend = [(one.name, colour(one.colour)) for one, _ in drawn] if len(series) > 1 else []
    spoken = "; ".join(f"{one.name}: from {label(_ends(one.y)[0])} to {label(_ends(one.y)[1])}" for one, _ in drawn)
    frame = _Frame(title, x_range, y_range, x_name, tall, percent)
    return _figure(frame, shapes, legend, notes, pointer, shown, spoken)


def stacked_chart(title: str, names: Sequence[str], x: ArrayLike, parts: ArrayLike, x_name: str = "frames", percent: bool = False) -> str:
    """Bands on top of one another: `parts` (len(names), n) over x (n), where what is not finite counts as 0. Empty without points."""
    xs, ys = np.asarray(x, np.float64), np.nan_to_num(np.asarray(parts, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if not len(xs) or not len(names):
        return ""
    keep = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), max(60, 4000 // len(names)))).astype(np.int64))
    xs, ys = xs[keep], ys[:, keep]
    tops = np.cumsum(ys, axis=0)
    x_range = _x_range(_extent([xs]))
    if len(xs) == 1:
        xs, ys, tops = np.array(x_range), np.repeat(ys, 2, axis=1), np.repeat(tops, 2, axis=1)
    y_range = (0.0, 1.0 if percent else float(tops.max()) * 1.04 or 1.0)
    across = _across(xs, x_range)
    edges = _down(np.minimum(np.vstack([np.zeros_like(tops[:1]), tops]), y_range[1]), y_range)
    paints = [colour(index, len(names)) for index in range(len(names))]
    shapes = [f'<path class="area" style="{paint}" d="{_band(across, edges[i], edges[i + 1])}"/>' for i, paint in enumerate(paints)]
    shapes.append(_grid(y_range))
    pointer = [{"n": name, "c": paint, "x": _numbers(xs), "y": _numbers(part)} for name, paint, part in zip(names, paints, ys)]
    spoken = "; ".join(f"{name}: {label(float(part[-1]))} at the end" for name, part in zip(names, ys))
    frame = _Frame(title, x_range, y_range, x_name, False, percent)
    return _figure(frame, shapes, list(zip(names, paints)), [], pointer[::-1], [], spoken)


def colour(index: int, count: int = 0) -> str:
    """The palette's colour as an inline style; beyond eight series, evenly spaced hues."""
    return f"--c:var(--s{index % 8})" if count <= 8 else f"--c:hsl({index * 360 // count} 45% var(--hue-light))"


class _Frame(NamedTuple):
    title: str
    x_range: Range
    y_range: Range
    x_name: str
    tall: bool
    percent: bool


class _Points(NamedTuple):
    x: Floats
    y: Floats
    low: Floats | None
    high: Floats | None


def _figure(
    frame: _Frame,
    shapes: Sequence[str],
    legend: Sequence[tuple[str, str]],
    notes: Sequence[str],
    pointer: Sequence[dict[str, Any]],
    marks: Sequence[Mark],
    spoken: str,
) -> str:
    title, x_range, y_range, x_name, tall, percent = frame

    def place(value: float, ends: Range) -> float:
        return round((value - ends[0]) / (ends[1] - ends[0]) * 100, 2)

    def named(value: float) -> str:
        return f"{value:.0%}" if percent else label(value)

    keys = "".join(f'<li style="{paint}">{escape(name)}</li>' for name, paint in legend)
    y_labels = "".join(f'<span class="yt" style="bottom:{place(t, y_range)}%">{named(t)}</span>' for t in ticks(*y_range))
    x_labels = "".join(f'<span class="xt" style="left:{place(t, x_range)}%">{label(t)}</span>' for t in ticks(*x_range, 4))
    words = "".join(
        f'<span class="word" style="bottom:{place(value, y_range)}%">{escape(text)}</span>' for text, value in _merged(marks, y_range, tall)
    )
    values = json.dumps({"r": x_range, "u": x_name, "p": percent, "s": list(pointer)}, separators=(",", ":"), allow_nan=False)
    return (
        f'<figure class="chart{" tall" if tall else ""}{" marked" if marks else ""}" data-chart="{escape(values)}">'
        f"<figcaption>{escape(title)}{f'<ul>{keys}</ul>' if keys else ''}</figcaption>"
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(f"{title}. {spoken}")}">'
        f'{"".join(shapes)}</svg>{y_labels}{x_labels}{words}<i class="cursor" hidden></i><div class="tip" hidden></div></div>'
        f'<p class="axis">{escape(x_name)}{"".join(f"<em>{escape(note)}</em>" for note in notes)}</p></figure>'
    )


def _merged(marks: Sequence[Mark], y_range: Range, tall: bool) -> list[tuple[str, float]]:
    """Words for the marks; those that would print over one another share a line."""
    near = (y_range[1] - y_range[0]) * (0.075 if tall else 0.12)
    merged: list[tuple[str, float]] = []
    for mark in sorted(marks, key=lambda m: m.value):
        text = f"{mark.name} {label(mark.value)}"
        if merged and mark.value - merged[-1][1] < near:
            merged[-1] = (f"{merged[-1][0]} · {text}", merged[-1][1])
        else:
            merged.append((text, mark.value))
    return merged


def _prepare(one: Series, most: int) -> _Points:
    x, y = np.asarray(one.x, np.float64), np.array(one.y, np.float64)
    y[np.abs(y) > _LARGEST] = np.nan
    order = np.argsort(x, kind="stable")
    order = order[thin(y[order], most)]
    bands = [None if band is None else np.asarray(band, np.float64)[order] for band in (one.low, one.high)]
    return _Points(x[order], y[order], bands[0], bands[1])


def _extent(parts: Sequence[Floats]) -> Range:
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    return float(values.min()), float(values.max())


def _x_range(own: Range) -> Range:
    """From 0 where the curves begin near it; of some width even for one point."""
    low, high = own
    if 0 < low <= 0.15 * high:
        low = 0.0
    return (low, high) if high > low else (low - 1, high + 1)


def _ends(y: ArrayLike) -> tuple[float, float]:
    values = np.asarray(y, np.float64)
    values = values[np.isfinite(values)]
    return (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)


def _r(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _across(x: Floats, x_range: Range) -> Floats:
    return (x - x_range[0]) / (x_range[1] - x_range[0]) * _SIDE


def _down(y: Any, y_range: Range) -> Any:
    return _SIDE - (y - y_range[0]) / (y_range[1] - y_range[0]) * _SIDE


def _grid(y_range: Range) -> str:
    return '<path class="grid" d="' + "".join(f"M0 {_r(_down(value, y_range))}H1000" for value in ticks(*y_range)) + '"/>'


def _with_marks(own: Range, marks: Sequence[Mark]) -> tuple[Range, list[Mark]]:
    """The range to draw, margin included, and the marks within it: near ones are let in while the curves keep half of the height."""
    low, high = own
    shown: list[Mark] = []
    for mark in sorted((m for m in marks if math.isfinite(m.value)), key=lambda m: max(own[0] - m.value, m.value - own[1])):
        if max(high, mark.value) - min(low, mark.value) <= max(2 * (own[1] - own[0]), high - low):
            low, high = min(low, mark.value), max(high, mark.value)
            shown.append(mark)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return (low - margin, high + margin), shown


def _path(x: Floats, y: Floats) -> str:
    """A line through the finite points; a point alone between gaps becomes a dot (a line of no length with round ends)."""
    parts, pen = [], False
    finite = np.isfinite(y)
    for index in range(len(x)):
        if finite[index]:
            parts.append(f"{'L' if pen else 'M'}{_r(x[index])} {_r(y[index])}")
            if not pen and (index + 1 == len(x) or not finite[index + 1]):
                parts.append("h0")
        pen = bool(finite[index])
    return "".join(parts)


def _points(x: Floats, y: Floats) -> str:
    return "".join(f"M{_r(a)} {_r(b)}h0" for a, b in zip(x, y) if np.isfinite(b))


def _band(x: Floats, low: Floats, high: Floats) -> str:
    use = np.isfinite(low) & np.isfinite(high)
    if not use.any():
        return ""
    there = [f"{_r(a)} {_r(b)}" for a, b in zip(x[use], high[use])]
    back = [f"{_r(a)} {_r(b)}" for a, b in zip(x[use][::-1], low[use][::-1])]
    return "M" + "L".join(there + back) + "Z"


def _numbers(values: Floats) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
