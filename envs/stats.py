"""What an episode scored, and a film of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.api import Step


class Finished(NamedTuple):
    """A finished episode.

    Attributes:
        lane: which environment played it.
        episode_return: the plain sum of its raw rewards.
        length_frames: its environment frames, steps times frames_per_step (a step that the game's end cut short counts whole).
    """

    lane: int
    episode_return: float
    length_frames: int


class EpisodeStats:
    """Adds up returns and lengths of `num_envs` lanes on `device`, without ever waiting for it but in `drain`."""

    def __init__(self, num_envs: int, frames_per_step: int, device: torch.device | str) -> None:
        device = torch.device(device)
        wide = torch.float32 if device.type == "mps" else torch.float64  # float32 would lose points of scores beyond 16 million
        self._returns = torch.zeros(num_envs, dtype=wide, device=device)
        self._frames = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._frames_per_step = frames_per_step
        self._ended: list[tuple[Tensor, Tensor, Tensor]] = []  # last, returns, frames of each tick on which a lane ended

    def update(self, after: Step) -> None:
        """Counts one step of every lane: the result of `recv`, in order, the one of `reset` left out."""
        self._returns = self._returns + after.reward
        self._frames = self._frames + self._frames_per_step
        if after.next_obs is after.obs:  # no lane ended
            return
        self._ended.append((after.last, self._returns, self._frames))
        self._returns = self._returns.masked_fill(after.last, 0)
        self._frames = self._frames.masked_fill(after.last, 0)

    def drain(self) -> list[Finished]:
        """The episodes that finished since the last call, by their ends, then by lanes. Waits for the device only if there are any."""
        if not self._ended:
            return []
        last, returns, frames = (torch.stack(column).cpu() for column in zip(*self._ended))  # ticks, N
        self._ended = []
        return [Finished(int(lane), float(returns[tick, lane]), int(frames[tick, lane])) for tick, lane in last.nonzero().tolist()]


def write_mp4(path: str | os.PathLike[str], frames: np.ndarray | Iterable[np.ndarray], fps: float, scale: int = 1) -> None:
    """Writes a film that browsers play: H.264, yuv420p, index at the front.

    Args:
        path: the file, ending in .mp4; its folder is made. Written beside and renamed, so it is there whole or not at all.
        frames: uint8 (T, H, W, C), or pictures (H, W, C) one after another, at least one; C is 1 (grey) or 3 (red, green, blue).
        fps: pictures a second.
        scale: a whole number, each pixel becomes scale by scale pixels. An odd size gets one black row or column more.

    ValueError where there is no picture or one has another shape than the first.
    """
    import imageio_ffmpeg  # late: finding its binary takes time, and most of the time nobody films

    pictures: Iterator[np.ndarray] = iter(frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError("a film needs at least one picture")
    shape = first.shape
    if first.dtype != np.uint8 or first.ndim != 3 or shape[2] not in (1, 3):
        raise ValueError(f"pictures must be uint8 (H, W, 1) or (H, W, 3), got {first.dtype} {shape}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer = imageio_ffmpeg.write_frames(
        str(partial),
        (shape[1], shape[0]),
        fps=fps,
        pix_fmt_in="gray" if shape[2] == 1 else "rgb24",
        pix_fmt_out="yuv420p",
        codec="libx264",
        macro_block_size=1,  # sizes are made even below
        quality=None,
        output_params=[
            "-crf",
            "18",
            "-vf",
            f"scale=iw*{scale}:ih*{scale}:flags=neighbor,pad=ceil(iw/2)*2:ceil(ih/2)*2",
            "-movflags",
            "+faststart",
        ],
        ffmpeg_log_level="error",
    )
    try:
        writer.send(None)
        for picture in chain([first], pictures):
            if picture.shape != shape or picture.dtype != np.uint8:
                raise ValueError(f"the film's pictures are uint8 {shape}, but one is {picture.dtype} {picture.shape}")
            writer.send(np.ascontiguousarray(picture).data)
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
