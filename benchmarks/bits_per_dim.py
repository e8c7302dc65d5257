"""How well densities know Atari frames they have not seen: bits a pixel of 42x42 frames of 8 grey levels, after random play.

    python -m benchmarks.bits_per_dim --out benchmarks/results/densities

Online densities (cts, pixelcnn) take each training frame once, in order; the others are fitted in `--updates` of 16 frames each, by
Adam at a rate each, the best of 1e-3, 3e-3 and 1e-2 in 300 updates on 5,000 frames of Q*bert.
Held-out frames come from games of other seeds; those that stand among the training frames to the last bit are left out. Beside the
table it draws samples: a row a density, the last row true frames.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.loop import play
from agents.random import RandomAgent
from benchmarks.record import record
from envs.atari import AtariEnv
from envs.protocols import PROTOCOLS
from generative.cts import CTS
from generative.data import FrameMemory
from generative.fit import Fitter
from generative.grey_levels import quantise
from generative.likelihoods import bits_per_dim
from generative.nade import NADE
from generative.pixelcnn import PixelCNN
from lab.fitting import write_grid

CPU = torch.device("cpu")
SHAPE, LEVELS, LANES = (1, 42, 42), 8, 8
HELD, SAMPLES, BATCH = 500, 8, 16
FITTED: dict[str, dict[str, Any]] = {
    "nade": {},
    "nade, order-agnostic": {"order_agnostic": True},
    "pixelcnn_large": {"network": "stacked", "blocks": 8, "planes": 32, "head_planes": 128},
}
RATES = {"nade": 1e-2, "nade, order-agnostic": 3e-3, "pixelcnn_large": 3e-3}


def observations(game: str, count: int, seed: int) -> Tensor:
    """uint8 (count, 1, 42, 42) of random play, in order, lane beside lane."""
    torch.manual_seed(seed)
    env = AtariEnv(game, LANES, CPU, PROTOCOLS["nature2015"], "grey42")
    try:
        ticks = play(env, RandomAgent(env.spec, CPU), count * env.spec.frames_per_step, seed)
        return torch.cat([tick.step.obs.clone() for tick in ticks])[:count]
    finally:
        env.close()


def unseen(frames: Tensor, train: Tensor, count: int) -> Tensor:
    """`count` of the frames, evenly spread, of those that are not among `train`."""
    known = {frame.numpy().tobytes() for frame in train}
    fresh = torch.stack([frame for frame in frames if frame.numpy().tobytes() not in known])
    return fresh[torch.linspace(0, len(fresh) - 1, count).long()]


def marginal_bits(train: Tensor, held: Tensor) -> float:
    """Of a histogram of levels at each place, one count of each level beforehand: what a density must beat."""
    shown, other = (quantise(frames, LEVELS, SHAPE, "a histogram").long() for frames in (train, held))
    counts = torch.ones(*SHAPE[1:], LEVELS, dtype=torch.float64)
    counts.scatter_add_(2, shown.permute(1, 2, 0), torch.ones(*SHAPE[1:], len(shown), dtype=torch.float64))
    nats = (counts / counts.sum(2, keepdim=True)).log().gather(2, other.permute(1, 2, 0)).sum((0, 1))
    return float(bits_per_dim(nats.mean(), math.prod(SHAPE), density=False))


def learnt(name: str, train: Tensor, updates: int) -> tuple[Any, int]:
    """A density that has learnt the frames, and in how many updates."""
    torch.manual_seed(0)
    if name in ("cts", "pixelcnn"):
        model: Any = CTS() if name == "cts" else PixelCNN(SHAPE, 1, CPU)
        for part in train.split(LANES):
            model.absorb(part)
        return model, len(train)
    model = (NADE if name.startswith("nade") else PixelCNN)(SHAPE, 1, CPU, levels=LEVELS, **FITTED[name])
    for _ in Fitter(model, FrameMemory.from_tensor(train), BATCH, RATES[name], updates=updates).run():
        pass
    return model, updates


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; with `--out` writes densities.json and a picture of samples a game into that folder."""
    parser = argparse.ArgumentParser(prog="bits_per_dim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("cts", "pixelcnn", *FITTED)
    parser.add_argument("--densities", nargs="+", default=list(names), choices=names)
    parser.add_argument("--games", nargs="+", default=["Freeway", "Qbert"])
    parser.add_argument("--frames", type=int, default=20_000, help="to learn from, of each game")
    parser.add_argument("--updates", type=int, default=1_500, help="of fitting")
    parser.add_argument("--out", type=Path, help="a folder for the results")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(f"{'game':18s} {'density':22s} {'bits a pixel':>12s} {'updates':>8s} {'seconds':>8s}")
    for game in arguments.games:
        train = observations(game, arguments.frames, 0)
        held = unseen(observations(game, 10 * HELD, 1), train, HELD)
        rows.append({"game": game, "density": "histogram a pixel", "bits_per_dim": round(marginal_bits(train, held), 4)})
        print(f"{game:18s} {'histogram a pixel':22s} {rows[-1]['bits_per_dim']:12.4f}", flush=True)
        pictures = []
        for name in arguments.densities:
            began = time.perf_counter()
            model, updates = learnt(name, train, arguments.updates)
            seconds = time.perf_counter() - began
            bits = float(bits_per_dim(model.log_prob(held).mean(), math.prod(SHAPE), density=False))
            pictures.append(model.sample(SAMPLES))
            rows.append({"game": game, "density": name, "bits_per_dim": round(bits, 4), "updates": updates, "seconds": round(seconds, 1)})
            print(f"{game:18s} {name:22s} {bits:12.4f} {updates:8d} {seconds:8.1f}", flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_grid(arguments.out / f"samples-{game}.png", [*pictures, held[:: HELD // SAMPLES][:SAMPLES]])
    path = arguments.out / "densities.json" if arguments.out else None
    record(path, "bits_per_dim", argv, rows, frames=arguments.frames, held_out=HELD, batch=BATCH, learning_rates=RATES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
