"""Lower bounds on log p(x) from importance weights log w = log p(x, z) - log q(z | x), z drawn from q. All in nats."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def elbo(log_weights: Tensor) -> Tensor:
    """(K, B) -> (B): the mean over K draws, the evidence lower bound (Kingma and Welling 2014, equation 2)."""
    assert log_weights.ndim == 2, f"log weights are (K, B), got {tuple(log_weights.shape)}"
    return log_weights.mean(0)


def importance_weighted(log_weights: Tensor) -> Tensor:
    """(K, B) -> (B): log of the mean weight (Burda et al. 2016, equation 8). Its expectation never falls with K; K = 1 is the ELBO."""
    assert log_weights.ndim == 2, f"log weights are (K, B), got {tuple(log_weights.shape)}"
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def importance_weighted_in_chunks(draw: Callable[[int], Tensor], samples: int, chunk: int) -> Tensor:
    """(B): the importance-weighted bound from `samples` draws without holding more than `chunk` of them.

    Args:
        draw: number k -> log weights (k, B) of k fresh draws.
        samples: K, at least 1.
        chunk: draws at a time, at least 1.
    """
    if samples < 1 or chunk < 1:
        raise ValueError(f"samples and chunk must be at least 1, got {samples} and {chunk}")
    total: Tensor | None = None
    for begin in range(0, samples, chunk):
        part = torch.logsumexp(draw(min(chunk, samples - begin)), 0)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total - math.log(samples)
