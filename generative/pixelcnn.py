"""PixelCNN over small grey frames: the density of Ostrovski et al. 2017, learnt online, and a deep one that is fitted offline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.api import UserError
from generative.api import Clip, Recoding
from generative.fit import NonFiniteLoss
from generative.grey_levels import clip_losses, grey_shape, load_whole, quantise, to_frames
from generative.masked import SlimNet, StackedNet
from generative.online import OnlineRMSProp

FRAMES_AT_ONCE = 16  # scored together


class PixelCNN(nn.Module):
    """p(x) = prod_i p(x_i | pixels before i in raster order), each a softmax over grey levels (van den Oord et al. 2016).

    Density, Trainable and Sampler; exact, with nothing that behaves differently in training. `absorb` takes one gradient step every
    `frames_per_update` frames, a last one for what is left of a call; it is `generative.online.OnlineRMSProp`, and for the slim network on
    a CPU the same rule in a compiled kernel, which agrees with it but for the last bits.

    Args:
        obs_shape: (1, H, W) of the frames, any size.
        num_actions: unused, every model takes it.
        device: where the parameters lie.
        network: `slim`, that of Ostrovski et al. 2017 for counts (`generative.masked.SlimNet`), or `stacked`, the gated two-stack one
            of van den Oord et al. 2016, for offline fitting (`generative.masked.StackedNet`).
        levels: grey levels, 2 to 256; a pixel of 0..255 has level pixel * levels // 256.
        first_kernel: side of the first masked convolution.
        kernel: side of the others; of `stacked` only, `slim` has 1x1 convolutions.
        blocks: residual blocks of `slim`, layers of `stacked`.
        planes: feature planes.
        head_planes: planes of the last hidden layer.
        learning_rate: of the online steps, as are decay, momentum and epsilon (`generative.online`).
        frames_per_update: frames that share an online step; 1 is the paper. More cost less: 16 about a fifth a frame.
    """

    exact = True

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        num_actions: int,
        device: torch.device | str,
        network: Literal["slim", "stacked"] = "slim",
        levels: int = 8,
        first_kernel: int = 7,
        kernel: int = 3,
        blocks: int = 2,
        planes: int = 16,
        head_planes: int = 64,
        learning_rate: float = 1e-3,
        decay: float = 0.95,
        momentum: float = 0.9,
        epsilon: float = 1e-4,
        frames_per_update: int = 1,
    ) -> None:
        super().__init__()
        if network not in ("slim", "stacked"):
            raise UserError(f"network is one of slim, stacked, got {network}")
        self.obs_shape, self.levels = grey_shape(obs_shape, levels, "a PixelCNN"), levels
        self.net: SlimNet | StackedNet
        if network == "slim":
            self.net = SlimNet(levels, first_kernel, blocks, planes, head_planes)
        else:
            self.net = StackedNet(levels, first_kernel, kernel, blocks, planes, head_planes)
        self.to(device)
        dims = math.prod(self.obs_shape)
        self.online = OnlineRMSProp(
            self.net.parameters(), "pixelcnn", dims, learning_rate, decay, momentum, epsilon, frames_per_update=frames_per_update
        )

    @property
    def device(self) -> torch.device:
        return self.online.square.device

    @property
    def updates_per_frame(self) -> float:
        """Gradient steps a frame in `absorb`."""
        return 1.0 / self.online.frames_per_update

    @property
    def nbytes(self) -> int:
        """Bytes that parameters and the online optimiser's memory take, its copies for the case of a bad step included."""
        return 7 * self.online.square.nbytes

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        """One player, `pixelcnn`, with every parameter."""
        return {"pixelcnn": self.net.parameters()}

    def losses(self, clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yields once; see `generative.grey_levels.clip_losses`."""
        return clip_losses("pixelcnn", lambda frames: self.nats(self.quantise(frames)), clip)

    def nats(self, shown: Tensor) -> Tensor:
        """Levels uint8 (B, H, W) -> log-probabilities (B), summed in float64, differentiable."""
        scores = functional.log_softmax(self.net(shown).float(), -1)
        return scores.gather(-1, shown.long().unsqueeze(-1)).flatten(1).sum(1, dtype=torch.float64)

    def log_prob(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> float64 (B), nats; learns nothing."""
        shown = self.quantise(frames)
        nats = torch.empty(len(shown), dtype=torch.float64, device=self.device)
        for part, out in zip(shown.split(FRAMES_AT_ONCE), nats.split(FRAMES_AT_ONCE)):
            if self._compiled:
                from generative.pixelcnn_kernel import score

                score(part.numpy(), *self._kernel_arguments(), out.numpy())
            else:
                with torch.no_grad():
                    out.copy_(self.nats(part))
        return nats

    def absorb(self, frames: Tensor) -> Recoding:
        """Learns uint8 (B, 1, H, W) frames in turn. float64 (B) nats of each before and after the step that it is part of.

        Raises:
            NonFiniteLoss: the model stands before the first step of which loss or gradient were not finite.
        """
        shown = self.quantise(frames)
        if not self._compiled:
            return self.online.absorb(shown, self.nats)
        from generative.pixelcnn_kernel import absorb

        online, before, after = self.online, torch.empty(len(shown), dtype=torch.float64), torch.empty(len(shown), dtype=torch.float64)
        memory = online.square.numpy(), online.velocity.numpy()
        weights, *network = self._kernel_arguments()
        absorbed = absorb(
            shown.numpy(), weights, *memory, *network, online.frames_per_update, *online.numbers, before.numpy(), after.numpy()
        )
        online.updates += -(-absorbed // online.frames_per_update)
        if absorbed < len(shown):
            raise NonFiniteLoss("pixelcnn", int(online.updates) + 1)
        return Recoding(before, after)

    def sample(self, n: int) -> Tensor:
        """uint8 (n, 1, H, W), drawn pixel by pixel with torch's default generator."""
        return to_frames(self.net.walk(n, *self.obs_shape[1:]), self.levels)

    def quantise(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) of 0..255 -> levels uint8 (B, H, W) on the model's device. UserError for frames of another shape."""
        return quantise(frames.to(self.device), self.levels, self.obs_shape, "a PixelCNN")

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """The inverse of `state_dict`, which holds the online optimiser's memory too. UserError where shapes differ."""
        load_whole(self, state, "PixelCNN")

    @property
    def _compiled(self) -> bool:
        return isinstance(self.net, SlimNet) and self.device.type == "cpu" and self.net.weights.dtype == torch.float32

    def _kernel_arguments(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Of the slim network: its parameters, the places of its layers in them, its reach."""
        assert isinstance(self.net, SlimNet)
        return self.net.weights.detach().numpy(), np.array(self.net.layers, np.int64), self.net.reach
