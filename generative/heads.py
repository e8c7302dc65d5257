"""What a simulator tells beside pictures: the reward of a step, and whether the episode goes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.api import UserError


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp|x| - 1), element by element: the inverse of sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().expm1()


def two_hot(values: Tensor, bins: Tensor) -> Tensor:
    """Float (B) -> float (B, n): weights on the two of the ascending `bins` (n) next to a value, so that bins @ weights is the value again.

    Values beyond the outermost bins count as these.
    """
    values = values.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, values.contiguous(), right=True).clamp(1, len(bins) - 1)
    share = (values - bins[above - 1]) / (bins[above] - bins[above - 1])
    weights = torch.zeros(*values.shape, len(bins), dtype=values.dtype, device=values.device)
    return weights.scatter_(-1, (above - 1).unsqueeze(-1), (1 - share).unsqueeze(-1)).scatter_(-1, above.unsqueeze(-1), share.unsqueeze(-1))


class RewardHead(nn.Module):
    """Rewards as a softmax over bins that lie exponentially far apart, fitted to two-hot targets (Hafner et al. 2023, arXiv 2301.04104).

    Rewards of any scale cost the same order of loss, and as a target's mean is the reward itself, so is the prediction's mean when
    rewards are random. Weights start at 0, so the first prediction is 0.

    Args:
        features: D.
        bins: how many, odd, so that one of them is 0.
        largest: log(1 + r) of the largest reward r that can be told; 10 is 22,025 points.
    """

    bins: Tensor

    def __init__(self, features: int, bins: int = 81, largest: float = 10.0) -> None:
        super().__init__()
        if bins < 3 or bins % 2 == 0:
            raise UserError(f"bins must be odd and at least 3, got {bins}")
        self.logits = nn.Linear(features, bins)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        half = symexp(torch.linspace(0, largest, bins // 2 + 1))
        self.register_buffer("bins", torch.cat((-half[1:].flip(0), half)), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """float (..., D) -> logits float32 (..., n)."""
        logits: Tensor = self.logits(features).float()
        return logits

    def mean(self, logits: Tensor) -> Tensor:
        """Logits (..., n) -> expected rewards float32 (...). Bins are summed in pairs of opposites, so that even logits give exactly 0."""
        probs, half = logits.softmax(-1), len(self.bins) // 2
        return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * self.bins[half + 1 :]).sum(-1)  # autocast would round a matmul

    def loss(self, logits: Tensor, rewards: Tensor) -> Tensor:
        """Cross-entropy in nats (...) of raw rewards float32 (...) under logits (..., n)."""
        return -(two_hot(rewards, self.bins) * logits.log_softmax(-1)).sum(-1)


class DiscountHead(nn.Module):
    """The probability that the episode goes on, as a logit. Starts at 0.98 or so: ends are seldom."""

    FIRST_LOGIT = 4.0

    def __init__(self, features: int) -> None:
        super().__init__()
        self.logit = nn.Linear(features, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.constant_(self.logit.bias, self.FIRST_LOGIT)

    def forward(self, features: Tensor) -> Tensor:
        """float (..., D) -> logits float32 (...)."""
        return self.logit(features).float().squeeze(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """Logits (...) -> expected discounts in [0, 1]."""
        return logits.sigmoid()

    def loss(self, logits: Tensor, discounts: Tensor) -> Tensor:
        """Cross-entropy in nats (...) of discounts float32 (...) in [0, 1]."""
        return functional.binary_cross_entropy_with_logits(logits, discounts, reduction="none")
