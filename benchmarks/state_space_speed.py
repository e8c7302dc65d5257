"""Speed of the state-space model: one update of 16 sequences of 64 steps and one step of a rollout, against the work that they count.

    python -m benchmarks.state_space_speed --out benchmarks/results/state_space_speed.json

The model is `configs/model/state_space.yaml` on 64x64 frames in colour with 18 actions, 12 million parameters. An update is what job=fit
does with clips that lie on the device: losses, gradients, the watch for numbers that are not finite, Adam. On a GPU it is captured as a
CUDA graph too, where nothing is watched. Modes take turns within every round; figures are medians of the rounds. Floating-point operations
are those that torch counts (matrix products and convolutions, forward and backward), a multiplication and an addition being two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agents.capture import Captured
from benchmarks.record import record
from generative.api import Clip
from generative.data import FrameMemory
from generative.fit import Fitter, Precision
from generative.state_space import StateSpace

SHAPE, ACTIONS, GOAL_MS = (3, 64, 64), 18, 22.0
CONFIG = Path(__file__).parent.parent / "configs" / "model" / "state_space.yaml"
Work = Callable[[], object]


def _plain(node: Any) -> dict[str, Any]:
    return {str(key): value for key, value in node.items()}


def build(device: torch.device, changes: dict[str, Any]) -> StateSpace:
    """The model of the configuration, but for `changes`."""
    knobs = {key: value for key, value in _plain(OmegaConf.load(CONFIG)).items() if key != "_target_"}
    torch.manual_seed(0)
    return StateSpace(SHAPE, ACTIONS, device, **(knobs | changes))


def clip_of(sequences: int, steps: int, device: torch.device) -> Clip:
    """Random frames and actions; no reward, no end."""
    frames = torch.randint(0, 256, (sequences, steps + 1, *SHAPE), dtype=torch.uint8, device=device)
    actions, rewards = torch.randint(ACTIONS, (sequences, steps), device=device), torch.zeros(sequences, steps, device=device)
    return Clip(frames, actions, rewards, rewards + 1, rewards.bool())


def update_of(model: StateSpace, clip: Clip, precision: Precision) -> Work:
    """One update as job=fit makes it."""
    frames = FrameMemory.from_tensor(clip.frames[0])
    fitter = Fitter(model, frames, learning_rate=1e-4, precision=precision, updates=10**9)
    return lambda: fitter.step(clip)


def captured_update_of(model: StateSpace, clip: Clip, precision: Precision) -> Work:
    """One update, recorded as a CUDA graph."""
    optimiser = torch.optim.Adam(model.parameters(), 1e-4, fused=True, capturable=True)

    def update(clip: Clip) -> dict[str, Tensor]:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(clip.frames.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            ((_, loss, metrics),) = model.losses(clip)
        loss.backward()
        optimiser.step()
        return metrics

    graph = Captured(update)
    return lambda: graph(clip)


def step_of(model: StateSpace, lanes: int) -> Work:
    """One step of a rollout of so many lanes, picture included."""
    state = model.start(clip_of(lanes, model.context_frames - 1, model.device))
    action = torch.zeros(lanes, dtype=torch.int64, device=model.device)
    return lambda: model.step(state, action)


def works(device: torch.device, sequences: int, steps: int, lanes: Sequence[int], changes: dict[str, Any]) -> dict[str, Work]:
    """Name -> what is timed; every mode has a model of its own."""
    clip = clip_of(sequences, steps, device)
    modes: dict[str, Work] = {}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        modes[f"update {precision}"] = update_of(build(device, changes), clip, precision)
        if device.type == "cuda":
            modes[f"update {precision} captured"] = captured_update_of(build(device, changes), clip, precision)
    for count in lanes:
        modes[f"step of {count}"] = step_of(build(device, changes), count)
    return modes


def measure(modes: dict[str, Work], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row a mode: median and range of seconds a call, work, and work a second."""
    counted = {}
    for name, work in modes.items():
        if not name.endswith("captured"):  # which does the same work
            with FlopCounterMode(display=False) as counter:
                work()
            counted[name] = counter.get_total_flops()
        for _ in range(5 if name.endswith("captured") else 1):
            work()
    taken: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name, work in modes.items():
            taken[name].append(_seconds(work, device))
    rows = []
    for name, seconds in taken.items():
        median, flops = statistics.median(seconds), counted[name.removesuffix(" captured")]
        rows.append(
            {
                "what": name,
                "seconds": round(median, 6),
                "range": [round(min(seconds), 6), round(max(seconds), 6)],
                "gflop": round(flops / 1e9, 3),
                "gflop_per_second": round(flops / 1e9 / median, 1),
            }
        )
    return rows


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="state_space_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=1, help="of a processor")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64, help="of a sequence")
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 16], help="of a rollout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE", help="another model than the configuration's")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device answers", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    changes = _plain(OmegaConf.from_dotlist(arguments.set))
    parameters = sum(parameter.numel() for parameter in build(torch.device("meta"), changes).parameters())
    print(f"{parameters / 1e6:.1f} million parameters, {arguments.sequences} sequences of {arguments.steps} steps, on {device}")
    rows = measure(works(device, arguments.sequences, arguments.steps, arguments.lanes, changes), arguments.rounds, device)
    for row in rows:
        print(f"{row['what']:24s} {1000 * row['seconds']:10.2f} ms {row['gflop']:10.2f} GFLOP {row['gflop_per_second']:10.1f} GFLOP/s")
    record(arguments.out, "state_space_speed", argv, rows, ("torch",), parameters=parameters, goal_ms=GOAL_MS, threads=arguments.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
