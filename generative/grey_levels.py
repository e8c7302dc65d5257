"""Grey frames as a few levels, and what densities over them share: borders, losses of a clip, loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from envs.api import UserError
from generative.api import Clip
from generative.data import frame_weights
from generative.likelihoods import bits_per_dim


def grey_shape(obs_shape: tuple[int, int, int], levels: int, name: str) -> tuple[int, int, int]:
    """`obs_shape` as a tuple. UserError where it is not (1, H, W), or `levels` is not in 2..256; `name` is the model's."""
    channels, height, width = obs_shape
    if channels != 1 or height < 1 or width < 1:
        raise UserError(f"{name} models grey frames (1, H, W), got frames of {tuple(obs_shape)}")
    if not 2 <= levels <= 256:
        raise UserError(f"levels must lie in 2..256, got {levels}")
    return 1, height, width


def quantise(frames: Tensor, levels: int, obs_shape: tuple[int, int, int], name: str) -> Tensor:
    """uint8 (B, 1, H, W) of 0..255 -> uint8 (B, H, W), pixel * levels // 256. UserError for frames of another shape or dtype."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != obs_shape:
        raise UserError(f"{name} takes uint8 frames (B, {', '.join(map(str, obs_shape))}), got {frames.dtype} {tuple(frames.shape)}")
    return (frames[:, 0].to(torch.int32) * levels // 256).to(torch.uint8).contiguous()


def to_frames(shown: Tensor, levels: int) -> Tensor:
    """Levels (B, H, W) -> uint8 (B, 1, H, W), such that `quantise` gives the levels back; the lowest is black, the highest white."""
    return ((shown.to(torch.int32) * 255 + levels - 2) // (levels - 1)).to(torch.uint8).unsqueeze(1)


def clip_losses(player: str, nats: Callable[[Tensor], Tensor], clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """`Trainable.losses` of an exact density: yields once (player, negative log-likelihood per pixel, metrics).

    Averaged over the frames of the clip that are not padding. Metrics, detached: `nats`, the log-likelihood a frame, and
    `bits_per_dim`, bits a pixel of the quantised frames.

    Args:
        nats: uint8 (B, C, H, W) -> log-likelihoods (B).
    """
    each = nats(clip.frames.flatten(0, 1))
    weights = frame_weights(clip).flatten().to(each.device)
    mean = (weights * each).sum() / weights.sum()
    dims = math.prod(clip.frames.shape[2:])
    yield player, -mean / dims, {"nats": mean.detach(), "bits_per_dim": bits_per_dim(mean.detach(), dims, density=False)}


def load_whole(model: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Loads a state dict. UserError, before anything is changed, where it holds other tensors, or of other shapes, than the model."""
    mine, given = ({key: tuple(value.shape) for key, value in found.items()} for found in (model.state_dict(), state))
    if mine != given:
        key = next(key for key in (*mine, *given) if mine.get(key) != given.get(key))
        words = f"{key} is {given.get(key, 'missing')} there and {mine.get(key, 'unknown')} here"
        raise UserError(f"the checkpoint's {name} is of another shape ({words}): set its knobs and frames as they were")
    nn.Module.load_state_dict(model, state)
