"""The lines that end a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.logging import read_evaluation, read_metrics
from lab.protocols import SCORES, human_normalised, mean_interval

FLAT_GAIN = 0.02  # of the way from random play to a human, below which a curve counts as flat
SHOWCASE = 'make run ARGS="agent=episodic_control env=Qbert experiment=demo"'


def summarise(folder: Path, settings: Mapping[str, Any], recent: Sequence[float]) -> str:
    """Score before and after with bootstrap intervals, speed, and where report and video are.

    Args:
        recent: raw returns of the last training episodes, at most 100, which some protocols call the score.
    """
    episodes = read_evaluation(folder)
    metrics = read_metrics(folder)
    lines = ["", f"run      {folder}"]
    first, final = _returns_at(episodes, first=True), _returns_at(episodes, first=False)
    if len({episode["frames"] for episode in episodes}) == 1:
        first = []
    game = str(settings["choices"]["env"])
    if final:
        before, after = mean_interval(first), mean_interval(final)
        lines.append("score    " + (f"before {_interval(before)}   after " if first else "") + _interval(after))
        normalised = human_normalised(game, after[0])
        if normalised is not None:
            lines.append(f"human    {100 * normalised:.1f} % of the way from random play to a professional tester")
        if (settings.get("protocol") or {}).get("name") == "machado2018" and recent:
            lines.append(f"protocol score (last {len(recent)} training episodes) {_interval(mean_interval(recent))}")
    if metrics:
        speeds = [row["speed/frames_per_second"] for row in metrics if "speed/frames_per_second" in row]
        frames = metrics[-1]["frames"]
        if speeds:
            lines.append(f"speed    {sorted(speeds)[len(speeds) // 2]:,.0f} frames/s (median), {frames:,.0f} frames played")
    lines.append(f"report   {folder / 'report.html'}")
    videos = sorted((folder / "videos").glob("iteration-*.mp4"))
    if videos:
        lines.append(f"video    {videos[-1]}")
    if first and final and game in SCORES and game != "Qbert" and _is_flat(game, before, after):
        lines.append(f"{game} did not rise in these frames; a game that does: {SHOWCASE}")
    return "\n".join(lines)


def _returns_at(episodes: Sequence[Mapping[str, Any]], first: bool) -> list[float]:
    if not episodes:
        return []
    frames = (min if first else max)(episode["frames"] for episode in episodes)
    return [episode["return"] for episode in episodes if episode["frames"] == frames]


def _interval(interval: tuple[float, float, float]) -> str:
    return f"{interval[0]:,.1f} ({interval[1]:,.1f} to {interval[2]:,.1f})"


def _is_flat(game: str, before: tuple[float, float, float], after: tuple[float, float, float]) -> bool:
    """The intervals overlap, or less than 2 % of the way from random play to a human was gained."""
    if after[1] <= before[2]:
        return True
    return after[0] - before[0] < FLAT_GAIN * abs(SCORES[game].human - SCORES[game].random)
