"""Training rate beside Stable-Baselines3 on the same processors: same game, lanes, network, batch and updates a step, in alternating pairs.

    python -m benchmarks.sb3_speed --sb3-python /path/to/venv/bin/python --out benchmarks/results/sb3_speed.json

Stable-Baselines3 is no dependency: the venv holds stable-baselines3, ale-py, gymnasium, opencv-python-headless and torch. Both sides are
processes that live through all pairs (`benchmarks.turns`). Stock means stock: the rival's environments, wrappers and threads are its own
defaults. DQN has the rival's own algorithm, and a row that shows what double estimation, the house's default, costs; a replay of 10,000
frames, for the rival keeps stacks, so that a million would take it 56 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from agents.actor_critic import ActorCritic
from agents.dqn import DQN
from agents.loop import play
from benchmarks.record import record
from benchmarks.turns import OUTSIDE, Worker, serve, summary, take_turns
from envs.atari import AtariEnv
from envs.protocols import PROTOCOLS

CPU = torch.device("cpu")
GOAL, LEAST = 3.0, 2.2
OURS_DQN: dict[str, Any] = {
    "double": False,
    "capacity": 10_000,
    "learning_starts_frames": 800,
    "update_frames": 16,
    "epsilon_start": 0.05,
    "epsilon_end": 0.05,
    "optimiser": "adam",
    "learning_rate": 1e-4,
    "decay": 0.999,
    "optimiser_epsilon": 1e-8,
    "max_gradient_norm": 10.0,
}
RIVALS_DQN = {
    "buffer_size": 10_000,
    "learning_starts": 200,
    "train_freq": 4,  # of all environments: 32 agent steps
    "gradient_steps": 8,
    "exploration_initial_eps": 0.05,
    "exploration_final_eps": 0.05,
}
DQN_SETTING: dict[str, Any] = {"algorithm": "dqn", "num_envs": 8, "steps_per_update": 4, "batch": 32, "rival": RIVALS_DQN}
SETTINGS: dict[str, dict[str, Any]] = {
    "a3c": {"algorithm": "a3c", "num_envs": 16, "steps_per_update": 80, "batch": 80, "ours": {}, "rival": {"ent_coef": 0.01}},
    "dqn": DQN_SETTING | {"ours": OURS_DQN},
    "double dqn": DQN_SETTING | {"ours": OURS_DQN | {"double": True}},
}
"""`steps_per_update`: agent steps of all environments together for every update of `batch` transitions."""
AGENTS = {"a3c": ActorCritic, "dqn": DQN}
MUST = ("a3c", "dqn")  # reach LEAST


def work(name: str, game: str, precision: str) -> None:
    """Our side."""
    torch.manual_seed(0)
    setting = SETTINGS[name]
    env = AtariEnv(game, setting["num_envs"], CPU, PROTOCOLS["nature2015"])
    agent = AGENTS[setting["algorithm"]](env.spec, CPU, precision=precision, **setting["ours"])
    facts: dict[str, Any] = {"torch_threads": torch.get_num_threads(), "emulator_threads": env.num_threads}
    facts |= {"dtype": str(agent.optimiser.dtype), "python": platform.python_version()}
    facts |= {package: version(package) for package in ("torch", "ale-py", "numpy")}
    serve(play(env, agent, 10**12, seed=0), env.num_envs, facts, lambda: int(agent.optimiser.updates))


def measure(name: str, game: str, sb3_python: str, pairs: int, seconds: float, precision: str) -> dict[str, Any]:
    """One row: rates and ratios of `pairs` adjacent pairs of turns of about `seconds` each."""
    setting = SETTINGS[name]
    ours = [sys.executable, "-m", "benchmarks.sb3_speed", "--serve", name, "--game", game, "--precision", precision]
    knobs = json.dumps(setting["rival"])
    rival = [sb3_python, "-m", "benchmarks.sb3_rival", setting["algorithm"], game, str(setting["num_envs"]), knobs]
    workers = [Worker(ours, OUTSIDE), Worker(rival, {})]
    rows = take_turns(workers, pairs, seconds, 800)  # whole rollouts, and beyond the start of learning
    for row in rows:
        due = row["updates"] * setting["steps_per_update"] / row["steps"]
        assert 0.99 < due < 1.01, f"{due} updates for every {setting['steps_per_update']} steps"
    told = {key: setting[key] for key in ("num_envs", "steps_per_update", "batch")}
    sides = {"ours": workers[0].facts | {"knobs": setting["ours"]}, "rival": workers[1].facts | {"knobs": setting["rival"]}}
    return {"agent": name, "game": game, **told, "goal": GOAL, "least": LEAST, **summary(rows), **sides}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line an agent, writes JSON with `--out`, and returns 1 where a3c or dqn falls below LEAST, else 0."""
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
        work(arguments.serve, arguments.game, arguments.precision)
        return 0
    if not arguments.sb3_python:
        parser.error("--sb3-python names the interpreter of a venv with stable-baselines3")
    rows = []
    for name in arguments.agents:
        row = measure(name, arguments.game, arguments.sb3_python, arguments.pairs, arguments.seconds, arguments.precision)
        rates = f"{row['steps_per_second']:,} to {row['others_steps_per_second']:,} agent steps/s"
        low, high = row["ratio_range"]
        print(f"{name} {row['game']}: {rates}, ratio {row['ratio_median']:.2f} ({low:.2f}-{high:.2f})", flush=True)
        rows.append(row)
    record(arguments.out, "sb3_speed", argv, rows, outside_the_code=f"ours runs with {OUTSIDE}, the rival as installed")
    return int(any(row["ratio_median"] < LEAST for row in rows if row["agent"] in MUST))


if __name__ == "__main__":
    raise SystemExit(main())
