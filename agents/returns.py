"""Returns and the recurrences below them. Time runs along the first dimension; trailing dimensions are lanes."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_recurrence(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t * y_{t+1}, with nothing beyond the last row.

    Args:
        x: float (T, ...).
        decay: float (T, ...), the shape of `x`.

    Returns:
        (T, ...) in the dtype of `x`. Computed by doubling, in about log2(T) passes over the tensor instead of T, so that an
        episode of thousands of steps costs microseconds on any device.
    """
    if x.shape != decay.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but decay {tuple(decay.shape)}")
    y, reach, length = x.clone(), decay.clone(), x.shape[0]
    span = 1
    while span < length:
        ahead = length - span
        y[:ahead] = y[:ahead] + reach[:ahead] * y[span:]
        reach[:ahead] = reach[:ahead] * reach[span:]
        reach[ahead:] = 0
        span *= 2
    return y


def returns(reward: Tensor, discount: Tensor, last: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """G_t = reward_t + gamma * discount_t * (next_value_t if last_t else G_{t+1}).

    A lost life (discount 0, not last) stops the reward of the next life from flowing back; a time limit (last, discount 1)
    bootstraps from the true successor; a termination (last, discount 0) bootstraps from nothing. The final row bootstraps
    from `next_value` whether or not it is last.

    Args:
        reward: float (T, ...), raw reward of step t.
        discount: float (T, ...), the environment's discount of step t.
        last: bool (T, ...), the trace is cut after step t.
        next_value: float (T, ...), the estimate of the value of `next_obs` of step t.
        gamma: the agent's discount for one step.

    Returns:
        float (T, ...) in the dtype of `reward`.
    """
    through = gamma * discount.to(reward.dtype)
    cut = last.clone()
    cut[-1:] = True
    bootstrap = torch.where(cut, next_value.to(reward.dtype), 0)
    return linear_recurrence(reward + through * bootstrap, torch.where(cut, 0, through))


def advantages(
    reward: Tensor, discount: Tensor, last: Tensor, value: Tensor, next_value: Tensor, gamma: float, trace: float = 1.0
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, equation 16), cut and bootstrapped as `returns` is.

        A_t = reward_t + gamma * discount_t * V_t+1 - value_t + gamma * discount_t * trace * (1 - last_t) * A_t+1

    where V_t+1 is next_value_t if last_t (and in the final row), else value_t+1. With trace 1, A_t + value_t is the n-step return
    `returns(...)` to the end of the rows; with trace 0, one step.

    Args:
        reward: float (T, ...), of step t.
        discount: float (T, ...), the environment's discount of step t.
        last: bool (T, ...), the trace is cut after step t.
        value: float (T, ...), the estimate of the value of `obs` of step t.
        next_value: float (T, ...), that of `next_obs` of step t; read only where `last` and in the final row.
        gamma: the agent's discount for one step.
        trace: lambda.

    Returns:
        float (T, ...) in the dtype of `value`.
    """
    through = gamma * discount.to(value.dtype)
    cut = last.clone()
    cut[-1:] = True
    following = torch.where(cut, next_value.to(value.dtype), torch.cat([value[1:], value[-1:]]))
    surprise = reward.to(value.dtype) + through * following - value
    return linear_recurrence(surprise, torch.where(cut, 0, trace * through))
