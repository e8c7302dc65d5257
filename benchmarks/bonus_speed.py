"""What a bonus costs: training rate of agent=a3c_plus beside that of agent=a3c, in alternating pairs of turns.

    python -m benchmarks.bonus_speed --out benchmarks/results/bonus_speed.json

Both are processes that live through all pairs (`benchmarks.turns`). 16 environments, the configurations' own defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.loop import play
from benchmarks.record import record
from benchmarks.turns import OUTSIDE, Worker, serve, summary, take_turns
from lab.configure import compose, plain
from lab.run import make_agent, make_env

GOAL = 0.7
"""Of a3c's rate, for a3c_plus with CTS."""
NUM_ENVS = 16
BONUSES = ("cts", "hash_counts", "pixelcnn", "nade", "rnd")


def words_of(kind: str) -> list[str]:
    """What launch.py is told: a density's name, rnd, or none for the agent without bonus."""
    if kind == "none":
        return ["agent=a3c"]
    return ["agent=a3c_plus", "bonus=rnd" if kind == "rnd" else f"density={kind}"]


def work(kind: str, game: str) -> None:
    """One side."""
    torch.manual_seed(0)
    device, settings = torch.device("cpu"), plain(compose([f"env={game}", *words_of(kind)]))
    env = make_env(settings, NUM_ENVS, device)
    agent, _ = make_agent(settings, env.spec, device)
    serve(play(env, agent, 10**12, seed=0), NUM_ENVS, {"torch_threads": torch.get_num_threads()}, lambda: 0)


def measure(kind: str, game: str, pairs: int, seconds: float) -> dict[str, Any]:
    """One row: median rates and ratios (with the bonus to without) over `pairs` of turns of about `seconds`."""
    command = [sys.executable, "-m", "benchmarks.bonus_speed", "--game", game, "--serve"]
    workers = [Worker([*command, name], OUTSIDE) for name in (kind, "none")]
    return {"bonus": kind, "game": game, **summary(take_turns(workers, pairs, seconds, 50 * NUM_ENVS))}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes JSON with `--out`, and returns 1 where CTS falls below GOAL, else 0."""
    parser = argparse.ArgumentParser(prog="bonus_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bonuses", nargs="+", default=list(BONUSES), choices=BONUSES)
    parser.add_argument("--games", nargs="+", default=["Freeway", "Qbert"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--serve", choices=("none", *BONUSES), help=argparse.SUPPRESS)
    parser.add_argument("--game", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        work(arguments.serve, arguments.game)
        return 0
    rows = []
    print(f"{'bonus':12s} {'game':10s} {'steps/s':>8s} {'without':>8s} {'ratio':>6s}  range")
    for kind in arguments.bonuses:
        for game in arguments.games:
            row = measure(kind, game, arguments.pairs, arguments.seconds)
            low, high = row["ratio_range"]
            rates = f"{row['steps_per_second']:8,d} {row['others_steps_per_second']:8,d}"
            print(f"{kind:12s} {game:10s} {rates} {row['ratio_median']:6.2f}  {low:.2f}-{high:.2f}", flush=True)
            rows.append(row)
    record(arguments.out, "bonus_speed", argv, rows, goal_cts=GOAL, outside_the_code=OUTSIDE)
    return int(any(row["ratio_median"] < GOAL for row in rows if row["bonus"] == "cts"))


if __name__ == "__main__":
    raise SystemExit(main())
