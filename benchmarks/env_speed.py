"""How fast `envs.atari.AtariEnv` is through its Step contract, beside the bare AtariVectorEnv of ale-py with the same settings.

Both play the same random actions in turns, a few hundred milliseconds each, who goes first alternating, so that a noisy machine troubles
both; each pair of turns gives one ratio, and the median counts.

    python -m benchmarks.env_speed --out benchmarks/results/env_speed.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ale_py import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from benchmarks.record import record
from envs.atari import GAMES, OBS_MODES, AtariEnv
from envs.protocols import PROTOCOLS

REQUIRED_RATIO = 0.9
"""Of our stepping rate to the bare one's, in grey 84x84."""


def measure(game: str, obs: str, num_envs: int, num_threads: int, pairs: int, steps: int, device: str) -> dict[str, Any]:
    """One row of the table: median frames per second of both and the median ratio (ours to bare) over `pairs` of turns of `steps` steps."""
    protocol = PROTOCOLS["mfec2016"]
    ours = AtariEnv(game, num_envs, device, protocol, obs, num_threads)
    channels, height, width = OBS_MODES[obs]
    bare = AtariVectorEnv(
        GAMES[game],
        num_envs,
        num_threads=ours.num_threads,
        max_num_frames_per_episode=protocol.max_episode_frames,
        repeat_action_probability=protocol.sticky,
        full_action_space=protocol.full_action_set,
        autoreset_mode=AutoresetMode.SAME_STEP,
        img_height=height,
        img_width=width,
        grayscale=channels == 1,
        stack_num=1,
        frameskip=protocol.frame_skip,
        noop_max=protocol.noop_max,
        reward_clipping=False,
        use_fire_reset=protocol.fire_reset,
    )
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(ours.spec.num_actions, (steps, num_envs), generator=generator)
    on_device, on_host = list(actions.to(device)), list(actions.numpy())
    ours.reset(0)
    bare.reset(seed=np.array([ours.lane_seed(0, lane) for lane in range(num_envs)]))

    def turn(step: Callable[[Any], Any], given: list[Any]) -> float:
        start = time.perf_counter()
        for action in given:
            step(action)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    players: list[tuple[Callable[[Any], Any], list[Any]]] = [(ours.step, on_device), (bare.step, on_host)]
    for player in players:
        turn(*player)
    seconds = []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        taken = {who: turn(*players[who]) for who in order}
        seconds.append((taken[0], taken[1]))
    ours.close()
    frames = steps * num_envs * protocol.frame_skip
    ratios = sorted(theirs / mine for mine, theirs in seconds)
    return {
        "game": game,
        "obs": obs,
        "num_envs": num_envs,
        "num_threads": ours.num_threads,
        "frames_per_second": round(frames / statistics.median(mine for mine, _ in seconds)),
        "bare_frames_per_second": round(frames / statistics.median(theirs for _, theirs in seconds)),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(float(quartile), 4) for quartile in np.quantile(ratios, [0.25, 0.75])],
        "pairs": pairs,
        "steps_per_turn": steps,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes it with `--out`, and returns 1 where grey 84x84 falls below REQUIRED_RATIO, else 0."""
    parser = argparse.ArgumentParser(prog="env_speed", description="AtariEnv beside the bare AtariVectorEnv.")
    parser.add_argument("--games", nargs="+", default=["Pong", "Qbert"], choices=sorted(GAMES), metavar="GAME")
    parser.add_argument("--obs", nargs="+", default=list(OBS_MODES), choices=list(OBS_MODES))
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--num-threads", type=int, default=0, help="0: all that the process may use")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="steps of all lanes in one turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    print(f"{'game':16s} {'obs':11s} {'frames/s':>9s} {'bare':>9s} {'ratio':>6s}  quartiles")
    rows = []
    for game in arguments.games:
        for obs in arguments.obs:
            row = measure(game, obs, arguments.num_envs, arguments.num_threads, arguments.pairs, arguments.steps, arguments.device)
            low, high = row["ratio_quartiles"]
            speeds = f"{row['frames_per_second']:9d} {row['bare_frames_per_second']:9d}"
            print(f"{game:16s} {obs:11s} {speeds} {row['ratio_median']:6.3f}  {low:.3f}-{high:.3f}", flush=True)
            rows.append(row)
    facts = {"required_ratio_grey84": REQUIRED_RATIO, "device": arguments.device}
    record(arguments.out, "env_speed", argv, rows, ("torch", "ale-py", "numpy"), **facts)
    return int(any(row["ratio_median"] < REQUIRED_RATIO for row in rows if row["obs"] == "grey84"))


if __name__ == "__main__":
    raise SystemExit(main())
