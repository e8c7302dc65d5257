r"""How many cells of mazes seen from above are entered before anything is learned: informed exploration beside uniformly random actions.

    python launch.py job=collect env=GridMaze frames=32_000 frames_per_iteration=16_000 data=data/maze
    python launch.py job=fit simulator=small_feedforward data=data/maze fit.batch_size=32 run_name=maze \
        "fit.phases=[{updates:1500},{updates:1000,learning_rate:1e-4}]"
    python -m benchmarks.informed_coverage --fit runs/maze --out benchmarks/results/informed_coverage.json

agent=dqn with epsilon 1, as before learning starts. Cells are counted a lane and a maze; a goal that is reached opens another maze.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.loop import play
from benchmarks.record import record
from envs.gridmaze import GridMaze
from lab.configure import compose, plain
from lab.folder import read_config
from lab.run import make_agent, make_env, seed_everything
from lab.simulators import take_fitted

CPU = torch.device("cpu")
UNIFORM = "none"


def explore(words: Sequence[str], lanes: int, steps: int, seed: int) -> dict[str, float]:
    """Cells and goals a lane that random actions come to, as launch.py is told to choose them."""
    shown = ["agent=dqn", "agent.stack_frames=1", f"agent.capacity={1000 * lanes}", "agent.learning_starts_frames=1_000_000_000"]
    settings = plain(compose(["env=GridMaze", *shown, *words]))
    env = make_env(settings, lanes, CPU)
    assert isinstance(env, GridMaze)
    seed_everything(seed)
    agent, models = make_agent(settings, env.spec, CPU)
    if settings["fit"]["path"]:
        take_fitted(models["simulator"], settings, env.spec)
    cells, goals = set(), 0
    for tick in play(env, agent, lanes * steps, seed):
        cells |= {(lane, env.lanes.grid[lane].tobytes(), *env.lanes.agent[lane].tolist()) for lane in range(lanes)}
        goals += int((tick.after.last & (tick.after.discount == 0)).sum())
    return {"cells": len(cells) / lanes, "goals": goals / lanes}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="informed_coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True, help="a run folder of job=fit simulator=NAME, on clips of GridMaze")
    parser.add_argument("--visit-frames", nargs="+", type=int, default=[20, 200])
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="of a lane")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    fitted = read_config(arguments.fit)["choices"]["simulator"]
    kinds: list[tuple[str, int, list[str]]] = [(UNIFORM, 0, []), ("last_frame", 20, ["simulator=last_frame"])]
    for frames in arguments.visit_frames:
        kinds.append((fitted, frames, [f"simulator={fitted}", f"fit.path={arguments.fit}", f"agent.visit_frames={frames}"]))
    rows: list[dict[str, Any]] = []
    print(f"{'simulator':18s} {'d':>4s} {'cells a lane':>12s}  by seed{'':24s} {'goals a lane':>12s}")
    for name, frames, words in kinds:
        found = [explore(words, arguments.lanes, arguments.steps, seed) for seed in range(arguments.seeds)]
        cells, goals = ([round(one[key], 2) for one in found] for key in ("cells", "goals"))
        row = {"simulator": name, "visit_frames": frames, "cells_mean": statistics.mean(cells), "goals_mean": statistics.mean(goals)}
        rows.append(row | {"cells_by_seed": cells, "goals_by_seed": goals})
        listed = " ".join(f"{count:5.1f}" for count in cells)
        print(f"{name:18s} {frames:4d} {row['cells_mean']:12.1f}  {listed:31s} {row['goals_mean']:12.2f}", flush=True)
    record(arguments.out, "informed_coverage", argv, rows, lanes=arguments.lanes, steps_of_a_lane=arguments.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
