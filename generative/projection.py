"""Random projection: frames to a few Gaussian features, nothing to learn (Blundell et al. 2016, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from envs.api import UserError

ROWS_CPU, ROWS_DEVICE = 16, 128


class RandomProjection(nn.Module):
    """An Encoder by x A, where x are the D = C * H * W pixels in [0, 1] and A is (D, features) with entries drawn from N(0, 1).

    Distances between frames are kept up to a small distortion (Johnson and Lindenstrauss). The paper does not say how pixels are scaled;
    the nearest neighbours that episodic control asks for are the same at any scale. The matrix is a function of torch's seed at the time of
    building and lies in the state dict.

    Products are taken in blocks of a fixed number of rows, so that one frame's features have the same bits in every batch size on the
    same machine and number of threads.
    """

    matrix: Tensor

    def __init__(self, obs_shape: tuple[int, int, int], num_actions: int, device: torch.device | str, features: int = 64) -> None:
        super().__init__()
        if features < 1:
            raise UserError(f"features must be at least 1, got {features}")
        self.obs_shape = obs_shape
        self.features = features
        self.register_buffer("matrix", torch.randn(math.prod(obs_shape), features).to(device))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, features), no gradient."""
        assert frames.dtype == torch.uint8, f"frames are uint8, got {frames.dtype}"
        assert tuple(frames.shape[1:]) == self.obs_shape, f"frames are (B, {self.obs_shape}), got {tuple(frames.shape)}"
        device = self.matrix.device
        rows = frames.to(device).flatten(1)
        block = ROWS_CPU if device.type == "cpu" else ROWS_DEVICE
        features = torch.empty(len(rows), self.features, device=device)
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, len(rows), block):
                part = rows[begin : begin + block]
                pixels = part.to(torch.float32)
                if len(part) < block:
                    pixels = torch.cat((pixels, pixels.new_zeros(block - len(part), rows.shape[1])))
                features[begin : begin + block] = (pixels @ self.matrix)[: len(part)]
        return features.div_(255.0)
