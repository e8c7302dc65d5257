"""STRAW, a strategic attentive writer: a planner of macro-actions, and its noisy form STRAWe (Vezhnevets et al. 2016, arXiv 1606.04695)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.api import UserError
from generative.api import PlanStep

EVIDENCE = 40.0  # e: what the commitment-plan's filter writes; summed over the columns it stays 40
FIRST_BIAS = -1.0  # b at first: away from the filter, a step in four plans anew
LARGEST_LOG = 10.0  # of a stride or a variance; beyond it float32 would overflow
LEAST_LOG_VARIANCE = -2.0  # a filter of one column; the gradients of narrower ones between two columns explode over the steps of a rollout
MOST_STEPS, MOST_FILTERS, MOST_COST = 10_000, 100, 1_000_000


class Straw(nn.Module):
    """Writes what to do in the next T steps, and when to think again; in between it follows the plan with closed eyes.

    A plan is one tensor, float (B, A + 1, T). Rows 0..A-1 are the action-plan A^t, whose columns are the logits of this step and the T - 1
    after it; the last row is the commitment-plan c^t, whose first column is the chance that the next step plans anew. With rho the
    shift by a column to the left, which appends zeros, the features z and a gate g ~ Bernoulli(c_1 of the step before):

        zeta = z (STRAW), or a sample of N(mu(z), sigma(z)) (STRAWe)
        psi  = linear(zeta), of which `filters` makes F (T, K);  beta = A^{t-1} F
        xi   = MLP(beta, zeta), two layers, each with a ReLU;    A^t = rho(A^{t-1}) + g f_A(xi) F^T
        c^t  = sigmoid(b + e F_c) where g, with one filter F_c of psi_c = linear(psi, xi) and a learned b; else rho(c^{t-1})

    and a step costs g kl_cost KL(N(mu, sigma) || N(0, 1)) + replan_cost c^t_1, in nats. An empty plan has A = 0 and c = (1, 0, ...), so the
    first step plans. The gate is hard; the gradient of what it opens, f_A and the KL, goes straight through to c_1.

    Kept from the paper: all the above, T = 500, K = 10, e = 40. Ours, where it is silent or we do not know: `hidden`, the costs, zeta of as
    many numbers as z, ReLUs, b = -1 at first, where filters start (on the first K columns, a column apart, and c's in their midst), and
    that F_c stays on the plan (position T sigmoid(.) - 1/2) and has a variance of a column or more (its logarithm softplus(.)): one that
    the cost pushed off the plan has no gradient to come back by. And what keeps gradients finite over long rollouts: A is bounded, and
    read without a gradient; that of the gate does not go through c, where its ways double with every step; and no filter's variance is
    below e^-2. Everything is computed in the plan's dtype, float32 but in tests, whatever that of the parameters.

    Args:
        obs_shape: unused, every model takes it; a planner sees the agent's features.
        num_actions: A.
        device: where the parameters lie.
        plan_steps: T.
        filters: K.
        hidden: units of both layers of the MLP.
        noise: whether zeta is sampled: STRAWe.
        kl_cost: alpha.
        replan_cost: lambda.
        largest_logit: in nats; A is held within +- this, and a gradient passes unless it pushes further out. Plans that add up where they
            are made often would grow without end, and a policy that is too sure of a mistake never learns of it.
    """

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        num_actions: int,
        device: torch.device | str,
        plan_steps: int = 500,
        filters: int = 10,
        hidden: int = 128,
        noise: bool = True,
        kl_cost: float = 1e-4,
        replan_cost: float = 3e-3,
        largest_logit: float = 10.0,
    ) -> None:
        super().__init__()
        for name, count, most in (("plan_steps", plan_steps, MOST_STEPS), ("filters", filters, MOST_FILTERS)):
            if not 1 <= count <= most:
                raise UserError(f"planner.{name} must be from 1 to {most:,}, got {count}")
        if hidden < 1:
            raise UserError(f"planner.hidden must be at least 1, got {hidden}")
        if not 0 < largest_logit < math.inf:
            raise UserError(f"planner.largest_logit must be above 0, got {largest_logit}")
        for name, cost in (("kl_cost", kl_cost), ("replan_cost", replan_cost)):
            if not 0 <= cost <= MOST_COST:
                raise UserError(f"planner.{name} must be from 0 to {MOST_COST:,}, got {cost}")
        self.obs_shape, self.num_actions, self.plan_steps, self.filters = obs_shape, num_actions, plan_steps, filters
        self.hidden, self.noise, self.kl_cost, self.replan_cost, self.largest_logit = hidden, noise, kl_cost, replan_cost, largest_logit
        self.second = nn.Linear(hidden, hidden)
        self.write = nn.Linear(hidden, num_actions * filters)  # f_A
        self.commit = nn.Linear(3 + hidden, 2)  # psi_c: one filter has no stride
        self.bias = nn.Parameter(torch.full((1,), FIRST_BIAS))  # b
        share = min(filters, plan_steps) / (2 * plan_steps)  # of the plan, to the midst of the first K columns
        nn.init.zeros_(self.commit.bias)
        nn.init.constant_(self.commit.bias[:1], math.log(share / (1 - share)))
        self.to(device)

    def connect(self, features: int) -> None:
        """Makes the layers above the agent's features (B, D)."""
        if self.noise:
            self.mean, self.log_std = nn.Linear(features, features), nn.Linear(features, features)
        self.attend = nn.Linear(features, 3)
        self.first = nn.Linear(self.num_actions * self.filters + features, self.hidden)
        self._start_filter(self.attend)
        self.to(self.bias.device)

    def start(self, batch: int) -> Tensor:
        """Empty plans, float32 (B, A + 1, T)."""
        plan = torch.zeros(batch, self.num_actions + 1, self.plan_steps, device=self.bias.device)
        plan[:, -1, 0] = 1
        return plan

    def advance(self, features: Tensor, plan: Tensor, noise: Tensor | None = None) -> PlanStep:
        """One step of B lanes. `noise` is (B, 1), uniform in [0, 1) for the gate, or for STRAWe (B, 1 + D), then normal for zeta.

        They are drawn for every lane; zeta counts only where the plan is made anew.
        """
        z = features.to(plan.dtype)
        if noise is None:
            parts = [torch.rand_like(z[:, :1])] + ([torch.randn_like(z)] if self.noise else [])
            noise = torch.cat(parts, 1)
        chance, shifted = plan[:, -1, 0], time_shift(plan)
        replanned = noise[:, 0] < chance
        gate = replanned.to(plan.dtype) + (chance - chance.detach())  # the value of the one, the gradient of the other
        zeta, divergence = z, torch.zeros_like(chance)
        if self.noise:
            mean, log_std = _linear(self.mean, z), _linear(self.log_std, z)
            zeta, divergence = mean + log_std.exp() * noise[:, 1:], kl_to_normal(mean, log_std)
        psi = _linear(self.attend, zeta)
        grid = gaussian_filters(psi[:, 0], psi[:, 1], psi[:, 2], self.filters, self.plan_steps)
        seen = plan[:, :-1].detach() @ grid  # (B, A, K)
        xi = _linear(self.second, _linear(self.first, torch.cat([seen.flatten(1), zeta], 1)).relu()).relu()
        written = _linear(self.write, xi).unflatten(1, (self.num_actions, self.filters)) @ grid.transpose(1, 2)  # (B, A, T)
        psi_c = _linear(self.commit, torch.cat([psi, xi], 1))
        place, spread = self.plan_steps * psi_c[:, 0].sigmoid() - 0.5, functional.softplus(psi_c[:, 1])
        where = gaussian_filters(place, torch.zeros_like(chance), spread, 1, self.plan_steps).squeeze(2)
        commitment = torch.sigmoid(self.bias.to(plan.dtype) + EVIDENCE * where)  # (B, T)
        opened, anew = gate.view(-1, 1, 1), replanned.view(-1, 1)
        actions = _Held.apply(shifted[:, :-1] + written, self.largest_logit)
        acted = opened * actions + (1 - opened) * shifted[:, :-1]
        committed = torch.where(anew, commitment, shifted[:, -1])
        fresh = torch.cat([acted, committed.unsqueeze(1)], 1)
        cost = gate * self.kl_cost * divergence + self.replan_cost * committed[:, 0]
        return PlanStep(fresh[:, :-1, 0], fresh, replanned, cost, noise)

    def required_bytes(self, steps: int) -> int:
        """An upper bound of what `steps` steps of single lanes hold until a loss has gone back through them, weights apart."""
        rows = 5 * (self.num_actions + 1) + 5 * self.filters + 8  # of T numbers: plans, written and shifted, and filters
        units = 4 * (self.num_actions * self.filters + self.hidden + 8)
        return 4 * steps * (self.plan_steps * rows + units + 8 * self.attend.in_features)

    def _start_filter(self, layer: nn.Linear) -> None:
        """The position that a filter grid starts from: such that its K centres, a column apart, begin with the first column."""
        nn.init.zeros_(layer.bias)
        nn.init.constant_(layer.bias[:1], (min(self.filters, self.plan_steps) - 1) / 2)


class _Held(torch.autograd.Function):
    """x within +- most. A gradient passes unless a step down it would push a value further out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(-most, most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        outwards = ((x > ctx.most) & (gradient < 0)) | ((x < -ctx.most) & (gradient > 0))
        return gradient.masked_fill(outwards, 0), None


def time_shift(plan: Tensor) -> Tensor:
    """rho: (..., T) -> (..., T) without the first column, and with zeros as the last."""
    return functional.pad(plan[..., 1:], (0, 1))


def made_anew(plan: Tensor) -> Tensor:
    """bool (B): which of the plans (B, A + 1, T) were made in the step just gone. The commitment of one that was shifted ends in a zero."""
    return plan[:, -1, -1] > 0


def gaussian_filters(position: Tensor, log_stride: Tensor, log_variance: Tensor, filters: int, steps: int) -> Tensor:
    """K Gaussians over T columns, each normalised to sum to 1 (Gregor et al. 2015, arXiv 1502.04623, section 3.2, in one dimension).

    The k-th of 1..K is centred on position + (k - K / 2 - 1 / 2) stride, in columns, the first column being 0. A centre outside the plan
    gives a filter on the nearest columns. The stride's logarithm is held within +-10, the variance's within -2 and 10.

    Args:
        position, log_stride, log_variance: float (B); the variance in columns squared.
        filters: K.
        steps: T.

    Returns:
        (B, T, K), in their dtype.
    """
    stride, precision = log_stride.clamp(-LARGEST_LOG, LARGEST_LOG).exp(), (-log_variance.clamp(LEAST_LOG_VARIANCE, LARGEST_LOG)).exp()
    places = torch.arange(1, filters + 1, dtype=position.dtype, device=position.device) - filters / 2 - 0.5
    centres = position.unsqueeze(1) + places * stride.unsqueeze(1)  # (B, K)
    columns = torch.arange(steps, dtype=position.dtype, device=position.device).unsqueeze(1)
    return torch.softmax(-0.5 * precision.view(-1, 1, 1) * (columns - centres.unsqueeze(1)).square(), 1)


def kl_to_normal(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(0, 1)) in nats, summed over the last dimension."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of `x`, whatever that of the parameters."""
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
