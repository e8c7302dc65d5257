"""job=bench: many training runs (settings x seeds), then one table and one picture of them.

Each run is a process of its own and a run folder under `runs_dir/bench-NAME/`; a bench that was stopped, or is given more frames, goes on
where it was.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from envs.api import UserError
from lab import exploration
from lab.configure import plain
from lab.folder import read_config, write_beside
from lab.grid import PlannedRun, bench_folder, plan
from lab.logging import read_evaluation, read_metrics
from lab.protocols import PUBLISHED_FRAMES, SCORES, Scores, human_normalised, mean_interval
from lab.run import pick_device
from lab.seeds import at_shared_frames

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
KINDS = (None, "exploration", "salient_event", "macro_actions")


def run(cfg: DictConfig) -> int:
    """Runs what is not finished yet, then writes table.md, results.json and curves.png.

    Of a bench's keys, `panels` is what the picture has one panel for, game (the default) or setting, and `solved` a score: the seeds that
    end above it are counted. `kind` says what is measured beside scores: one of KINDS.
    """
    bench = plain(cfg)["bench"]
    kind, folder = bench.get("kind"), bench_folder(bench, cfg.runs_dir)
    if kind not in KINDS:
        raise UserError(f"there is no bench.kind={kind}; there are {', '.join(str(known) for known in KINDS if known)}, and null")
    if kind == "salient_event":
        from lab import salient_event

        return salient_event.run(cfg)
    panels, solved = bench.get("panels", "game"), bench.get("solved")
    if panels not in ("game", "setting") or not (solved is None or type(solved) in (int, float)):
        raise UserError(f"bench.panels is game or setting and bench.solved a number or null, got {panels} and {solved}")
    pick_device(cfg.device)
    planned = plan(bench, folder)
    if kind == "exploration":
        exploration.baseline_of(bench)
    if kind == "macro_actions":
        from lab import macro_actions

        macro_actions.check_settings(bench)
    folder.mkdir(parents=True, exist_ok=True)  # refused here, not run by run
    failed = _train_all(planned, str(cfg.device))
    finished: dict[str, list[Path]] = {one.label: [] for one in planned}
    for one in planned:
        if one.finished():
            finished[one.label].append(one.folder)
    if not any(finished.values()):
        with suppress(OSError):
            folder.rmdir()  # where no run left anything
        why = ", ".join(dict.fromkeys(failed)) or "none was evaluated at its end"
        print(f"error: no run finished: {why}", file=sys.stderr)
        return 1
    seeds = len(bench["seeds"])
    for label, paths in finished.items():
        if len(paths) < seeds:
            print(f"{label}: {seeds - len(paths)} of {seeds} seeds are not finished and are left out")
    results = [summarise_group(label, paths, solved) for label, paths in finished.items() if paths]
    write_beside(folder / "results.json", json.dumps(results, indent=2))
    write_beside(folder / "table.md", table(results))
    draw(results, folder / "curves.png", panels)
    print(table(results))
    if kind == "exploration":
        exploration.draw_figures(bench, results, finished, folder)
    if kind == "macro_actions":
        from lab import macro_actions

        macro_actions.draw_figures(finished, folder, str(cfg.device))
    print(f"results  {folder}")
    return 1 if failed else 0


def _train_all(planned: list[PlannedRun], device: str) -> list[str]:
    """Trains what is not finished, one after another. Returns what failed: settings, with the exit code of a run."""
    failed = []
    for one in planned:
        code = 0 if one.finished() else _train(one, device)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            failed.append(f"{one.label} ended with exit code {code}")
            print(f"{one.label} seed {one.seed} ended with exit code {code}; the bench goes on without it")
    return failed


def _train(one: PlannedRun, device: str) -> int:
    if (one.folder / "config.yaml").exists():
        command = [f"resume={one.folder}", f"frames={one.frames}", f"device={device}"]
    else:
        own = [f"seed={one.seed}", f"device={device}", f"runs_dir={one.folder.parent}", f"run_name={one.folder.name}", "wandb=off"]
        command = [*one.words, *own]
    process = subprocess.Popen([sys.executable, str(LAUNCH), *command])
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal sends Ctrl-C to the run too, which saves and ends
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def summarise_group(label: str, folders: list[Path], solved: float | None = None) -> dict[str, Any]:
    """Final scores (a mean a seed, with the bootstrap interval over seeds), curves and speed of one setting's finished runs.

    With `solved` also that score and, as `seeds_above`, how many seeds end above it.
    """
    finals, speeds, curves = [], [], []
    game, frames = "", 0
    for folder in folders:
        rows = read_evaluation(folder)
        game = str(read_config(folder)["choices"]["env"])
        frames = int(max(row["frames"] for row in rows))
        last = [row["return"] for row in rows if row["frames"] == frames]
        finals.append(sum(last) / len(last))
        steps = sorted({row["frames"] for row in rows})
        curves.append([(at, _mean([row["return"] for row in rows if row["frames"] == at])) for at in steps])
        rates = sorted(float(row["speed/frames_per_second"]) for row in read_metrics(folder) if "speed/frames_per_second" in row)
        speeds += rates[len(rates) // 2 : len(rates) // 2 + 1]
    mean, low, high = mean_interval(finals)
    return {
        "setting": label,
        "game": game,
        "frames": frames,
        "seeds": len(folders),
        "final_by_seed": finals,
        "score": mean,
        "interval_over_seeds": [low, high],
        "human_normalised": human_normalised(game, mean),
        "frames_per_second": _mean(speeds),
        "curves": curves,
        **({} if solved is None else {"solved": solved, "seeds_above": sum(final > solved for final in finals)}),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a setting, beside random play, a human tester, and MFEC and NEC as published by Pritzel et al. (2017).

    Published columns are there where any game has published scores, and the count of solving seeds where the rows hold it.
    """
    known = any(row["game"] in SCORES for row in results)
    solved = sorted({row["solved"] for row in results if "solved" in row})
    names = ["setting", "frames", "seeds", "score (95 % over seeds)"]
    names += [f"seeds above {score:g}" for score in solved]
    published_at = f"at {PUBLISHED_FRAMES // 10**6}M (NEC paper)"
    names += ["random", "human", f"MFEC {published_at}", f"NEC {published_at}"] if known else []
    names.append("frames/s")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    places = 1 if any(abs(final) >= 10 for row in results for final in row["final_by_seed"]) else 2
    for row in results:
        mean, low, high = (f"{number:,.{places}f}" for number in (row["score"], *row["interval_over_seeds"]))
        cells = [row["setting"], f"{row['frames']:,}", str(row["seeds"])]
        cells.append(f"{mean} ({low} to {high})" if row["seeds"] > 1 else f"{mean} (one seed)")
        cells += [f"{row['seeds_above']} of {row['seeds']}"] if solved else []
        if known:
            published = SCORES.get(row["game"])
            cells += [f"{number:,.1f}" for number in published] if published else [""] * len(Scores._fields)
        cells.append(f"{row['frames_per_second']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path, panels: str = "game") -> None:
    """One panel a game, or a setting: each seed a thin line, the mean over seeds a thick one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(row[panels] for row in results))
    columns = len(titles) if panels == "game" else min(4, len(titles))
    rows = -(-len(titles) // columns)
    size = (4.2 * columns, 3.2 * rows) if panels == "game" else (3 * columns, 2.5 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharey=panels == "setting")
    unit, word = (1e6, "millions") if max(row["frames"] for row in results) >= 1e6 else (1e3, "thousands")
    for title, panel in zip(titles, grid.flat):
        for colour, row in enumerate(row for row in results if row[panels] == title):
            for curve in row["curves"]:
                panel.plot([at / unit for at, _ in curve], [score for _, score in curve], color=f"C{colour}", alpha=0.35, linewidth=1)
            frames, scores = at_shared_frames(row["curves"])
            panel.plot(
                [at / unit for at in frames],
                scores.mean(0),
                color=f"C{colour}",
                linewidth=2,
                label=textwrap.fill(row["setting"], 56, break_on_hyphens=False),
            )
        if panels == "game":
            panel.set_title(title)
            panel.legend(fontsize=6, frameon=False)
        else:
            panel.set_title(textwrap.fill(title, 32, break_on_hyphens=False), fontsize=8)
        panel.set_xlabel(f"environment frames ({word})")
        if panels == "game" or panel in grid[:, 0]:
            panel.set_ylabel("evaluation score")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(grid.flat)[len(titles) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
