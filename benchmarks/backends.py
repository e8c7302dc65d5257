"""How fast the two Atari backends step, `envs.atari.AtariEnv` and `envs.atari_envpool.EnvPoolAtari`, by number of environments and threads.

Both play the same random actions in turns, each through its Step contract, who goes first alternating, so that a noisy machine troubles
both; each pair of turns gives one ratio, and the medians count. A turn has the same number of lane steps in every row. Rows with more
threads than environments are left out: neither backend uses the others. `open_seconds` is what making the lanes and their first reset
took, once, ale-py's first; EnvPool spends it again at every reset.

    python -m benchmarks.backends --out benchmarks/results/backends.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import record
from envs.api import VectorEnv
from envs.atari import GAMES, OBS_MODES, AtariEnv
from envs.atari_envpool import EnvPoolAtari
from envs.protocols import PROTOCOLS


def measure(game: str, obs: str, num_envs: int, num_threads: int, pairs: int, lane_steps: int, device: str) -> dict[str, Any]:
    """One row of the table: median frames per second of both backends and the median ratio (EnvPool to ale-py) over `pairs` of turns."""
    protocol = PROTOCOLS["mfec2016"]
    envs: list[VectorEnv] = []
    open_seconds = []
    for backend in (AtariEnv, EnvPoolAtari):
        start = time.perf_counter()
        envs.append(backend(game, num_envs, device, protocol, obs, num_threads))
        envs[-1].reset(0)
        open_seconds.append(time.perf_counter() - start)
    steps = max(1, lane_steps // num_envs)
    generator = torch.Generator().manual_seed(0)
    actions = list(torch.randint(envs[0].spec.num_actions, (steps, num_envs), generator=generator).to(device))

    def turn(env: VectorEnv) -> float:
        start = time.perf_counter()
        for action in actions:
            env.step(action)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for env in envs:
        turn(env)
    seconds = []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        taken = {who: turn(envs[who]) for who in order}
        seconds.append((taken[0], taken[1]))
    for env in envs:
        env.close()
    frames = steps * num_envs * protocol.frame_skip
    ratios = sorted(ale / pool for ale, pool in seconds)
    return {
        "game": game,
        "obs": obs,
        "num_envs": num_envs,
        "num_threads": num_threads,
        "ale_frames_per_second": round(frames / statistics.median(ale for ale, _ in seconds)),
        "envpool_frames_per_second": round(frames / statistics.median(pool for _, pool in seconds)),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(float(quartile), 4) for quartile in np.quantile(ratios, [0.25, 0.75])],
        "open_seconds": [round(taken, 3) for taken in open_seconds],
        "pairs": pairs,
        "steps_per_turn": steps,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes it with `--out`, and returns 0. UserError where EnvPool is not installed."""
    parser = argparse.ArgumentParser(prog="backends", description="AtariEnv beside EnvPoolAtari.")
    parser.add_argument("--games", nargs="+", default=["Pong"], choices=sorted(GAMES), metavar="GAME")
    parser.add_argument("--obs", nargs="+", default=["grey84"], choices=list(OBS_MODES))
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--num-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--lane-steps", type=int, default=1600, help="agent steps of all lanes together in one turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    print(f"{'game':16s} {'obs':11s} {'envs':>5s} {'threads':>7s} {'ale frames/s':>12s} {'envpool':>9s} {'ratio':>6s}  quartiles")
    rows = []
    for game, obs, num_envs, num_threads in product(arguments.games, arguments.obs, arguments.num_envs, arguments.num_threads):
        if num_threads > num_envs:
            continue
        row = measure(game, obs, num_envs, num_threads, arguments.pairs, arguments.lane_steps, arguments.device)
        low, high = row["ratio_quartiles"]
        speeds = f"{row['ale_frames_per_second']:12d} {row['envpool_frames_per_second']:9d} {row['ratio_median']:6.3f}"
        print(f"{game:16s} {obs:11s} {num_envs:5d} {num_threads:7d} {speeds}  {low:.3f}-{high:.3f}", flush=True)
        rows.append(row)
    record(arguments.out, "backends", argv, rows, ("torch", "ale-py", "envpool", "numpy"), device=arguments.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
