"""report.html of a run folder: one page that opens from disk with no network, written again and again while the run goes on."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from lab import report_sections as sections
from lab.curves import Floats
from lab.folder import find_folder
from lab.logging import read_evaluation, read_metrics
from lab.report_sections import Run
from lab.report_style import CSS, SCRIPT

MOST_ROWS = 6_000
MOST_TEXT = 1_000_000


def write_report(folder: Path | str) -> Path:
    """Writes report.html into the run folder in one stroke, whatever of the run is there yet, and returns its path.

    Everything is read as the work of a stranger: nothing is executed, all text is escaped, links in the folder are not followed, and
    the page itself may load nothing from anywhere.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    folder = Path(folder)
    path = folder / "report.html"
    beside = folder / f".report.{os.getpid()}.writing"
    try:
        beside.write_text(page(read_run(folder)), encoding="utf-8", errors="replace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def read_run(folder: Path | str) -> Run:
    """What the run folder holds. What is missing or damaged stays empty; long logs are thinned."""
    folder = Path(folder)
    run = Run(folder)
    run.config_text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(run.config_text)
    except (yaml.YAMLError, RecursionError, ValueError):
        config = None
    run.config = config if isinstance(config, dict) else {}
    try:
        versions = json.loads(_text(folder / "version.json") or "{}")
    except (ValueError, RecursionError):
        versions = None
    run.versions = versions if isinstance(versions, dict) else {}
    run.columns = _columns(read_metrics(folder, MOST_ROWS))
    episodes = read_evaluation(folder)
    run.evaluations = sections.evaluations(episodes)
    _name(run, episodes)
    ends = [float(x.max()) for name, (x, _) in run.columns.items() if len(x) and not name.startswith("fit/")]
    run.frames = int(max([0.0, *ends, *(float(e.frames) for e in run.evaluations)]))
    total = run.config.get("frames")
    run.total_frames = max(total, run.frames) if isinstance(total, int) and not isinstance(total, bool) and total > 0 else None
    return run


def page(run: Run) -> str:
    """The report as HTML."""
    body = "".join(
        section(run)
        for section in (
            sections.tiles,
            sections.learning,
            sections.films,
            sections.time_budget,
            sections.memory,
            sections.fitting,
            sections.pictures,
            sections.others,
            sections.settings,
        )
    )
    title = " · ".join(filter(None, (run.agent, run.env, "Reverie")))
    return frame(
        title, f"{sections.headline(run)}<main>{body}</main>", "All numbers are in metrics.jsonl and evaluation.csv beside this page."
    )


def frame(title: str, body: str, note: str) -> str:
    """A page as HTML. Its policy allows the script by its checksum alone, and pictures and videos only from within the page."""
    checksum = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'; img-src data:; media-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>{body}"
        f"<footer>Written by Reverie, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}. {note}</footer>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _name(run: Run, episodes: list[dict[str, Any]]) -> None:
    """Agent, world, protocol and seed from the configuration, else from the folder's name <agent>-<env>-<seed>-<time>."""
    config = run.config
    raw = config.get("choices")
    choices: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    from_name = re.fullmatch(r"([A-Za-z]\w*)-([A-Za-z]\w*)-(\d+)-.*", run.folder.resolve().name)
    spare = from_name.groups() if from_name else ("", "", "")
    run.job = _word(choices.get("job")) or _word(config.get("job")) or "train"
    model = _word(choices.get("simulator")) or _word(choices.get("model"))
    run.agent = model if run.job == "fit" and model else _word(choices.get("agent")) or _word(config.get("agent")) or spare[0]
    run.env = _word(choices.get("env")) or _word(config.get("env")) or spare[1]
    protocols = [str(episode["protocol"]) for episode in episodes[-1:] if episode.get("protocol")]
    run.protocol = protocols[0] if protocols else _word(config.get("protocol"))
    seed = config.get("seed")
    run.seed = str(seed) if isinstance(seed, (int, str)) else spare[2]


def _word(node: object) -> str:
    """A name, from itself or from a section of the configuration that has a name."""
    if isinstance(node, Mapping):
        node = node.get("name")
    return node if isinstance(node, str) and node != "null" else ""


def _columns(rows: list[dict[str, float | str]]) -> dict[str, tuple[Floats, Floats]]:
    """Name -> (x ascending, y), x in frames, for fit/ in updates. Names and numbers without a finite value are left out."""
    gathered: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        frames, update = row["frames"], row.get("fit/update")
        for name, value in row.items():
            if name in {"frames", "iteration"} or isinstance(value, str):
                continue
            x = update if name.startswith("fit/") and isinstance(update, float) and math.isfinite(update) else frames
            xs, ys = gathered.setdefault(name, ([], []))
            xs.append(float(x))
            ys.append(value)
    columns = {}
    for name, points in gathered.items():
        at, numbers = np.array(points[0]), np.array(points[1])
        order = np.argsort(at, kind="stable")
        if np.isfinite(numbers).any():
            columns[name] = (at[order], numbers[order])
    return columns


def _text(path: Path) -> str:
    try:
        if path.is_symlink():
            return ""
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_TEXT)
    except OSError:
        return ""


def run(cfg: Any) -> int:
    """job=report: writes the report of a run folder again."""
    path = write_report(find_folder(str(cfg.run), "run"))
    print(f"report   {path}")
    return 0
