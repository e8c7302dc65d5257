"""Speed of the VAEs: updates a second in each precision and memory format, and frames a second encoded, beside the random projection.

    python -m benchmarks.vae_speed --threads 2

Modes take turns within every round, so that a busy machine slows all of them alike; the median of the rounds is one JSON line a mode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import generative.nets
import generative.vae
from generative.api import Encoder
from generative.data import FrameMemory, image_clip
from generative.fit import Fitter
from generative.projection import RandomProjection
from generative.vae import VAE

OBS_SHAPE = (1, 84, 84)
MODELS: dict[str, dict[str, Any]] = {"small": {}, "mfec": {"architecture": "mfec", "likelihood": "gaussian"}}


def contiguous(frames: torch.Tensor) -> torch.Tensor:
    return frames.to(torch.float32) / 255.0


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def update_modes(device: torch.device, batch_size: int) -> dict[str, Callable[[], object]]:
    """Name -> one update, for every model, precision and memory format of the pictures; weights stay contiguous."""
    frames = FrameMemory.from_tensor(torch.randint(0, 256, (1024, *OBS_SHAPE)).to(torch.uint8))
    modes: dict[str, Callable[[], object]] = {}
    for name, knobs in MODELS.items():
        for precision in ("float32", "bfloat16"):
            for layout, normalise in (("channels_last", generative.nets.normalise), ("contiguous", contiguous)):
                model = VAE(OBS_SHAPE, 6, device, **knobs)
                fitter = Fitter(model, frames, batch_size=batch_size, precision=precision)

                def update(fitter: Fitter = fitter, normalise: Callable[[torch.Tensor], torch.Tensor] = normalise) -> object:
                    generative.vae.normalise = normalise  # type: ignore[assignment]
                    return fitter.step(image_clip(fitter.frames.sample(fitter.batch_size)))

                modes[f"{name} {precision} {layout}"] = update
    return modes


def encode_modes(device: torch.device, batch_size: int) -> dict[str, Callable[[], object]]:
    """Name -> one call of `encode` on `batch_size` frames."""
    frames = torch.randint(0, 256, (batch_size, *OBS_SHAPE)).to(torch.uint8)
    encoders: dict[str, Encoder] = {"random_projection": RandomProjection(OBS_SHAPE, 6, device)}
    encoders |= {name: VAE(OBS_SHAPE, 6, device, **knobs) for name, knobs in MODELS.items()}
    return {name: partial(encoder.encode, frames) for name, encoder in encoders.items()}


def median_seconds(modes: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Name -> median seconds a call; every mode once a round, after a warm-up."""
    for work in modes.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name, work in modes.items():
            work()
            taken[name].append(timed(work, device))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--encode-frames", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    normalise = generative.vae.normalise
    for name, seconds in median_seconds(update_modes(device, options.batch_size), options.rounds, device).items():
        print(
            json.dumps({"update": name, "batch": options.batch_size, "ms": round(1e3 * seconds, 2), "updates_per_s": round(1 / seconds, 1)})
        )
    generative.vae.normalise = normalise
    for name, seconds in median_seconds(encode_modes(device, options.encode_frames), 10 * options.rounds, device).items():
        count = options.encode_frames
        print(json.dumps({"encode": name, "batch": count, "ms": round(1e3 * seconds, 3), "frames_per_s": round(count / seconds)}))


if __name__ == "__main__":
    main()
