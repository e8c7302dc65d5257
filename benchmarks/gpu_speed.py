"""Training rates on a GPU, updates called and captured, beside the share of the time in which the GPU works.

    python -m benchmarks.gpu_speed --out benchmarks/results/gpu_speed.json

The published figure to stand beside: LeanRL's PPO on Atari with CUDA graphs, 6,800 agent steps/s on one H100. The configurations' own
defaults, but that learning starts at once.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.loop import play
from benchmarks.record import record
from lab.configure import compose, plain
from lab.run import make_agent, make_env

PUBLISHED = 6_800
AGENTS = {
    "a3c": ["agent=a3c"],
    "a3c_plus": ["agent=a3c_plus", "density=cts"],
    "dqn": ["agent=dqn", "agent.learning_starts_frames=2_000", "agent.capacity=200_000"],
    "dqn_cts": ["agent=dqn", "density=cts", "agent.learning_starts_frames=2_000", "agent.capacity=200_000"],
}


class Watch:
    """Samples how busy the GPU is, in percent, five times a second. On a processor it has nothing to tell."""

    def __init__(self, device: torch.device) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if device.type == "cuda" else None

    def close(self) -> float | None:
        """The median share since the start, in [0, 1]."""
        if self._process is None:
            return None
        self._process.terminate()
        samples = [int(word) for word in self._process.communicate()[0].split() if word.isdigit()]
        return round(statistics.median(samples) / 100, 3) if samples else None


def measure(name: str, capture: bool, game: str, num_envs: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """One row, after as long a warm-up."""
    torch.manual_seed(0)
    words = [f"env={game}", f"num_envs={num_envs}", *AGENTS[name], f"agent.capture={str(capture).lower()}"]
    settings = plain(compose(words))
    env = make_env(settings, num_envs, device)
    try:
        agent, _ = make_agent(settings, env.spec, device)
        ticks = play(env, agent, 10**12, seed=0)
        _turn(ticks, seconds, device)
        watch = Watch(device)
        count, wall, parts = _turn(ticks, seconds, device)
        busy = watch.close()
        updates = agent.optimiser.updates  # type: ignore[attr-defined]
        ticks.close()
    finally:
        env.close()
    return {
        "agent": name,
        "capture": capture,
        "game": game,
        "num_envs": num_envs,
        "steps_per_second": round(count * num_envs / wall),
        "of_published": round(count * num_envs / wall / PUBLISHED, 3),
        "gpu_share": busy,
        "updates": updates,
        "shares": {part: round(spent / wall, 3) for part, spent in zip(("act", "env", "learn", "observe"), parts)},
    }


def _turn(ticks: Any, seconds: float, device: torch.device) -> tuple[int, float, list[float]]:
    """Ticks of about so many seconds: how many, how long, and host seconds of each part."""
    began, count, parts = time.perf_counter(), 0, [0.0] * 4
    while time.perf_counter() < began + seconds:
        parts = [total + part for total, part in zip(parts, next(ticks).seconds)]
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count, time.perf_counter() - began, parts


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="gpu_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--num-envs", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script; nothing is captured there")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device answers", file=sys.stderr)
        return 2
    device, rows = torch.device(arguments.device), []
    print(f"{'agent':10s} {'envs':>5s} {'captured':>8s} {'steps/s':>8s} {'of 6,800':>8s} {'GPU':>5s}")
    for name in arguments.agents:
        for num_envs in arguments.num_envs:
            for capture in (False, True) if device.type == "cuda" else (False,):
                row = measure(name, capture, arguments.game, num_envs, arguments.seconds, device)
                rates = f"{row['steps_per_second']:8,d} {row['of_published']:8.2f}"
                print(f"{name:10s} {num_envs:5d} {capture!s:>8s} {rates} {row['gpu_share'] or 0:5.2f}  {row['shares']}", flush=True)
                rows.append(row)
    record(arguments.out, "gpu_speed", argv, rows, published=PUBLISHED, device=arguments.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
