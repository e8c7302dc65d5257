"""How far ahead simulators see: error curves on games, all fitted to the same recorded play and judged on the same held-out clips.

    python -m benchmarks.simulators --work runs/simulators --out benchmarks/results/simulators

For every game it runs what a user would: job=collect (random play, 64x64 in colour), job=fit of each simulator, job=evaluate_simulator.
What is finished is not done again, so a benchmark that was stopped goes on. Then come errors.csv, results.json, table.md and curves.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import record
from lab import checkpoint

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
GAMES = ("Pong", "Freeway", "MsPacman")
CURRICULUM = "fit.phases=[{updates:1500},{updates:500,horizon:3,learning_rate:3e-4}]"
RECIPES: dict[str, list[str]] = {
    "small_feedforward": ["fit.batch_size=16", CURRICULUM],
    "small_recurrent": ["fit.batch_size=16", CURRICULUM, "fit.window_steps=20"],
    "state_space_small": [
        *["simulator.reward_cost=10", "simulator.discount_cost=10", "fit.batch_size=8", "fit.window_steps=16", "fit.learning_rate=2e-3"],
        "fit.phases=[{updates:100},{updates:1400,horizon:3}]",
    ],
    "small_no_action": ["fit.batch_size=16", CURRICULUM],
}
BASELINES = ("small_no_action", "last_frame")
SHOWN = (1, 5, 10, 30, 100)
LONG = 5  # beyond so many steps an action-conditional simulator should beat both baselines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=list(GAMES))
    parser.add_argument("--simulators", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--steps", type=int, default=20_000, help="agent steps of random play that are recorded, a tenth of them held out")
    parser.add_argument("--work", type=Path, default=Path("runs/simulators"), help="where clips and runs are kept")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the figures")
    words = parser.parse_args(argv)
    found = {game: measured(game, words.simulators, words.steps, words.work) for game in words.games}
    print(table(found))
    if words.out is not None:
        words.out.mkdir(parents=True, exist_ok=True)
        record(
            words.out / "results.json",
            "simulators",
            argv,
            found,
            steps=words.steps,
            recipes={name: RECIPES[name] for name in words.simulators},
        )
        (words.out / "table.md").write_text(table(found))
        write_rows(words.out / "errors.csv", found)
        draw(found, words.out / "curves.png")
    return 0


def measured(game: str, simulators: Sequence[str], steps: int, work: Path) -> dict[str, Any]:
    """Figures by simulator, the last frame's among them."""
    data, frames = work / f"{game}-clips", 4 * steps
    launch(
        "job=collect",
        f"env={game}",
        "env.obs=rgb64",
        "num_envs=8",
        f"frames={frames}",
        f"frames_per_iteration={frames // 10}",
        f"data={data}",
    )
    for name in simulators:
        folder = work / f"{game}-{name}"
        if (folder / "config.yaml").exists():
            launch("job=fit", f"resume={folder}")
        else:
            own = [f"runs_dir={work}", f"run_name={folder.name}", "wandb=off"]
            launch("job=fit", f"simulator={name}", f"data={data}", "fit.checkpoint_updates=500", *RECIPES[name], *own)
    runs = [work / f"{game}-{name}" for name in simulators]
    target = runs[0] / "evaluations" / "simulator-seed-0" / "results.json"
    if not (target.exists() and judged(target, simulators, runs)):
        launch("job=evaluate_simulator", f"run={runs[0]}", f"against=[{','.join(map(str, runs[1:]))}]", f"data={data}")
    results: dict[str, Any] = json.loads(target.read_text())["results"]
    return results


def judged(target: Path, simulators: Sequence[str], runs: Sequence[Path]) -> bool:
    """Whether the figures are of all these simulators, and of what they know now."""
    newest = max((run / checkpoint.CURRENT).stat().st_mtime for run in runs)
    return set(simulators) <= set(json.loads(target.read_text())["results"]) and target.stat().st_mtime > newest


def launch(*words: str) -> None:
    print("python launch.py", *words, flush=True)
    subprocess.run([sys.executable, str(LAUNCH), *words], check=True)


def table(found: dict[str, Any]) -> str:
    """PSNR by steps ahead, a row a simulator, and where one that knows the action is no better than both baselines."""
    lines = [
        "| game | simulator | " + " | ".join(f"{steps} ahead" for steps in SHOWN) + " | steps/s |",
        "|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for game, results in found.items():
        for name, result in results.items():
            psnr = result["errors"]["psnr"]
            cells = [f"{psnr[steps - 1]:.1f}" if steps <= len(psnr) and psnr[steps - 1] is not None else "" for steps in SHOWN]
            lines.append(f"| {game} | `{name}` | " + " | ".join(cells) + f" | {result['steps_per_second']:,.0f} |")
    lines.append("")
    for game, results in found.items():
        for name, worse in lost(results).items():
            lines.append(
                f"{game}, `{name}`: "
                + (f"no better than both baselines at {ranges(worse)} steps" if worse else "better throughout")
                + f" beyond {LONG}."
            )
    return "\n".join(lines) + "\n"


def lost(results: dict[str, Any]) -> dict[str, list[int]]:
    """Of every simulator that knows the action, the horizons beyond LONG at which its error is not below that of every baseline."""
    errors = {name: result["errors"]["mse"] for name, result in results.items()}
    bars = [errors[name] for name in BASELINES if name in errors]
    known = [name for name in errors if name not in BASELINES]
    horizons = [h for h in range(LONG + 1, len(errors["last_frame"]) + 1) if errors["last_frame"][h - 1] is not None]
    return {name: [h for h in horizons if errors[name][h - 1] >= min(bar[h - 1] for bar in bars)] for name in known}


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def write_rows(path: Path, found: dict[str, Any]) -> None:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        names = list(next(iter(next(iter(found.values())).values()))["errors"])
        rows.writerow(["game", "simulator", "steps_ahead", *names])
        for game, results in found.items():
            for simulator, result in results.items():
                for number, values in enumerate(zip(*(result["errors"][name] for name in names)), 1):
                    rows.writerow([game, simulator, number, *values])


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel a game: PSNR against steps ahead."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.2), squeeze=False, layout="constrained")
    for panel, (game, results) in zip(panels[0], found.items()):
        for name, result in results.items():
            points = [(steps, value) for steps, value in enumerate(result["errors"]["psnr"], 1) if value is not None]
            style = {"color": "0.6", "linestyle": "--" if name == "last_frame" else ":"} if name in BASELINES else {}
            panel.plot(*zip(*points), label=name, **style)
        panel.set_xscale("log")
        panel.set_title(game)
        panel.set_xlabel("steps ahead")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("PSNR (dB)")
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
