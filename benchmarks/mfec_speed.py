"""Training rate of episodic control against the stepping rate of its environment alone, in adjacent pairs of one run.

    python -m benchmarks.mfec_speed --out benchmarks/results/mfec_speed.json

Each action's table is first filled with keys of real frames under random play (every frame is written under every action,
with a random return); then stretches of the environment alone and of the whole training loop take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.episodic_control import EpisodicControl
from agents.loop import play
from envs.atari import AtariEnv
from envs.protocols import PROTOCOLS
from generative.projection import RandomProjection

CPU = torch.device("cpu")
GOALS = {20_000: 0.3, 100_000: 0.15}


def fill(agent: EpisodicControl, env: AtariEnv, keys: int) -> None:
    """Random play until every table holds `keys` entries."""
    step, actions = env.reset(1), env.spec.num_actions
    while min(agent.memory.sizes) < keys:
        frames = step.obs.unsqueeze(1)
        features, hashes = agent.encoder.encode(step.obs), agent._hash(frames)
        every = torch.arange(actions).repeat_interleave(env.num_envs)
        agent.memory.write(every, features.repeat(actions, 1), hashes.repeat(actions), torch.rand(every.shape[0]) * 1000)
        step = env.step(torch.randint(actions, (env.num_envs,)))


def alone(env: AtariEnv, ticks: int) -> float:
    """Agent steps per second of the environment alone under random actions."""
    env.reset(2)
    actions = [torch.randint(env.spec.num_actions, (env.num_envs,)) for _ in range(ticks)]
    began = time.perf_counter()
    for action in actions:
        env.step(action)
    return ticks * env.num_envs / (time.perf_counter() - began)


def training(env: AtariEnv, agent: EpisodicControl, ticks: int, seed: int) -> tuple[float, list[float]]:
    """Agent steps per second of the training loop, its reset left out, and its shares act, env, learn, observe."""
    loop = play(env, agent, (ticks + 1) * env.num_envs * 4, seed)
    next(loop)
    began, parts = time.perf_counter(), [0.0] * 4
    for tick in loop:
        parts = [total + part for total, part in zip(parts, tick.seconds)]
    wall = time.perf_counter() - began
    return ticks * env.num_envs / wall, [part / wall for part in parts]


def measure(game: str, keys: int, pairs: int, ticks: int, search: str) -> dict[str, Any]:
    """One row: rates and ratio of `pairs` adjacent pairs."""
    torch.manual_seed(0)
    env = AtariEnv(game, 16, CPU, PROTOCOLS["mfec2016"])
    agent = EpisodicControl(env.spec, CPU, encoder=RandomProjection(env.spec.obs_shape, env.spec.num_actions, CPU), search=search)
    fill(agent, env, keys)
    rows = []
    for pair in range(pairs):
        rate = alone(env, ticks)
        trained, shares = training(env, agent, ticks, 10 + pair)
        rows.append((trained / rate, rate, trained, shares))
    env.close()
    ratios = [row[0] for row in rows]
    return {
        "game": game,
        "keys_per_action": keys,
        "entries_at_end": agent.memory.sizes,
        "ratio_median": statistics.median(ratios),
        "ratio_least": min(ratios),
        "goal": GOALS.get(keys),
        "environment_steps_per_second": statistics.median(row[1] for row in rows),
        "training_steps_per_second": statistics.median(row[2] for row in rows),
        "shares_act_env_learn_observe": [statistics.median(row[3][part] for row in rows) for part in range(4)],
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints a table, and writes JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", nargs="+", default=["Pong", "Qbert"])
    parser.add_argument("--keys", nargs="+", type=int, default=list(GOALS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--ticks", type=int, default=250)
    parser.add_argument("--search", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    rows = [measure(game, keys, options.pairs, options.ticks, options.search) for game in options.games for keys in options.keys]
    print("game   keys/action  env steps/s  training steps/s  ratio (least)  goal")
    for row in rows:
        rates = f"{row['environment_steps_per_second']:11,.0f}  {row['training_steps_per_second']:16,.0f}"
        print(f"{row['game']:6} {row['keys_per_action']:11,}  {rates}  {row['ratio_median']:.3f} ({row['ratio_least']:.3f})  {row['goal']}")
    if options.out:
        facts = {
            "command": " ".join(["python -m benchmarks.mfec_speed", *(argv if argv is not None else sys.argv[1:])]),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_before": load,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "spin": os.environ.get("GOMP_SPINCOUNT"),
        }
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
