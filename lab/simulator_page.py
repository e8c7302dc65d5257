"""What job=evaluate_simulator found, as a page that opens without a network: curves, a table, and films side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lab.curves import Mark, Series, line_chart
from lab.report import frame

CURVES = {
    "psnr": "Peak signal-to-noise ratio in decibels (higher is better)",
    "mse": "Mean squared error of a pixel, on the scale of 0 to 1",
    "ssim": "Structural similarity (1: the same picture)",
    "moving_mse": "Mean squared error of pixels that move",
}


def page(title: str, facts: str, results: Mapping[str, Mapping[str, Any]], films: Mapping[str, Path]) -> str:
    """HTML. `results` by simulator, as in results.json; `films` are embedded, columns are the same clips in each."""
    body = "".join((_table(results), _errors(results), _control(results), _films(films), _counterfactual_note(results)))
    return frame(
        title,
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(facts)}</p></header><main>{body}</main>',
        "All numbers are in results.json and errors.csv beside this page.",
    )


def _errors(results: Mapping[str, Mapping[str, Any]]) -> str:
    charts = []
    for key, words in CURVES.items():
        series = [
            Series(name, range(1, len(found["errors"][key]) + 1), np.array(found["errors"][key], np.float64), colour=index)
            for index, (name, found) in enumerate(results.items())
        ]
        charts.append(line_chart(words, series, x_name="steps ahead", tall=key == "psnr"))
    return f'<h2>How far ahead it sees</h2>{charts[0]}<div class="trio">{"".join(charts[1:])}</div>'


def _control(results: Mapping[str, Mapping[str, Any]]) -> str:
    series, marks = [], {}
    for index, (name, found) in enumerate(results.items()):
        scores = dict(found.get("control") or {})
        if scores:
            marks["random play"] = scores.pop("random")["mean"]
            every = sorted(int(steps) for steps in scores)
            series.append(Series(name, every, [scores[str(steps)]["mean"] for steps in every], colour=index, style="dots"))
    if not series:
        return ""
    drawn = [Mark(name, value) for name, value in marks.items()]
    return "<h2>Playing on foretold frames</h2>" + line_chart("Mean return", series, drawn, "steps between two true frames", tall=True)


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    columns: Sequence[tuple[str, Any]] = (
        ("PSNR at 1", lambda found: _at(found, 1)),
        ("at 10", lambda found: _at(found, 10)),
        ("at the end", lambda found: _at(found, len(found["errors"]["psnr"]))),
        ("reward precision", lambda found: _share(found["events"]["reward"]["precision"])),
        ("recall", lambda found: _share(found["events"]["reward"]["recall"])),
        ("end precision", lambda found: _share(found["events"]["end"]["precision"])),
        ("recall", lambda found: _share(found["events"]["end"]["recall"])),
        ("actions told apart", lambda found: _share((found.get("counterfactuals") or {}).get("recall"))),
        ("overlap", lambda found: _share((found.get("counterfactuals") or {}).get("overlap"))),
        ("steps/s", lambda found: f"{found['steps_per_second']:,.0f}" if found.get("steps_per_second") else "—"),
    )
    head = "".join(f"<th>{name}" for name, _ in columns)
    rows = "".join(f"<tr><th>{escape(name)}" + "".join(f"<td>{cell(found)}" for _, cell in columns) for name, found in results.items())
    return f'<h2>At a glance</h2><div class="wide"><table><thead><tr><th>simulator{head}</thead><tbody>{rows}</tbody></table></div>'


def _films(films: Mapping[str, Path]) -> str:
    figures = []
    for name, path in films.items():
        source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        video = f'<video controls loop muted autoplay playsinline aria-label="{escape(name)}" src="{source}"></video>'
        figures.append(f'<figure style="flex:1 1 28rem">{video}<figcaption>{escape(name)}</figcaption></figure>')
    note = "A column a clip: the truth above, then what the simulator says open-loop, then where the two differ."
    return f'<h2>Side by side</h2><p class="note">{note}</p><div class="films">{"".join(figures)}</div>'


def _counterfactual_note(results: Mapping[str, Mapping[str, Any]]) -> str:
    tried = [found["counterfactuals"] for found in results.values() if found.get("counterfactuals")]
    if not tried:
        return ""
    pairs = f"{tried[0]['pairs']:,} pairs of actions that lead to other pictures in the live world"
    told = f"Actions: of {pairs}, how many do in the simulator, and how well the places agree (intersection over union)."
    return f'<p class="note">{told}</p>'


def _at(found: Mapping[str, Any], steps: int) -> str:
    values = found["errors"]["psnr"]
    return f"{values[steps - 1]:.1f}" if len(values) >= steps and values[steps - 1] is not None else "—"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.0f} %"
