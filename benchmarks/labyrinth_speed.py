"""Views a second of labyrinths: 84x84 RGB, four frames of physics each, things, random actions and the Step included; on one core.

    python -m benchmarks.labyrinth_speed --rival-python /path/to/venv/bin/python --out benchmarks/results/labyrinth_speed.json

With `--rival-python`, the interpreter of a venv that holds vizdoom and miniworld, these are measured on the same core in the same run
(`benchmarks.maze_rivals`), turn by turn. `--device cuda` measures the card, with as many lanes as `--num-envs` says, and no rivals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from envs.labyrinth.level import level_names
from envs.labyrinth.world import Labyrinth

GOAL = 30_000  # on one core
RIVALS = ("vizdoom", "miniworld")
SCRIPT = Path(__file__).with_name("maze_rivals.py")


def rate(env: Labyrinth, actions: torch.Tensor, seconds: float) -> float:
    """Views a second of all lanes together, over about `seconds`."""
    cuda = actions.device.type == "cuda"
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for action in actions:
            env.step(action)
        steps += len(actions)
        if cuda:
            torch.cuda.synchronize()
    return steps * env.num_envs / (time.perf_counter() - began)


def measure(level: str, num_envs: int, turns: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """One row: the median and the range of `turns`."""
    env = Labyrinth(num_envs, device, level, num_threads=1)
    env.reset(0)
    actions = torch.randint(env.spec.num_actions, (50, num_envs), device=device)
    rate(env, actions, seconds / 4)
    rates = [rate(env, actions, seconds) for _ in range(turns)]
    env.close()
    found = {"world": level, "num_envs": num_envs, "views_per_second": round(statistics.median(rates))}
    return found | {"range": [round(min(rates)), round(max(rates))]}


def measure_rival(name: str, python: str, turns: int, seconds: float) -> dict[str, Any]:
    """The same of another's world, one environment."""
    found, command = [], [python, str(SCRIPT), name, str(seconds)]
    with tempfile.TemporaryDirectory() as folder:  # ViZDoom writes its settings where it runs
        for _ in range(turns):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    rates = [one["steps_per_second"] for one in found]
    row = {"world": f"{name} {found[0]['version']}", "num_envs": 1, "views_per_second": round(statistics.median(rates))}
    return row | {"range": [round(min(rates)), round(max(rates))]}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes JSON with `--out`, and returns 1 where a level on the processor is below GOAL, else 0."""
    parser = argparse.ArgumentParser(prog="labyrinth_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=level_names())
    parser.add_argument("--num-envs", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rival-python", help="the interpreter of a venv with vizdoom and miniworld")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    given, rows = (arguments.turns, arguments.seconds), []
    print(f"{'world':20s} {'lanes':>6s} {'views/s':>10s}  range")
    settings = [(level, lanes) for level in arguments.levels for lanes in arguments.num_envs]
    measured = [partial(measure, *one, *given, torch.device(arguments.device)) for one in settings]
    if arguments.rival_python:
        measured += [partial(measure_rival, name, arguments.rival_python, *given) for name in RIVALS]
    for take in measured:
        row = take()
        rows.append(row)
        low, high = row["range"]
        print(f"{row['world']:20s} {row['num_envs']:6d} {row['views_per_second']:10,d}  {low:,}-{high:,}", flush=True)
    record(arguments.out, "labyrinth_speed", argv, rows, ("torch", "numba"), goal=GOAL, device=arguments.device)
    ours = [row for row in rows if row["world"] in arguments.levels]
    return int(arguments.device == "cpu" and any(row["views_per_second"] < GOAL for row in ours))


if __name__ == "__main__":
    sys.exit(main())
