"""NADE over small grey frames, an exact autoregressive density with shared weights, and its order-agnostic form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.api import UserError
from generative.api import Clip, Recoding
from generative.grey_levels import clip_losses, grey_shape, load_whole, quantise, to_frames
from generative.online import OnlineRMSProp

NUMBERS_AT_ONCE = 1 << 24  # hidden activations held while scoring


class NADE(nn.Module):
    """p(x) = prod_d p(x_d | x_<d), all by one network that shares its first layer (Larochelle and Murray 2011; Uria et al. 2014).

    With pixels in an order o, levels one-hot and D pixels of L levels,

        a_d = c + sum_{k < d} W[o_k, x_{o_k}],    h_d = f(a_d),    p(x_{o_d} | before) = softmax(V[o_d] h_d + b[o_d])

    so one cumulative sum of rows of W, O(D H), gives all D hidden layers, and further layers, as in deep NADE, map h_d on. Binary frames
    are levels=2. Density, Trainable and Sampler, exact in both forms:

    - fixed order (the default): raster order, f the sigmoid, as in 2011.
    - `order_agnostic`: one network for all orders, f the rectifier. It is fitted (`losses`) as in Uria, Murray and Larochelle 2014: a
      random number of random pixels is shown, and all others are predicted at once. Pixels that the mask hides have an all-zero
      one-hot vector, so that mask and pixels are one input. log p(x) is that of the mixture, in equal parts, of `orderings` fixed orders,
      raster order first and then random ones: log (1/R) sum_r p(x | order r). So it is the exact log-probability of one distribution,
      the one that `sample` draws from. Online steps follow it too.

    Args:
        obs_shape: (1, H, W) of the frames, any size.
        num_actions: unused, every model takes it.
        device: where the parameters lie.
        levels: grey levels, 2 to 256; a pixel of 0..255 has level pixel * levels // 256.
        hidden: units of each hidden layer.
        layers: hidden layers.
        order_agnostic: see above.
        orderings: R above; 1 unless order-agnostic. They are drawn when the model is built and lie in its state dict.
        learning_rate, decay, momentum, epsilon, frames_per_update: of online steps, see `generative.online`. No paper learns a NADE
            online; epsilon is smaller than PixelCNN's because weights are not shared between pixels, and so gradients are small.
    """

    exact = True
    orders: Tensor

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        num_actions: int,
        device: torch.device | str,
        levels: int = 8,
        hidden: int = 64,
        layers: int = 1,
        order_agnostic: bool = False,
        orderings: int = 1,
        learning_rate: float = 1e-3,
        decay: float = 0.95,
        momentum: float = 0.9,
        epsilon: float = 1e-6,
        frames_per_update: int = 1,
    ) -> None:
        super().__init__()
        if hidden < 1 or layers < 1:
            raise UserError(f"hidden and layers must be at least 1, got {hidden} and {layers}")
        if orderings < 1 or (orderings > 1 and not order_agnostic):
            raise UserError(f"orderings must be 1, or at least 1 with order_agnostic=true, got {orderings}")
        self.obs_shape, self.levels, self.hidden = grey_shape(obs_shape, levels, "a NADE"), levels, hidden
        self.order_agnostic, self.dims = order_agnostic, math.prod(self.obs_shape)
        self.into = nn.Parameter(torch.randn(self.dims * levels, hidden) / math.sqrt(self.dims))
        self.first_bias = nn.Parameter(torch.zeros(hidden))
        self.between = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
        self.out = nn.Parameter(torch.randn(self.dims, levels, hidden) / math.sqrt(hidden))
        self.bias = nn.Parameter(torch.zeros(self.dims, levels))
        orders = [torch.arange(self.dims)] + [torch.randperm(self.dims) for _ in range(orderings - 1)]
        self.register_buffer("orders", torch.stack(orders))
        self.to(device)
        self.online = OnlineRMSProp(
            self.parameters(), "nade", self.dims, learning_rate, decay, momentum, epsilon, frames_per_update=frames_per_update
        )

    @property
    def device(self) -> torch.device:
        return self.bias.device

    @property
    def updates_per_frame(self) -> float:
        """Gradient steps a frame in `absorb`."""
        return 1.0 / self.online.frames_per_update

    @property
    def nbytes(self) -> int:
        """Bytes that parameters and the online optimiser's memory take, its copies for the case of a bad step included."""
        return 7 * self.online.square.nbytes + self.orders.nbytes

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        """One player, `nade`, with every parameter."""
        return {"nade": self.parameters()}

    def losses(self, clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yields once; see `generative.grey_levels.clip_losses`. Order-agnostic, its figures are estimates from one mask a frame."""
        nats = self.estimate if self.order_agnostic else self.nats
        return clip_losses("nade", lambda frames: nats(self.quantise(frames)), clip)

    def nats(self, shown: Tensor) -> Tensor:
        """Levels uint8 (B, H, W) -> log-probabilities (B), summed in float64, differentiable."""
        pixels = shown.flatten(1).long()
        each = torch.stack([self._nats_in_order(pixels, order) for order in self.orders])
        return torch.logsumexp(each, 0) - math.log(len(each))

    def estimate(self, shown: Tensor) -> Tensor:
        """Levels uint8 (B, H, W) -> unbiased estimates (B) of the log-probability in a random order, from one random mask each.

        The number of pixels shown is uniform in 0..D-1; the mean log-probability of the others stands for all D.
        """
        pixels = shown.flatten(1).long()
        ranks = torch.rand(pixels.shape, device=self.device).argsort(1)
        hides = ranks >= torch.randint(self.dims, (len(pixels), 1), device=self.device)
        first = functional.embedding_bag(self._entries(pixels), self.into, mode="sum", per_sample_weights=(~hides).to(self.into.dtype))
        hidden = self._deepen(first + self.first_bias)
        logits = (hidden @ self.out.flatten(0, 1).t()).view(len(pixels), self.dims, self.levels) + self.bias
        return (self._picked(logits, pixels) * hides).sum(1) * (self.dims / hides.sum(1))

    @torch.no_grad()
    def log_prob(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> float64 (B), nats; learns nothing."""
        shown = self.quantise(frames)
        parts = shown.split(max(1, NUMBERS_AT_ONCE // (self.dims * self.hidden)))
        return torch.cat([self.nats(part).double() for part in parts])

    def absorb(self, frames: Tensor) -> Recoding:
        """Learns uint8 (B, 1, H, W) frames in turn. float64 (B) nats of each before and after the step that it is part of.

        Raises:
            NonFiniteLoss: the model stands before the first step of which loss or gradient were not finite.
        """
        return self.online.absorb(self.quantise(frames), self.nats)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """uint8 (n, 1, H, W), drawn pixel by pixel with torch's default generator; an order for each frame, where there are several."""
        orders = self.orders[torch.randint(len(self.orders), (n,), device=self.device)]
        pixels = torch.zeros(n, self.dims, dtype=torch.int64, device=self.device)
        first = self.first_bias.repeat(n, 1)
        for place in orders.t():
            logits = torch.einsum("nh,nlh->nl", self._deepen(first), self.out[place]) + self.bias[place]
            drawn = torch.multinomial(torch.softmax(logits.double(), 1), 1)
            pixels.scatter_(1, place.unsqueeze(1), drawn)
            first += self.into[place * self.levels + drawn[:, 0]]
        return to_frames(pixels.view(n, *self.obs_shape[1:]), self.levels)

    def quantise(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) of 0..255 -> levels uint8 (B, H, W) on the model's device. UserError for frames of another shape."""
        return quantise(frames.to(self.device), self.levels, self.obs_shape, "a NADE")

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """The inverse of `state_dict`, which holds the online optimiser's memory too. UserError where shapes differ."""
        load_whole(self, state, "NADE")

    def _nats_in_order(self, pixels: Tensor, order: Tensor) -> Tensor:
        """Levels int64 (B, D) in raster order -> log-probabilities (B) in an order int64 (D), float64."""
        rows = functional.embedding(self._entries(pixels)[:, order], self.into)
        before = rows.cumsum(1)[:, :-1] + self.first_bias  # of all pixels but the first, in order
        first = torch.cat((self.first_bias.expand(len(pixels), 1, -1), before), 1)[:, order.argsort()]
        logits = torch.einsum("bdh,dlh->bdl", self._deepen(first), self.out) + self.bias
        return self._picked(logits, pixels).sum(1, dtype=torch.float64)

    def _entries(self, pixels: Tensor) -> Tensor:
        """Levels int64 (B, D) -> rows int64 (B, D) of `into`."""
        return pixels + self.levels * torch.arange(self.dims, device=self.device)

    def _deepen(self, first: Tensor) -> Tensor:
        """The first layer before its nonlinearity (..., hidden) -> the last hidden layer."""
        active = torch.relu if self.order_agnostic else torch.sigmoid
        hidden = active(first)
        for layer in self.between:
            hidden = active(layer(hidden))
        return hidden

    def _picked(self, logits: Tensor, pixels: Tensor) -> Tensor:
        """Logits (B, D, L), levels int64 (B, D) -> log-probabilities (B, D) of the levels."""
        scores = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return scores.gather(-1, pixels.unsqueeze(-1)).squeeze(-1)
