"""Pictures and films of rollouts: the truth, what the simulator says, and where the two differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs.stats import write_mp4
from generative.rollouts import Rollout

ROWS = 4  # clips in a picture
FILMED = 6  # in a film
SIDE, GAP = 160, 4  # of a frame in pixels, about; between frames
FPS = 8


def write_rollouts(folder: Path, seen: Rollout) -> tuple[Path, Path]:
    """images/rollouts.png and videos/rollouts.mp4 of a run folder. Clips that end early come last."""
    order = torch.argsort(seen.weights.sum(1), descending=True, stable=True).tolist()
    picture, film = folder / "images" / "rollouts.png", folder / "videos" / "rollouts.mp4"
    for path in (picture, film):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write_picture(picture, seen, order[:ROWS])
    write_film(film, seen, order[:FILMED])
    return picture, film


def write_film(path: Path, seen: Rollout, rows: list[int]) -> None:
    """An mp4 with a column a clip: the truth, the rollout, and their difference, step by step."""
    pictures = []
    for t in range(seen.frames.shape[1]):
        columns = []
        for row in rows:
            truth, said = _rgb(seen.truth[row, t]), _rgb(seen.frames[row, t])
            off = np.abs(truth.astype(np.int16) - said.astype(np.int16)).astype(np.uint8)
            columns.append(_stack([truth, said, off], 0))
        pictures.append(_stack(columns, 1))
    side = max(seen.frames.shape[-2:])
    write_mp4(path, pictures, fps=FPS, scale=max(1, SIDE // side))


def _write_picture(path: Path, seen: Rollout, rows: list[int]) -> None:
    """A PNG with two lines a clip, the truth above what the simulator says, from left to right the steps ahead."""
    from matplotlib.figure import Figure

    steps = _shown_steps(seen.frames.shape[1])
    height, width = seen.frames.shape[-2:]
    figure = Figure(figsize=(1.3 * len(steps) + 0.6, 1.3 * 2 * len(rows) * height / width + 0.4), layout="compressed", dpi=100)
    axes = figure.subplots(2 * len(rows), len(steps), squeeze=False)
    for line, row in enumerate(row for row in rows for _ in range(2)):
        for column, t in enumerate(steps):
            ax, frames = axes[line][column], seen.frames if line % 2 else seen.truth
            ax.imshow(_rgb(frames[row, t]), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if line == 0:
                ax.set_title(f"{t + 1} step{'s' if t else ''}", fontsize=8)
        axes[line][0].set_ylabel("said" if line % 2 else "truth", fontsize=8)
    figure.savefig(path)


def _shown_steps(horizon: int) -> list[int]:
    """Indices of the steps in a picture: eight at most, close together at first."""
    wanted = [1, 2, 3, 5, 10, 20, 30, 50, 100]
    return [step - 1 for step in wanted if step <= horizon][:8]


def _rgb(frame: Tensor) -> np.ndarray:
    """uint8 (C, H, W) -> (H, W, 3)."""
    picture = frame.cpu().permute(1, 2, 0).numpy()
    return picture.repeat(3, axis=2) if picture.shape[2] == 1 else picture[..., :3]


def _stack(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Side by side (axis 1) or one below the other (axis 0), white between."""
    parts = []
    for picture in pictures:
        gap = list(picture.shape)
        gap[axis] = GAP
        parts += [picture, np.full(gap, 255, np.uint8)]
    return np.concatenate(parts[:-1], axis)
