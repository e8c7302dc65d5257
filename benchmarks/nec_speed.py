"""How fast neural episodic control trains on Pong once it learns: this checkout beside another one, in alternating pairs of turns.

    python -m benchmarks.nec_speed --other PATH --out benchmarks/results/nec_speed.json

This checkout plays until the agent has learned for a while and saves its state; then both go on from there, each a process of its own that
lives through all pairs (`benchmarks.turns`). 16 environments, the configuration's own defaults, one thread for torch and numba, as where
several runs share a machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.loop import play
from agents.neural_episodic_control import NeuralEpisodicControl
from benchmarks.record import record
from benchmarks.turns import OUTSIDE, Worker, serve, summary, take_turns
from envs.atari import AtariEnv
from envs.protocols import PROTOCOLS

CPU, NUM_ENVS = torch.device("cpu"), 16
ROOT = Path(__file__).parent.parent


def make() -> tuple[AtariEnv, NeuralEpisodicControl]:
    torch.manual_seed(0)
    env = AtariEnv("Pong", NUM_ENVS, CPU, PROTOCOLS["mfec2016"])
    return env, NeuralEpisodicControl(env.spec, CPU)


def learn(frames: int, path: Path) -> None:
    """Saves the agent as it is after so many frames."""
    env, agent = make()
    for _ in play(env, agent, frames, seed=0):
        pass
    torch.save(agent.state_dict(), path)
    env.close()


def work(path: Path) -> None:
    """One side, going on from the state at `path`."""
    env, agent = make()
    agent.load_state_dict(torch.load(path))
    serve(play(env, agent, 10**12, seed=1), NUM_ENVS, {"torch_threads": torch.get_num_threads()}, lambda: agent.optimiser.updates)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints medians and ratios, and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="nec_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout of the project")
    parser.add_argument("--frames", type=int, default=300_000, help="played before the state is saved")
    parser.add_argument("--state", type=Path, help="where it is kept, and taken from when it is there already")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one turn")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        work(arguments.serve)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = (arguments.state or Path(folder) / "state.pt").resolve()
        if not path.exists():
            learn(arguments.frames, path)
        sizes = [table["values"].shape[0] for table in torch.load(path)["memory"]["tables"].values()]
        threads = OUTSIDE | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(path)]  # which imports agents from PYTHONPATH
        workers = [Worker(command, threads | {"PYTHONPATH": str(side)}) for side in (ROOT, arguments.other.resolve())]
        row = {"entries": sizes, **summary(take_turns(workers, arguments.pairs, arguments.seconds, 10 * NUM_ENVS))}
    rates = f"{row['steps_per_second']:,} beside {row['others_steps_per_second']:,} agent steps/s"
    print(f"{rates}: {row['ratio_median']:.2f} times {row['ratio_range']}, by processor time {row['cpu_ratio_median']:.2f} times")
    words = ["--other", "PATH", *(f"--{name}={getattr(arguments, name)}" for name in ("frames", "pairs", "seconds"))]
    record(arguments.out, "nec_speed", words, [row], outside_the_code=threads)
    return row


if __name__ == "__main__":
    main()
