"""Fitting a generative model: what training, before an agent plays that needs one, and job=fit share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from agents.loop import play
from agents.random import RandomAgent
from envs.api import UserError, VectorEnv
from generative.api import Sampler, Trainable
from generative.clips import ClipData
from generative.data import FrameSource
from generative.fit import Fitter
from generative.likelihoods import bits_per_dim
from generative.recording import ClipWriter
from lab import checkpoint
from lab.film import as_rgb
from lab.folder import find_folder, read_config
from lab.progress import Progress

ROWS = 100
HELDOUT_ROWS = 10  # of these hundred
HELDOUT_FRAMES = 500  # scored at most
PICTURES = 8


def collect_random(env: VectorEnv, device: torch.device, frames: int, seed: int, folder: Path) -> Iterator[int]:
    """Plays at random for `frames` environment frames, writes them as clips to `folder`, and yields the frames played."""
    with ClipWriter(folder, env.spec, env.num_envs, {"env": env.spec.name, "agent": "random", "seed": seed}, overwrite=True) as writer:
        for tick in play(env, RandomAgent(env.spec, device), frames, seed):
            writer.append(tick.step, tick.decision.action, tick.after)
            yield tick.played
        writer.end_part()


def fit_rows(
    model: Any, frames: FrameSource, knobs: Mapping[str, Any], progress: Progress, held: ClipData | None = None
) -> Iterator[dict[str, Any]]:
    """Fits the model for `knobs["updates"]` updates and yields a row of metrics (`fit/...`) about a hundred times.

    Every tenth row and the last tell how a Density does on frames `held` out.
    """
    fitter = Fitter(model, frames, **{key: value for key, value in knobs.items() if key not in ("frames", "path", "heldout")})
    every = max(1, knobs["updates"] // ROWS)
    began, last = time.perf_counter(), 0
    for tick in fitter.run():
        progress.update(tick.update)
        if tick.update % every == 0 or tick.update == knobs["updates"]:
            row = {f"fit/{name}": float(value) for name, value in tick.metrics.items()}
            now = time.perf_counter()
            row |= {"fit/update": tick.update, "fit/updates_per_second": (tick.update - last) / max(now - began, 1e-9)}
            if held is not None and (tick.update == knobs["updates"] or tick.update // every % (ROWS // HELDOUT_ROWS) == 0):
                row["fit/heldout_bits_per_dim"] = heldout_bits(model, held)
            began, last = time.perf_counter(), tick.update
            yield row


def heldout_bits(model: Any, held: ClipData) -> float:
    """Bits a pixel of frames that a Density was not fitted to: of the exact likelihood, or of the bound where it has only that."""
    nats = model.log_prob(held.spread(HELDOUT_FRAMES).to(next(model.parameters()).device)).mean()
    return float(
        model.bits_per_dim(nats) if hasattr(model, "bits_per_dim") else bits_per_dim(nats, math.prod(held.obs_shape), density=False)
    )


def load_fitted(model: Any, path: str) -> None:
    """Puts the model of another run (a job=fit run, or the encoder of a trained agent) into `model`. UserError where it does not fit."""
    folder = find_folder(path, "fit.path")
    part = "model" if read_config(folder)["job"] == "fit" else "agent/encoder"
    take_up(model, checkpoint.load(folder, only=part).state, path)


def take_up(model: Any, state: Mapping[str, Any], path: str) -> None:
    """Puts the state that was found in the run `path` into `model`. UserError where it does not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as trouble:
        raise UserError(f"fit.path={path}: its model is of another kind or shape: {' '.join(str(trouble).split())[:300]}") from trouble


def needs_fit(model: Any) -> bool:
    """Whether the model is one that is fitted by gradients."""
    return isinstance(model, Trainable)


def write_pictures(model: Any, frames: FrameSource, folder: Path) -> list[Path]:
    """images/reconstructions.png (frames above, reconstructions below) and images/samples.png, as far as the model can."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    written = []
    if hasattr(model, "reconstruct"):
        shown = frames.sample(PICTURES).to(next(model.parameters()).device)
        write_grid(images / "reconstructions.png", [shown, model.reconstruct(shown)])
        written.append(images / "reconstructions.png")
    if isinstance(model, Sampler):
        drawn = model.sample(2 * PICTURES)
        write_grid(images / "samples.png", [drawn[:PICTURES], drawn[PICTURES:]])
        written.append(images / "samples.png")
    return written


def write_grid(path: Path, rows: list[torch.Tensor]) -> None:
    """A PNG of rows of frames uint8 (n, C, H, W), one pixel of white between."""
    from matplotlib.image import imsave

    pictures = [torch.cat([torch.nn.functional.pad(frame, (1, 1, 1, 1), value=255) for frame in row], dim=2) for row in rows]
    imsave(path, as_rgb(torch.cat(pictures, dim=1)))
