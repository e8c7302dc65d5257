"""The sections of a run's report, each a function from what the run folder holds to HTML (empty where there is nothing to show)."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from lab.curves import Floats, Mark, Series, colour, label, line_chart, stacked_chart
from lab.protocols import PUBLISHED_FRAMES, PUBLISHED_SOURCE, SCORES, human_normalised, mean_interval

MOST_EVALUATIONS = 300
MOST_CHARTS = 48
EMBED_BYTES = 4_000_000
EMBEDDED_VIDEOS = 3
PARTS = ("env", "act", "learn", "density", "observe", "log")
PART_WORDS = {
    "env": "waiting for the emulators",
    "act": "choosing actions",
    "learn": "learning",
    "density": "scoring novelty",
    "observe": "taking in what happened",
    "log": "logging and all else",
}


@dataclass(frozen=True)
class Evaluation:
    """Scores of the episodes of one evaluation: raw returns, with a 95 % bootstrap interval of their mean."""

    frames: int
    returns: tuple[float, ...]
    mean: float
    low: float
    high: float


@dataclass
class Run:
    """What a run folder holds, as far as it could be read. Names that are not known are empty, numbers None."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    columns: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    job: str = "train"
    agent: str = ""
    env: str = ""
    protocol: str = ""
    seed: str = ""
    frames: int = 0
    total_frames: int | None = None


def evaluations(episodes: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Groups episodes by frames; of more than 300 evaluations, evenly chosen ones with the first and the last."""
    groups: dict[int, list[float]] = {}
    for episode in episodes:
        if math.isfinite(episode["return"]):
            groups.setdefault(episode["frames"], []).append(episode["return"])
    frames = sorted(groups)
    chosen = sorted({round(at) for at in np.linspace(0, len(frames) - 1, min(len(frames), MOST_EVALUATIONS))})
    return [Evaluation(frames[i], tuple(groups[frames[i]]), *mean_interval(groups[frames[i]], resamples=1000)) for i in chosen]


def headline(run: Run) -> str:
    """Title, what was run, and the figures that matter most."""
    if run.job == "fit":
        title = f"{escape(run.agent or 'model')} <span>fitted</span>"
    else:
        title = f"{escape(run.agent or 'agent')} <span>plays</span> {escape(run.env or 'an unknown world')}"
    bonus = run.config.get("bonus")
    density = _choice(run, "density") if bonus else ""
    if density and isinstance(bonus, Mapping) and bonus.get("allow_bound") is True:
        density += " (bounds allowed: where it gives only a bound, counts are those of the bound)"
    facts = [("protocol", run.protocol), ("seed", run.seed), ("encoder", _choice(run, "encoder")), ("density", density)]
    facts += [("bonus", _choice(run, "bonus") if bonus else ""), ("simulator", _choice(run, "simulator") if run.job != "fit" else "")]
    world = run.config.get("env")
    if isinstance(world, Mapping) and world.get("backend") == "envpool":
        facts.append(("backend", "envpool"))
    lead = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts if value)
    return f'<header><h1>{title}</h1><p class="lead">{lead}<span>{escape(run.folder.resolve().name)}</span></p></header>'


def tiles(run: Run) -> str:
    """Score before and after, human-normalised score, frames done, speed."""
    shown = [_score_tile(run), _human_tile(run), _frames_tile(run), _speed_tile(run), _fit_tile(run)]
    return f'<div class="tiles">{"".join(shown)}</div>'


def learning(run: Run) -> str:
    """Evaluation scores with intervals, training returns behind them, and the scores of others as lines."""
    series = []
    if "train/return_mean" in run.columns:
        series.append(Series("training episodes, mean", *run.columns["train/return_mean"], colour=7, style="faint"))
    if run.evaluations:
        frames, means, lows, highs = zip(*[(e.frames, e.mean, e.low, e.high) for e in run.evaluations])
        series.append(Series("evaluation, mean with 95 % interval", frames, means, lows, highs, colour=0, style="dots"))
    known = SCORES.get(run.env)
    marks = []
    if known:
        at = f"at {label(PUBLISHED_FRAMES)}"
        marks = [Mark("random", known.random), Mark("human", known.human), Mark(f"MFEC {at}", known.mfec), Mark(f"NEC {at}", known.nec)]
    chart = line_chart("Return per episode, in the game's own points", series, marks, tall=True)
    if not chart:
        return (
            "<h2>Learning</h2><p>No episode has ended yet. The curve appears with the first evaluation.</p>" if run.job == "train" else ""
        )
    source = f" MFEC and NEC after {label(PUBLISHED_FRAMES)} frames: {PUBLISHED_SOURCE}." if known else ""
    note = f'<p class="note">Intervals show how far the episodes of this one run differ, not how far seeds do.{source}</p>'
    return f"<h2>Learning</h2>{chart}{note}{_evaluation_table(run)}"


def films(run: Run) -> str:
    """The first video and the newest ones, within the page where they are small, else as links."""
    videos = sorted(_files(run.folder / "videos", ".mp4", lambda head: head[4:8] == b"ftyp"))
    if not videos:
        return ""
    chosen = videos[-EMBEDDED_VIDEOS:]
    if videos[0] not in chosen:
        chosen = [videos[0], *chosen[1:]]
    figures, links = [], []
    for path in videos:
        name = escape(_title(path))
        if path in chosen and path.stat().st_size <= EMBED_BYTES:
            source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
            video = f'<video controls loop muted playsinline preload="metadata" aria-label="{name}" src="{source}"></video>'
            figures.append(f"<figure>{video}<figcaption>{name}</figcaption></figure>")
        else:
            links.append(f'<a href="videos/{quote(path.name)}">{name}</a>')
    more = f'<p class="note">Also on disk: {", ".join(links[-24:])}</p>' if links else ""
    heading = "What it foretells" if run.job == "fit" else "How it plays"
    return f'<h2>{heading}</h2><div class="films">{"".join(figures)}</div>{more}'


def time_budget(run: Run) -> str:
    """Where the wall time went: shares over the run, and in all."""
    present = [name.removeprefix("time/") for name in run.columns if name.startswith("time/")]
    names = [name for name in PARTS if name in present] + [name for name in present if name not in PARTS]
    if not names:
        return ""
    frames = np.unique(np.concatenate([run.columns[f"time/{name}"][0] for name in names]))
    shares = np.zeros((len(names), len(frames)))
    for row, name in zip(shares, names):
        x, y = run.columns[f"time/{name}"]
        row[np.searchsorted(frames, x)] = np.clip(np.nan_to_num(y, nan=0.0), 0, 1)
    seconds = _seconds_per_row(run, frames)
    spent = shares @ seconds
    whole = seconds.sum() or 1.0
    rows = []
    for index, (name, part) in enumerate(zip(names, spent)):
        key = f'<td class="key" style="{colour(index, len(names))}">{escape(name)}</td>'
        rows.append(f"<tr>{key}<td>{part / whole:.1%}</td><td>{_duration(part)}</td><td>{PART_WORDS.get(name, '')}</td></tr>")
    bar = "".join(f'<i style="{colour(i, len(names))};width:{100 * part / whole:.2f}%"></i>' for i, part in enumerate(spent))
    table = f"<table class='words'><thead><tr><th>part<th>share<th>time<th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    chart = stacked_chart("Share of the wall time", names, frames, shares, percent=True)
    return (
        f'<h2>Where the time goes</h2><div class="pair">{chart}<div class="wide">'
        f'<div class="bar" aria-hidden="true">{bar}</div>{table}</div></div>'
    )


def memory(run: Run) -> str:
    """How the tables grow, action by action, and how often a frame is found again exactly."""
    actions = [name for name in run.columns if name.startswith("memory/entries_")]
    charts = []
    if actions:
        frames = np.unique(np.concatenate([run.columns[name][0] for name in actions]))
        entries = [np.interp(frames, *_finite(run.columns[name])) for name in actions]
        charts.append(stacked_chart("Entries a table, one band an action", [_action(n) for n in actions], frames, np.array(entries)))
    elif "memory/entries" in run.columns:
        charts.append(line_chart("Entries", [Series("entries", *run.columns["memory/entries"])]))
    if "memory/exact_hit_rate" in run.columns:
        charts.append(
            line_chart("Look-ups that hit an entry exactly", [Series("hits", *run.columns["memory/exact_hit_rate"])], percent=True)
        )
    shown = {*actions, "memory/entries", "memory/exact_hit_rate"}
    charts += _small(run, [name for name in run.columns if name.startswith("memory/") and name not in shown])
    return f'<h2>Memory</h2><div class="pair">{"".join(charts)}</div>' if any(charts) else ""


def fitting(run: Run) -> str:
    """Losses of the model while it was fitted."""
    charts = _small(run, [name for name in run.columns if name.startswith("fit/")], "updates")
    return f'<h2>Fitting the model</h2><div class="trio">{"".join(charts)}</div>' if charts else ""


def pictures(run: Run) -> str:
    """Pictures that the run left in images/."""
    figures = []
    found = _files(run.folder / "images", ".png", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"))
    for path in sorted(p for p in found if p.stat().st_size <= EMBED_BYTES)[:24]:
        source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        name = escape(_title(path))
        figures.append(f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="{source}"></figure>')
    return f'<h2>What the model sees</h2><div class="pictures">{"".join(figures)}</div>' if figures else ""


def others(run: Run) -> str:
    """Every other metric as a small chart."""
    names = [n for n in run.columns if not n.startswith(("time/", "memory/", "fit/")) and n not in {"train/return_mean", "iteration"}]
    charts = _small(run, names)
    more = f'<p class="note">{len(names) - MOST_CHARTS} more are in metrics.jsonl.</p>' if len(names) > MOST_CHARTS else ""
    return f'<h2>Everything else</h2><div class="trio">{"".join(charts)}</div>{more}' if charts else ""


def settings(run: Run) -> str:
    """The resolved configuration and the versions, folded."""
    parts = []
    if run.config_text:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(run.config_text)}</pre></details>")
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _flat(run.versions))
    if rows:
        parts.append(f'<details><summary>Versions and machine</summary><div class="wide"><table>{rows}</table></div></details>')
    return f"<h2>To do it again</h2>{''.join(parts)}" if parts else ""


def _score_tile(run: Run) -> str:
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        text = f"95 % interval {label(last.low)} to {label(last.high)}, {len(last.returns)} episodes at {label(last.frames)} frames"
        if len(run.evaluations) == 1:
            return _tile("Score", label(last.mean), text)
        before = f"<small>{label(first.mean)} →</small> "
        started = f"at first {label(first.low)} to {label(first.high)}" if first.low != first.high else "at first"
        started += f" at {label(first.frames)} frames" if first.frames else ", before training"
        return _tile("Score, before and after", before + label(last.mean), f"{text}; {started}")
    y = run.columns.get("train/return_mean", (None, np.array([])))[1]
    y = y[np.isfinite(y)]
    if len(y):
        return _tile("Training return", label(float(y[-1])), "no evaluation yet")
    return "" if run.job == "fit" else _tile("Score", "—", "no evaluation yet")


def _human_tile(run: Run) -> str:
    if not run.evaluations:
        return ""
    score = human_normalised(run.env, run.evaluations[-1].mean)
    if score is None:
        return ""
    known = SCORES[run.env]
    meter = f'<div class="meter"><i style="width:{100 * min(1.0, max(0.0, score)):.1f}%"></i></div>'
    text = f"0 % is random play ({label(known.random)}), 100 % a professional tester ({label(known.human)})"
    return _tile("Human-normalised", f"{100 * score:.1f} %".replace("-", "−"), text, meter)


def _frames_tile(run: Run) -> str:
    if run.job == "fit":
        return ""
    if not run.total_frames:
        return _tile("Frames", label(run.frames), "environment frames played")
    share = min(1.0, run.frames / run.total_frames)
    meter = f'<div class="meter"><i style="width:{100 * share:.1f}%"></i></div>'
    return _tile("Frames", f"{label(run.frames)} <small>of {label(run.total_frames)}</small>", f"{share:.0%} of the budget", meter)


def _speed_tile(run: Run) -> str:
    x, y = run.columns.get("speed/frames_per_second", (np.array([]), np.array([])))
    use = np.isfinite(y) & (y > 0)
    if not use.any():
        return ""
    seconds = float(_seconds_per_row(run, np.unique(x[use])).sum())
    played = float(np.diff(np.unique(x[use]), prepend=0.0).sum())
    mean = played / seconds if seconds else float(y[use][-1])
    return _tile(
        "Speed", f"{label(mean)} <small>frames/s</small>", f"{label(float(y[use][-1]))} lately; {_duration(seconds)} of training in all"
    )


def _fit_tile(run: Run) -> str:
    if run.job != "fit":
        return ""
    shown = [(n, run.columns[n]) for n in run.columns if n.startswith("fit/") and n not in {"fit/update", "fit/updates_per_second"}]
    return "".join(
        _tile(escape(_words(name)), label(float(y[-1])), f"after {label(float(x[-1]))} updates") for name, (x, y) in shown[:4] if len(y)
    )


def _tile(name: str, big: str, text: str, meter: str = "") -> str:
    return f'<section class="tile"><h3>{name}</h3><div class="big">{big}</div>{meter}<p>{text}</p></section>'


def _evaluation_table(run: Run) -> str:
    rows = "".join(
        f"<tr><td>{e.frames:,}</td><td>{len(e.returns)}</td><td>{label(e.mean)}</td><td>{label(e.low)} to {label(e.high)}</td>"
        f"<td>{label(min(e.returns))}</td><td>{label(max(e.returns))}</td></tr>"
        for e in run.evaluations
    )
    if not rows:
        return ""
    head = "<tr><th>frames<th>episodes<th>mean<th>95 % interval<th>lowest<th>highest</tr>"
    return (
        f"<details><summary>Every evaluation in numbers</summary>"
        f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div></details>'
    )


def _seconds_per_row(run: Run, frames: Floats) -> Floats:
    """Wall seconds that each row of metrics stands for: frames since the row before, over its speed. Equal parts where it is not known."""
    x, y = run.columns.get("speed/frames_per_second", (np.array([]), np.array([])))
    use = np.isfinite(y) & (y > 0)
    if not use.any():
        return np.ones(len(frames))
    speed = np.interp(frames, x[use], y[use])
    return np.diff(frames, prepend=0.0) / speed


def _small(run: Run, names: Iterable[str], x_name: str = "frames") -> list[str]:
    shown = [name for name in names if name != "fit/update"][:MOST_CHARTS]
    charts = [
        line_chart(_words(name), [Series(_words(name), *run.columns[name], colour=i)], x_name=x_name, percent=name.endswith("hit_rate"))
        for i, name in enumerate(shown)
    ]
    return [chart for chart in charts if chart]


def _finite(column: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    use = np.isfinite(column[1])
    return (column[0][use], column[1][use]) if use.any() else (np.array([0.0]), np.array([0.0]))


def _action(name: str) -> str:
    return name.removeprefix("memory/entries_")


def _words(name: str) -> str:
    """fit/elbo -> elbo; train/length_frames_mean -> length frames mean; other groups keep their name in front."""
    group, _, rest = name.partition("/")
    text = rest if rest and group in {"fit", "memory", "speed", "train"} else f"{group}: {rest}" if rest else group
    return (f"training {text}" if group == "train" else text).replace("_", " ")


def _title(path: Path) -> str:
    text = re.sub(r"(?<=\d)-(?=\d)|(?<!\d)0+(?=\d)", lambda m: m.group() if m.group() == "-" else "", path.stem)
    text = re.sub(r"[-_]+", " ", text).strip() or path.stem
    return text[0].upper() + text[1:]


def _choice(run: Run, job: str) -> str:
    choices = run.config.get("choices")
    value = choices.get(job) if isinstance(choices, Mapping) else None
    return value if isinstance(value, str) and value != "null" else ""


def _files(folder: Path, suffix: str, fits: Any) -> list[Path]:
    """Files that are what their name says; links are passed over, for they could lead anywhere."""
    found = []
    try:
        for path in folder.iterdir():
            if path.suffix == suffix and path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    if fits(file.read(16)):
                        found.append(path)
    except OSError:
        pass
    return found


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        else:
            yield f"{prefix}{name}", str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"
