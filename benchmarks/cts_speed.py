"""How many frames context trees absorb for every agent step that a bare emulator makes on the same core.

    python -m benchmarks.cts_speed --out benchmarks/results/cts_speed.json

Both take turns of a second or so on one thread. The emulator is as bare as it comes: four frames of one action, one grey picture, no
resizing, no vector environment. Frames are those of random play, shrunk to 42x42, not seen before by the trees' first turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ale_py import ALEInterface, LoggerMode, roms

from agents.bonus import density_shape, shrink_frames
from benchmarks.record import record
from envs.atari import GAMES, AtariEnv
from envs.protocols import PROTOCOLS
from generative.cts import CTS

GOAL = 2.0


def frames_of_random_play(game: str, count: int) -> torch.Tensor:
    """uint8 (count, 1, 42, 42) from eight lanes."""
    env = AtariEnv(game, 8, "cpu", PROTOCOLS["mfec2016"])
    env.reset(0)
    shape = density_shape(env.spec.obs_shape)
    frames = [shrink_frames(env.step(torch.randint(env.spec.num_actions, (8,))).obs, shape) for _ in range(-(-count // 8))]
    env.close()
    return torch.cat(frames)[:count]


def emulator_rate(emulator: ALEInterface, steps: int) -> float:
    """Agent steps a second."""
    actions = emulator.getMinimalActionSet()
    chosen = torch.randint(len(actions), (steps,)).tolist()
    began = time.perf_counter()
    for index in chosen:
        for _ in range(4):
            emulator.act(actions[index])
        emulator.getScreenGrayscale()
        if emulator.game_over():
            emulator.reset_game()
    return steps / (time.perf_counter() - began)


def absorb_rate(model: CTS, frames: torch.Tensor, batch: int) -> float:
    """Frames a second, learned and recoded."""
    began = time.perf_counter()
    for part in frames.split(batch):
        model.absorb(part)
    return len(frames) / (time.perf_counter() - began)


def measure(game: str, batch: int, rounds: int, count: int) -> dict[str, Any]:
    """One row: medians over `rounds` of turns."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator, model = ALEInterface(), CTS()
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.loadROM(str(roms.get_rom_path(GAMES[game])))
    torch.manual_seed(0)
    frames = frames_of_random_play(game, count * (rounds + 1))
    absorb_rate(model, frames[:count], batch)  # compiles, and touches memory for the first time
    rows = []
    for turn in range(1, rounds + 1):
        steps = emulator_rate(emulator, count)
        absorbed = absorb_rate(model, frames[turn * count : (turn + 1) * count], batch)
        rows.append((absorbed / steps, absorbed, steps))
    ratios = [row[0] for row in rows]
    return {
        "game": game,
        "batch": batch,
        "frames_per_agent_step_median": round(statistics.median(ratios), 3),
        "frames_per_agent_step_least": round(min(ratios), 3),
        "frames_per_second": round(statistics.median(row[1] for row in rows)),
        "emulator_agent_steps_per_second": round(statistics.median(row[2] for row in rows)),
        "rounds": rounds,
        "frames_per_turn": count,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, writes JSON where `--out` says. Returns 1 where a median of batches of 8 or more is below GOAL, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", nargs="+", default=["Pong", "Freeway", "MontezumaRevenge"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=2_000, help="of a turn")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("game              batch  frames/s  emulator steps/s  frames an agent step (least)")
    rows = []
    for game in arguments.games:
        for batch in arguments.batches:
            row = measure(game, batch, arguments.rounds, arguments.frames)
            share = f"{row['frames_per_agent_step_median']:.2f} ({row['frames_per_agent_step_least']:.2f})"
            print(f"{game:17} {batch:5} {row['frames_per_second']:9,} {row['emulator_agent_steps_per_second']:17,}  {share}", flush=True)
            rows.append(row)
    record(arguments.out, "cts_speed", argv, rows, goal_frames_per_agent_step=GOAL, threads=1)
    return int(any(row["frames_per_agent_step_median"] < GOAL for row in rows if row["batch"] >= 8))


if __name__ == "__main__":
    raise SystemExit(main())
