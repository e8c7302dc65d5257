"""DQN beside that of Stable-Baselines3 on the same processors: same game, network, loss, batch and updates a step, in alternating pairs.

    python -m benchmarks.dqn_speed --sb3-python /path/to/venv/bin/python --out benchmarks/results

Both sides are processes that live through all pairs (see `benchmarks.sb3_speed`, whose workers these are). 8 environments, one update of
32 transitions for every 4 agent steps, Adam, gradients clipped to norm 10, a replay of 10,000 frames: the rival keeps stacks, so that a
million would take it 56 GB. The plain row is the rival's own algorithm; the other shows what double estimation, the house's default,
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

from agents.dqn import DQN
from agents.loop import play
from benchmarks.sb3_speed import GOAL, LEAST, SPIN, Worker
from envs.atari import AtariEnv
from envs.cpus import usable_cpus
from envs.protocols import PROTOCOLS

CPU = torch.device("cpu")
NUM_ENVS, STEPS_PER_UPDATE = 8, 4
RIVAL = {
    "buffer_size": 10_000,
    "learning_starts": 200,
    "train_freq": 4,  # of all environments: 32 agent steps
    "gradient_steps": 4 * NUM_ENVS // STEPS_PER_UPDATE,
    "exploration_initial_eps": 0.05,
    "exploration_final_eps": 0.05,
}
OURS: dict[str, Any] = {
    "capacity": 10_000,
    "learning_starts_frames": 800,
    "update_frames": 4 * STEPS_PER_UPDATE,
    "epsilon_start": 0.05,
    "epsilon_end": 0.05,
    "optimiser": "adam",
    "learning_rate": 1e-4,
    "decay": 0.999,
    "optimiser_epsilon": 1e-8,
    "max_gradient_norm": 10.0,
}
KINDS: dict[str, dict[str, Any]] = {"plain": {"double": False}, "double": {"double": True}}


def serve(kind: str, game: str, precision: str) -> None:
    """Our side of the pair: the protocol of `benchmarks.sb3_rival`."""
    torch.manual_seed(0)
    env = AtariEnv(game, NUM_ENVS, CPU, PROTOCOLS["nature2015"])
    agent = DQN(env.spec, CPU, precision=precision, **OURS | KINDS[kind])
    ticks = play(env, agent, 10**12, seed=0)
    facts: dict[str, Any] = {"python": platform.python_version(), "torch_threads": torch.get_num_threads()}
    facts |= {"emulator_threads": env.num_threads, "spin": os.environ.get("GOMP_SPINCOUNT"), "dtype": str(agent.optimiser.dtype)}
    print(json.dumps(facts | {package: version(package) for package in ("torch", "ale-py", "numpy")}), flush=True)
    for line in sys.stdin:
        count, parts, began, busy = -(-int(line) // NUM_ENVS), [0.0] * 4, time.perf_counter(), time.process_time()
        updates = agent.optimiser.updates
        for _ in range(count):
            parts = [total + part for total, part in zip(parts, next(ticks).seconds)]
        wall, busy = time.perf_counter() - began, time.process_time() - busy
        shares = dict(zip(("act", "env", "learn", "observe"), (round(part / wall, 3) for part in parts)))
        answer = {"steps": count * NUM_ENVS, "seconds": wall, "cpu_seconds": busy, "updates": agent.optimiser.updates - updates}
        print(json.dumps(answer | {"shares": shares}), flush=True)


def measure(kind: str, game: str, sb3_python: str, pairs: int, seconds: float, precision: str) -> dict[str, Any]:
    """One row: rates and ratios of `pairs` adjacent pairs of turns of about `seconds` each, after a warm-up of both."""
    ours = [sys.executable, "-m", "benchmarks.dqn_speed", "--serve", kind, "--game", game, "--precision", precision]
    rival = [sb3_python, "-m", "benchmarks.sb3_rival", "dqn", game, str(NUM_ENVS), json.dumps(RIVAL)]
    workers = [Worker(ours, {"GOMP_SPINCOUNT": SPIN}), Worker(rival, {})]
    block = 16 * NUM_ENVS
    rows, steps = [], []
    try:
        for worker in workers:
            worker.train(400)  # past the start of learning
            warm = worker.train(2 * block)
            steps.append(max(1, round(seconds * warm["steps"] / warm["seconds"] / block)) * block)
        for pair in range(pairs):
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            turns = {who: workers[who].train(steps[who]) for who in order}
            rates = [turns[who]["steps"] / turns[who]["seconds"] for who in (0, 1)]
            work = [round(1e6 * turns[who]["cpu_seconds"] / turns[who]["steps"]) for who in (0, 1)]
            due = turns[0]["updates"] * STEPS_PER_UPDATE / turns[0]["steps"]
            assert 0.99 < due < 1.01, f"{due} updates for every {STEPS_PER_UPDATE} steps"
            row = {"ratio": rates[0] / rates[1], "ours": rates[0], "rival": rates[1], "cpu_us_per_step": work, "shares": turns[0]["shares"]}
            rows.append(row)
            print(f"{kind} {game} pair {pair}: {rates[0]:6.0f} {rates[1]:6.0f}  {row['ratio']:.2f}  {work} {row['shares']}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    return {
        "agent": "dqn",
        "kind": kind,
        "game": game,
        "num_envs": NUM_ENVS,
        "updates": f"one of 32 transitions every {STEPS_PER_UPDATE} agent steps",
        "ratio_median": round(statistics.median(row["ratio"] for row in rows), 3),
        "ratio_range": [round(extreme(row["ratio"] for row in rows), 3) for extreme in (min, max)],
        "cpu_ratio_median": round(statistics.median(row["cpu_us_per_step"][1] / row["cpu_us_per_step"][0] for row in rows), 3),
        "goal": GOAL,
        "least": LEAST,
        "steps_per_second": round(statistics.median(row["ours"] for row in rows)),
        "rival_steps_per_second": round(statistics.median(row["rival"] for row in rows)),
        "pairs": rows,
        "ours": workers[0].facts | {"knobs": OURS | KINDS[kind]},
        "rival": workers[1].facts | {"knobs": RIVAL},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a pair, writes OUT/dqn_speed.json, and returns 1 where the plain median ratio falls below LEAST, else 0."""
    parser = argparse.ArgumentParser(prog="dqn_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sb3-python", help="the interpreter of a venv with stable-baselines3")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--pairs", type=int, default=7, help="at least five for a figure that is kept")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, help="a folder for the result")
    parser.add_argument("--serve", choices=list(KINDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve(arguments.serve, arguments.game, arguments.precision)
        return 0
    if not arguments.sb3_python:
        parser.error("--sb3-python names the interpreter of a venv with stable-baselines3")
    load = os.getloadavg()[0]
    given = (arguments.game, arguments.sb3_python, arguments.pairs, arguments.seconds, arguments.precision)
    rows = [measure(kind, *given) for kind in arguments.kinds]
    for row in rows:
        rates = f"{row['steps_per_second']:,} to {row['rival_steps_per_second']:,} agent steps/s"
        low, high = row["ratio_range"]
        print(f"dqn {row['kind']} {row['game']}: {rates}, ratio {row['ratio_median']:.2f} ({low:.2f}-{high:.2f})")
    if arguments.out:
        facts = {
            "command": shlex.join(["python", "-m", "benchmarks.dqn_speed", *(sys.argv[1:] if argv is None else argv)]),
            "processor": platform.processor() or platform.machine(),
            "usable_cpus": usable_cpus(),
            "load_before": load,
            "outside_the_code": f"ours runs with GOMP_SPINCOUNT={SPIN} (OpenMP threads sleep sooner); the rival as installed",
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "dqn_speed.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return int(any(row["ratio_median"] < LEAST for row in rows if row["kind"] == "plain"))


if __name__ == "__main__":
    raise SystemExit(main())
