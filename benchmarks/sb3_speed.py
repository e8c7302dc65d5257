"""Training rate beside Stable-Baselines3 on the same processors: same game, lanes, network, batch and updates a step, in alternating pairs.

    python -m benchmarks.sb3_speed --sb3-python /path/to/venv/bin/python --out benchmarks/results/sb3_speed.json

Stable-Baselines3 is no dependency: the venv holds stable-baselines3, ale-py, gymnasium, opencv-python-headless and torch. Both sides run as
processes that live through all pairs and wait, idle, while the other trains; who goes first alternates. Stock means stock: the rival's
environments, wrappers and threads are its own defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from agents.actor_critic import ActorCritic
from agents.loop import play
from envs.atari import AtariEnv
from envs.cpus import usable_cpus
from envs.protocols import PROTOCOLS

CPU = torch.device("cpu")
GOAL, LEAST = 3.0, 2.2
ROOT = Path(__file__).parent.parent
SPIN = "5000"
OUTSIDE = {"GOMP_SPINCOUNT": SPIN}  # OpenMP's threads sleep sooner, and leave the processors to the emulators'
"""What is tuned outside the code, for our side alone: the rival runs as installed."""
SETTINGS: dict[str, dict[str, Any]] = {
    "a3c": {
        "num_envs": 16,
        "rival": {"ent_coef": 0.01},
        "updates": "one of 80 agent steps every 5 steps of 16 environments",
    },
}


def serve(name: str, game: str, precision: str) -> None:
    """Our side of the pair: the protocol of `benchmarks.sb3_rival`."""
    torch.manual_seed(0)
    env = AtariEnv(game, SETTINGS[name]["num_envs"], CPU, PROTOCOLS["nature2015"])
    agent = {"a3c": ActorCritic}[name](env.spec, CPU, precision=precision)
    ticks = play(env, agent, 10**12, seed=0)
    facts: dict[str, Any] = {"python": platform.python_version(), "torch_threads": torch.get_num_threads()}
    facts |= {"emulator_threads": env.num_threads, "dtype": str(agent.optimiser.dtype)}
    print(json.dumps(facts | {package: version(package) for package in ("torch", "ale-py", "numpy")}), flush=True)
    for line in sys.stdin:
        count, parts, began, busy = -(-int(line) // env.num_envs), [0.0] * 4, time.perf_counter(), time.process_time()
        for _ in range(count):
            parts = [total + part for total, part in zip(parts, next(ticks).seconds)]
        wall, busy = time.perf_counter() - began, time.process_time() - busy
        shares = dict(zip(("act", "env", "learn", "observe"), (round(part / wall, 3) for part in parts)))
        print(json.dumps({"steps": count * env.num_envs, "seconds": wall, "cpu_seconds": busy, "shares": shares}), flush=True)


class Worker:
    """One side: a process that trains when it is told to."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        everything = os.environ | environment
        self._process = subprocess.Popen(command, cwd=ROOT, env=everything, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def train(self, steps: int) -> dict[str, Any]:
        """Steps done and seconds taken."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{shlex.join(self._process.args)} has ended")  # type: ignore[arg-type]
        return json.loads(line)


def measure(name: str, game: str, sb3_python: str, pairs: int, seconds: float, precision: str) -> dict[str, Any]:
    """One row: rates and ratios of `pairs` adjacent pairs of turns of about `seconds` each, after a warm-up of both."""
    setting = SETTINGS[name]
    rival = [sb3_python, "-m", "benchmarks.sb3_rival", name, game, str(setting["num_envs"]), json.dumps(setting["rival"])]
    ours = [sys.executable, "-m", "benchmarks.sb3_speed", "--serve", name, "--game", game, "--precision", precision]
    workers = [Worker(ours, OUTSIDE), Worker(rival, {})]
    try:
        block = 5 * setting["num_envs"] * 10
        steps = []
        for worker in workers:
            worker.train(block)
            warm = worker.train(block)
            steps.append(max(block, int(seconds * warm["steps"] / warm["seconds"]) // block * block))
        rows = []
        for pair in range(pairs):
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            turns = {who: workers[who].train(steps[who]) for who in order}
            rates = [turns[who]["steps"] / turns[who]["seconds"] for who in (0, 1)]
            work = [1e6 * turns[who]["cpu_seconds"] / turns[who]["steps"] for who in (0, 1)]
            row = {"ratio": rates[0] / rates[1], "ours": rates[0], "rival": rates[1], "cpu_us_per_step": work, "shares": turns[0]["shares"]}
            rows.append(row)
            print(f"{name} {game} pair {pair}: {rates[0]:7.0f} {rates[1]:7.0f}  {row['ratio']:.2f}  {work} {row['shares']}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    return {
        "agent": name,
        "game": game,
        "num_envs": setting["num_envs"],
        "updates": setting["updates"],
        "ratio_median": round(statistics.median(row["ratio"] for row in rows), 3),
        "ratio_range": [round(extreme(row["ratio"] for row in rows), 3) for extreme in (min, max)],
        "goal": GOAL,
        "least": LEAST,
        "steps_per_second": round(statistics.median(row["ours"] for row in rows)),
        "rival_steps_per_second": round(statistics.median(row["rival"] for row in rows)),
        "pairs": rows,
        "ours": workers[0].facts,
        "rival": workers[1].facts,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a pair, writes JSON with `--out`, and returns 1 where a median ratio falls below LEAST, else 0."""
    parser = argparse.ArgumentParser(prog="sb3_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sb3-python", help="the interpreter of a venv with stable-baselines3")
    parser.add_argument("--agents", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--pairs", type=int, default=7, help="at least five for a figure that is kept")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--serve", choices=list(SETTINGS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve(arguments.serve, arguments.game, arguments.precision)
        return 0
    if not arguments.sb3_python:
        parser.error("--sb3-python names the interpreter of a venv with stable-baselines3")
    load = os.getloadavg()[0]
    given = (arguments.game, arguments.sb3_python, arguments.pairs, arguments.seconds, arguments.precision)
    rows = [measure(name, *given) for name in arguments.agents]
    for row in rows:
        rates = f"{row['steps_per_second']:,} to {row['rival_steps_per_second']:,} agent steps/s"
        low, high = row["ratio_range"]
        print(f"{row['agent']} {row['game']}: {rates}, ratio {row['ratio_median']:.2f} ({low:.2f}-{high:.2f})")
    if arguments.out:
        facts = {
            "command": shlex.join(["python", "-m", "benchmarks.sb3_speed", *(sys.argv[1:] if argv is None else argv)]),
            "processor": platform.processor() or platform.machine(),
            "usable_cpus": usable_cpus(),
            "load_before": load,
            "outside_the_code": OUTSIDE,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return int(any(row["ratio_median"] < LEAST for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
