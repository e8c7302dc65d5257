"""What recording clips costs: frames/s of random play that is recorded, against the same play that is only stepped.

    python -m benchmarks.collect_speed --out benchmarks/results/collect_speed.json

Both take turns of some seconds in one process, on all processors. A recorded turn is a part: compressed, checksummed and on disk when its
time is taken. Beside it, bytes a step on disk, and clips a second that can be drawn from what was recorded.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from agents.loop import watch
from agents.random import RandomAgent
from benchmarks.record import record
from envs.atari import OBS_MODES, AtariEnv
from envs.protocols import PROTOCOLS
from generative.clips import ClipData
from generative.recording import ClipWriter

GOALS = {"grey84": 0.8, "rgb64": 0.8, "rgb210x160": 0.5}
GOAL_BYTES = 5e9 / 500_000  # a step, of full frames
DRAWN, WINDOW = 32, 7


def measure(game: str, obs: str, lanes: int, ticks: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One row: medians over `rounds` of turns of so many ticks."""
    env = AtariEnv(game, lanes, "cpu", PROTOCOLS["mfec2016"], obs=obs)
    agent, rates = RandomAgent(env.spec, torch.device("cpu")), []
    frames = ticks * lanes * env.spec.frames_per_step
    with ClipWriter(folder, env.spec, lanes, {"env": game}) as writer:
        for turn in range(rounds + 1):
            rate = {}
            for recorded in (False, True) if turn % 2 else (True, False):
                began = time.perf_counter()
                for tick in islice(watch(env, agent, turn), ticks):
                    if recorded:
                        writer.append(tick.step, tick.decision.action, tick.after)
                if recorded:
                    writer.end_part()
                rate[recorded] = frames / (time.perf_counter() - began)
            rates.append((rate[True] / rate[False], rate[True], rate[False]))
    env.close()
    data = ClipData(folder)
    began, drawn = time.perf_counter(), 0
    while time.perf_counter() < began + 2:
        data.sample_clips(DRAWN, WINDOW)
        drawn += DRAWN
    ratios = [ratio for ratio, _, _ in rates[1:]]
    return {
        "game": game,
        "obs": obs,
        "share_median": round(statistics.median(ratios), 3),
        "share_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "recorded_frames_per_second": round(statistics.median(row[1] for row in rates[1:])),
        "stepped_frames_per_second": round(statistics.median(row[2] for row in rates[1:])),
        "bytes_per_step": round(sum(path.stat().st_size for path in folder.iterdir()) / len(data), 1),
        "clips_drawn_per_second": round(drawn / (time.perf_counter() - began)),
        "rounds": rounds,
        "steps_per_turn": ticks * lanes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, writes JSON where `--out` says. Returns 1 where a goal is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", nargs="+", default=["Pong", "MsPacman", "Seaquest"])
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--ticks", type=int, default=300, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    print("game       pictures    recorded  stepped frames/s  share (range)          bytes a step  clips/s drawn")
    rows = []
    for game in arguments.games:
        for obs in (name for name in OBS_MODES if name in GOALS):
            folder = Path(tempfile.mkdtemp(prefix="clips-"))
            row = measure(game, obs, arguments.lanes, arguments.ticks, arguments.rounds, folder)
            shutil.rmtree(folder)
            low, high = row["share_range"]
            rates = f"{row['recorded_frames_per_second']:8,}  {row['stepped_frames_per_second']:16,}"
            share = f"{row['share_median']:.2f} ({low:.2f} to {high:.2f})"
            print(f"{game:10} {obs:10}  {rates}  {share:21}  {row['bytes_per_step']:12,.0f}  {row['clips_drawn_per_second']:,}", flush=True)
            rows.append(row)
    record(arguments.out, "collect_speed", argv, rows, goals_of_the_share=GOALS, goal_bytes_per_step=GOAL_BYTES, clip_steps=WINDOW)
    slow = any(row["share_median"] < GOALS[row["obs"]] for row in rows)
    return int(slow or any(row["bytes_per_step"] > GOAL_BYTES for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
