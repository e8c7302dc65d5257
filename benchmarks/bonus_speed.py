"""What a bonus costs: training rate of agent=a3c_plus beside that of agent=a3c, in alternating pairs of turns.

    python -m benchmarks.bonus_speed --out benchmarks/results/bonus_speed.json

Both are processes that live through all pairs and wait, idle, while the other trains. 16 environments, the configurations' own defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from agents.loop import play
from benchmarks.sb3_speed import OUTSIDE, Worker
from envs.cpus import usable_cpus
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


def serve(kind: str, game: str) -> None:
    """Trains as many agent steps as each line of input says, and prints what they took."""
    torch.manual_seed(0)
    device, settings = torch.device("cpu"), plain(compose([f"env={game}", *words_of(kind)]))
    env = make_env(settings, NUM_ENVS, device)
    agent, _ = make_agent(settings, env.spec, device)
    ticks = play(env, agent, 10**12, seed=0)
    print(json.dumps({"torch_threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        count, began, busy = -(-int(line) // NUM_ENVS), time.perf_counter(), time.process_time()
        for _ in range(count):
            next(ticks)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        print(json.dumps({"steps": count * NUM_ENVS, "seconds": seconds, "cpu_seconds": busy}), flush=True)


def measure(kind: str, game: str, pairs: int, seconds: float) -> dict[str, Any]:
    """One row: median rates, and the median ratio (with the bonus to without) over `pairs` of turns of about `seconds`."""
    command = [sys.executable, "-m", "benchmarks.bonus_speed", "--game", game, "--serve"]
    workers = [Worker([*command, name], OUTSIDE) for name in (kind, "none")]
    try:
        block, steps = 50 * NUM_ENVS, []
        for worker in workers:
            worker.train(block)
            warm = worker.train(block)
            steps.append(max(1, round(seconds * warm["steps"] / warm["seconds"] / block)) * block)
        rates, work = [], []
        for pair in range(pairs):
            turns = {who: workers[who].train(steps[who]) for who in ((0, 1) if pair % 2 == 0 else (1, 0))}
            rates.append([turns[who]["steps"] / turns[who]["seconds"] for who in (0, 1)])
            work.append([1e6 * turns[who]["cpu_seconds"] / turns[who]["steps"] for who in (0, 1)])
    finally:
        for worker in workers:
            worker.close()
    ratios = [ours / plain_rate for ours, plain_rate in rates]
    return {
        "bonus": kind,
        "game": game,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "steps_per_second": round(statistics.median(pair[0] for pair in rates)),
        "steps_per_second_without": round(statistics.median(pair[1] for pair in rates)),
        "cpu_us_per_step": [round(statistics.median(pair[who] for pair in work)) for who in (0, 1)],
        "pairs": pairs,
    }


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
        serve(arguments.serve, arguments.game)
        return 0
    load, rows = os.getloadavg()[0], []
    print(f"{'bonus':12s} {'game':10s} {'steps/s':>8s} {'without':>8s} {'ratio':>6s}  range")
    for kind in arguments.bonuses:
        for game in arguments.games:
            row = measure(kind, game, arguments.pairs, arguments.seconds)
            low, high = row["ratio_range"]
            rates = f"{row['steps_per_second']:8,d} {row['steps_per_second_without']:8,d}"
            print(f"{kind:12s} {game:10s} {rates} {row['ratio_median']:6.2f}  {low:.2f}-{high:.2f}", flush=True)
            rows.append(row)
    if arguments.out:
        facts = {
            "command": shlex.join(["python", "-m", "benchmarks.bonus_speed", *(sys.argv[1:] if argv is None else argv)]),
            "goal_cts": GOAL,
            "usable_cpus": usable_cpus(),
            "load_before": load,
            "outside_the_code": OUTSIDE,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "ale-py", "numba")}},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return int(any(row["ratio_median"] < GOAL for row in rows if row["bonus"] == "cts"))


if __name__ == "__main__":
    raise SystemExit(main())
