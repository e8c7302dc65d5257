"""Bounds under a linear-Gaussian model, whose likelihood is known: z ~ N(0, I), x = A z + noise."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from generative.bounds import elbo, importance_weighted, importance_weighted_in_chunks
from generative.likelihoods import gaussian_log_prob, kl_gaussians

LATENTS, DIMS, NOISE = 2, 3, 0.5


class LinearGaussian:
    """The model, with q a diagonal Gaussian around the exact posterior mean, its std times `widen`."""

    def __init__(self, widen):
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(DIMS, LATENTS, generator=generator).double()
        self.x = torch.randn(4, DIMS, generator=generator).double()
        precision = torch.eye(LATENTS) + self.matrix.T @ self.matrix / NOISE**2
        covariance = torch.linalg.inv(precision)
        self.mean = self.x @ (covariance @ self.matrix.T / NOISE**2).T
        self.log_std = (covariance.diagonal().sqrt() * widen).log().expand_as(self.mean)

    def exact(self):
        covariance = self.matrix @ self.matrix.T + NOISE**2 * torch.eye(DIMS)
        return MultivariateNormal(torch.zeros(DIMS).double(), covariance).log_prob(self.x)

    def draw(self, samples):
        z = self.mean + self.log_std.exp() * torch.randn(samples, *self.mean.shape).double()
        log_joint = Normal(0.0, 1.0).log_prob(z).sum(-1) + gaussian_log_prob(self.x, z @ self.matrix.T, math.log(NOISE)).sum(-1)
        return log_joint - gaussian_log_prob(z, self.mean, self.log_std).sum(-1)


def test_bounds_stay_below_tighten_and_converge():
    torch.manual_seed(0)
    model = LinearGaussian(widen=1.3)
    exact = model.exact()
    draws = model.draw(16 * 4_000)
    means = [torch.vmap(importance_weighted)(draws.unflatten(0, (-1, samples))).mean(0) for samples in (1, 4, 16)]
    assert (means[0] < means[1]).all()
    assert (means[1] < means[2]).all()
    assert (means[2] < exact).all()
    assert torch.allclose(importance_weighted(model.draw(200_000)), exact, atol=0.02)


def test_elbo_falls_short_by_the_divergence_from_the_posterior():
    torch.manual_seed(0)
    model = LinearGaussian(widen=1.3)
    z_mean, covariance = model.mean, torch.linalg.inv(torch.eye(LATENTS) + model.matrix.T @ model.matrix / NOISE**2)
    q = MultivariateNormal(z_mean, torch.diag_embed((2 * model.log_std).exp()))
    gap = torch.distributions.kl_divergence(q, MultivariateNormal(z_mean, covariance))
    assert torch.allclose(elbo(model.draw(400_000)), model.exact() - gap, atol=0.01)


def test_one_dimension_with_the_exact_posterior_has_no_gap():
    """z ~ N(0, 1), x = z + N(0, 1): posterior N(x / 2, 1 / 2), evidence N(0, 2); every weight is the evidence."""
    x = torch.tensor([-1.0, 0.3, 2.0]).double()
    log_std = torch.tensor(0.5).double().sqrt().log()
    z = x / 2 + log_std.exp() * torch.randn(5, 3).double()
    log_weights = gaussian_log_prob(z, torch.zeros(()), 0.0) + gaussian_log_prob(x, z, 0.0) - gaussian_log_prob(z, x / 2, log_std)
    evidence = Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert torch.allclose(log_weights, evidence.expand(5, 3), atol=1e-6)
    assert torch.allclose(importance_weighted(log_weights), evidence, atol=1e-6)
    expected_distortion = 0.5 * ((x / 2) ** 2 + 0.5 + math.log(2 * math.pi))
    closed = -expected_distortion - kl_gaussians(x / 2, log_std)
    assert torch.allclose(closed, evidence, atol=1e-6)


def test_hand_made_weights():
    log_weights = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert elbo(log_weights).tolist() == [1.0, 1.0]
    assert importance_weighted(log_weights)[0].item() == pytest.approx(math.log((1 + math.exp(2)) / 2))
    assert importance_weighted(log_weights)[1].item() == pytest.approx(1.0)


@pytest.mark.parametrize(("samples", "chunk"), [(1, 1), (7, 3), (8, 4), (5, 100)])
def test_chunks_add_up_and_are_bounded(samples, chunk):
    rows = torch.randn(samples, 6)
    asked = []

    def draw(count):
        begin = sum(asked)
        asked.append(count)
        return rows[begin : begin + count]

    assert torch.allclose(importance_weighted_in_chunks(draw, samples, chunk), importance_weighted(rows), atol=1e-6)
    assert sum(asked) == samples
    assert max(asked) <= chunk


def test_senseless_counts_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        importance_weighted_in_chunks(lambda count: torch.zeros(count, 1), 0, 4)
