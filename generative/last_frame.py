"""The baseline of simulators: nothing ever moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generative.api import Clip


class LastFrame(nn.Module):
    """A Simulator that copies the last frame, gives no reward and never ends (a baseline of Oh et al. 2015, section 4.1).

    It has no parameters. State: (frame uint8 (B, C, H, W),).

    Args:
        obs_shape: (C, H, W) of the frames.
        num_actions: unused, every model takes it.
        device: unused, every model takes it; a state lies where its clip does.
    """

    context_frames = 1

    def __init__(self, obs_shape: Sequence[int], num_actions: int, device: torch.device | str) -> None:
        super().__init__()
        self.obs_shape = (obs_shape[0], obs_shape[1], obs_shape[2])

    def start(self, clip: Clip) -> tuple[Tensor, ...]:
        """State after the clip's last frame."""
        assert clip.frames.dtype == torch.uint8, f"frames are uint8, got {clip.frames.dtype}"
        assert tuple(clip.frames.shape[2:]) == self.obs_shape, f"frames are (B, T + 1, {self.obs_shape}), got {tuple(clip.frames.shape)}"
        return (clip.frames[:, -1].clone(),)

    def step(self, state: tuple[Tensor, ...], action: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """int64 (B) -> (state, frame uint8 (B, C, H, W), reward 0 and discount 1, float32 (B))."""
        (frame,) = state
        assert action.shape == (len(frame),), f"actions are ({len(frame)},), got {tuple(action.shape)}"
        reward = torch.zeros(len(frame), device=frame.device)
        return state, frame.clone(), reward, torch.ones_like(reward)
