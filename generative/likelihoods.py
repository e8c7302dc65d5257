"""Log-likelihoods of pixels and divergences of latents: pure functions, element by element, in nats. Whoever calls them sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LOG_TWO_PI = math.log(2.0 * math.pi)
LEVELS = 256


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor | float) -> Tensor:
    """log N(x; mean, exp(log_std)^2), a density in nats; any broadcastable float shapes. A float log_std is a fixed one."""
    if not isinstance(log_std, Tensor):
        return -0.5 * ((x - mean) * math.exp(-log_std)) ** 2 - log_std - 0.5 * LOG_TWO_PI
    return -0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * LOG_TWO_PI


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """x log p + (1 - x) log(1 - p) with p = sigmoid(logits), in nats; x in [0, 1].

    A log-probability where x is 0 or 1, else a cross-entropy.
    """
    return x * logits - functional.softplus(logits)


def logistic_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability in nats of the pixel level round(255 x) under a logistic on [0, 1], cut into 256 bins.

    Each level owns the interval of width 1/255 around it; level 0 and level 255 also own the tails, so the 256 probabilities sum to 1
    (Kingma et al. 2016, appendix C.2; Salimans et al. 2017, equation 2, with a single component).
    """
    half = 0.5 / (LEVELS - 1)
    inverse = torch.exp(-log_scale)
    upper, lower = (x - mean + half) * inverse, (x - mean - half) * inverse
    width = 2.0 * half * inverse
    # log(sigmoid(upper) - sigmoid(lower)) without cancellation: sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u))
    inside = functional.logsigmoid(upper) + functional.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
    log_prob = torch.where(x < half, functional.logsigmoid(upper), inside)
    return torch.where(x > 1.0 - half, functional.logsigmoid(-lower), log_prob)


def kl_gaussians(mean_q: Tensor, log_std_q: Tensor, mean_p: Tensor | float = 0.0, log_std_p: Tensor | float = 0.0) -> Tensor:
    """KL(N(mean_q, exp(log_std_q)^2) || N(mean_p, exp(log_std_p)^2)) in nats, per dimension; p is the standard normal unless told."""
    log_std_p = torch.as_tensor(log_std_p, dtype=mean_q.dtype, device=mean_q.device)
    inverse = torch.exp(-2.0 * log_std_p)
    return log_std_p - log_std_q + 0.5 * inverse * (torch.exp(2.0 * log_std_q) + (mean_q - mean_p) ** 2) - 0.5


def bits_per_dim(nats: Tensor, dims: int, density: bool) -> Tensor:
    """Log-likelihoods in nats an image of `dims` pixels -> bits a pixel, lower is better.

    With `density`, the nats are log-densities over [0, 1]; a pixel's 256 levels lie 1/255 apart, so each counts log 255 nats
    more (the midpoint rule for the mass of a level, good where a std is well above 1/255).
    """
    discrete = nats - dims * math.log(LEVELS - 1) if density else nats
    return -discrete / (dims * math.log(2.0))
