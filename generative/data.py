"""What models are fitted to: frames in memory or on disk (`generative.clips`) behind one face, and what clips are made of."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from generative.api import Clip


class FrameSource(Protocol):
    """Where frames come from: `ClipData` or `FrameMemory`."""

    obs_shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Number of frames."""

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default generator."""


class ClipSource(Protocol):
    """Where clips come from: `ClipData`."""

    def starts(self, steps: int, lead: int = 0) -> int:
        """How many clips of `steps` transitions there are."""

    def clips(self, indices: Tensor, steps: int, lead: int = 0) -> Clip:
        """int64 (n), each within 0 .. starts(steps, lead) - 1 -> a Clip of n rows of `steps` transitions, the first `lead` from before."""


def image_clip(frames: Tensor) -> Clip:
    """uint8 (B, C, H, W) -> a Clip of B traces without transitions."""
    empty = torch.zeros(len(frames), 0, device=frames.device)
    return Clip(frames[:, None], empty.long(), empty, empty, empty.bool())


def frame_weights(clip: Clip) -> Tensor:
    """float32 (B, T + 1): 1 for the frames up to and with the successor of a row's first `last`, 0 for the padding after it."""
    ended_before = clip.last.long().cumsum(1) - clip.last.long()
    first = torch.ones(len(clip.last), 1, device=clip.last.device)
    return torch.cat((first, (ended_before == 0).float()), 1)


class FrameMemory:
    """Frames in memory, up to `capacity`; behind the face of `FrameSource`."""

    def __init__(self, obs_shape: tuple[int, int, int], capacity: int, device: torch.device | str = "cpu") -> None:
        self.obs_shape = (obs_shape[0], obs_shape[1], obs_shape[2])
        self._frames = torch.empty((capacity, *obs_shape), dtype=torch.uint8, device=device)
        self._count = 0

    @classmethod
    def from_tensor(cls, frames: Tensor) -> FrameMemory:
        """Holds uint8 (B, C, H, W) frames without copying them."""
        assert (frames.dtype, frames.ndim) == (torch.uint8, 4), f"frames are uint8 (B, C, H, W), got {frames.dtype} {tuple(frames.shape)}"
        memory = cls((frames.shape[1], frames.shape[2], frames.shape[3]), 0)
        memory._frames, memory._count = frames, len(frames)
        return memory

    def append(self, frames: Tensor) -> None:
        """Copies uint8 (B, C, H, W) in. ValueError beyond the capacity."""
        end = self._count + len(frames)
        if end > len(self._frames):
            raise ValueError(f"{end} frames do not fit into a capacity of {len(self._frames)}")
        self._frames[self._count : end] = frames
        self._count = end

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor) -> Tensor:
        """int64 (n) -> uint8 (n, C, H, W)."""
        return self._frames[: self._count][indices.to(self._frames.device)]

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default CPU generator."""
        return self.batch(torch.randint(self._count, (n,)))
