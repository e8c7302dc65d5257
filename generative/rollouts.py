"""What a simulator says will come, beside what came: open-loop rollouts, and how far their pictures are from the true ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from envs.api import UserError
from generative.api import Clip, Simulator
from generative.data import frame_weights

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_CONSTANTS = (0.01**2, 0.03**2)  # K1 and K2 squared, for pixels in [0, 1]


class Rollout(NamedTuple):
    """H steps that a simulator took open-loop, and the true ones. Of step h, counted from 0, the true picture lies h + 1 steps ahead.

    Attributes:
        frames, truth: uint8 (B, H, C, H, W), predicted and true.
        before: uint8 (B, H, C, H, W), the true picture before each true one.
        rewards, discounts: float32 (B, H), predicted.
        clip: the transitions that were foretold, (B, H).
        weights: float32 (B, H), 1 up to and with a row's first `last`, then 0.
    """

    frames: Tensor
    truth: Tensor
    before: Tensor
    rewards: Tensor
    discounts: Tensor
    clip: Clip
    weights: Tensor


@torch.no_grad()
def rollout(simulator: Simulator, clip: Clip, horizon: int, known: int | None = None) -> Rollout:
    """Shows the first `known` frames of each row to the simulator, and has it take the clip's next `horizon` actions.

    The clip's tensors may lie on any device, results lie on the simulator's. Rows that end within the known frames weigh nothing.
    UserError where the clip has less than known - 1 + horizon transitions.

    Args:
        known: None for `context_frames`, as many as the simulator looks at; more, to have several of them foretell the same frames.
    """
    context = simulator.context_frames if known is None else known
    needed, given = context - 1 + horizon, clip.actions.shape[1]
    if given < needed:
        raise UserError(f"{horizon} steps after {context} frames need clips of {needed} transitions, these have {given}")
    shown = Clip(clip.frames[:, :context], *(part[:, : context - 1] for part in clip[1:]))
    ahead = Clip(clip.frames[:, context - 1 : needed + 1], *(part[:, context - 1 : needed] for part in clip[1:]))
    state = simulator.start(shown)
    steps = []
    for t in range(horizon):
        state, *seen = simulator.step(state, ahead.actions[:, t])
        steps.append(seen)
    frames, rewards, discounts = (torch.stack(parts, 1) for parts in zip(*steps))
    device = frames.device
    ahead = Clip(*(part.to(device) for part in ahead))
    weights = frame_weights(clip)[:, context : needed + 1].to(device)
    return Rollout(frames, ahead.frames[:, 1:], ahead.frames[:, :-1], rewards, discounts, ahead, weights)


def squared_error(frames: Tensor, truth: Tensor) -> Tensor:
    """uint8 (..., C, H, W) twice -> float32 (...): mean squared difference of pixels on the scale of [0, 1]."""
    return _difference(frames, truth).square().mean((-3, -2, -1))


def psnr(error: Tensor) -> Tensor:
    """Mean squared errors on the scale of [0, 1] -> peak signal-to-noise ratio in decibels; 100 where there is no error to speak of."""
    return -10 * error.clamp(min=1e-10).log10()


def moving_error(frames: Tensor, truth: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of squared differences, number) of those pixels alone where the true picture differs from the one before: small objects.

    uint8 (..., C, H, W) three times -> float32 (...) and int64 (...); a pixel moves where any of its channels does.
    """
    moves = (truth != before).any(-3, keepdim=True)
    return (_difference(frames, truth).square() * moves).mean(-3).sum((-2, -1)), moves.sum((-3, -2, -1))


def ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity, uint8 (..., C, H, W) twice -> float32 (...): 1 where they are equal (Wang et al. 2004, equations 13 to 17).

    Gaussian window of 11 pixels and std 1.5 wherever it fits, averaged over places, as in the paper, and over channels; smaller pictures
    get the largest odd window that fits.
    """
    *lead, channels, height, width = frames.shape
    x, y = (images.reshape(-1, 1, height, width).float() / 255 for images in (frames, truth))
    size = min(SSIM_WINDOW, min(height, width) - (1 - min(height, width) % 2))
    line = torch.exp(-0.5 * ((torch.arange(size, device=x.device) - size // 2) / SSIM_SIGMA) ** 2)
    line = line / line.sum()

    def smooth(images: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(images, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance, (c1, c2) = smooth(x * y) - mean_x * mean_y, SSIM_CONSTANTS
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similar.mean((-3, -2, -1)).view(*lead, channels).mean(-1)


def _difference(frames: Tensor, truth: Tensor) -> Tensor:
    assert frames.dtype == truth.dtype == torch.uint8, f"pixels are uint8, got {frames.dtype} and {truth.dtype}"
    return (frames.float() - truth.float()) / 255
