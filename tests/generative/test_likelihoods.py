"""Likelihoods and divergences against torch.distributions, sums over all levels and hand-computed numbers."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from generative.likelihoods import bernoulli_log_prob, bits_per_dim, gaussian_log_prob, kl_gaussians, logistic_log_prob


def test_gaussian_equals_the_textbook_for_learned_and_fixed_std():
    generator = torch.Generator().manual_seed(0)
    x, mean, log_std = torch.randn(3, 5, 7, generator=generator).double()
    assert torch.allclose(gaussian_log_prob(x, mean, log_std), Normal(mean, log_std.exp()).log_prob(x))
    assert torch.allclose(gaussian_log_prob(x, mean, math.log(0.05)), Normal(mean, 0.05).log_prob(x))


def test_bernoulli_equals_the_textbook_and_is_linear_between():
    logits = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0])
    for value in (0.0, 1.0):
        x = torch.full_like(logits, value)
        assert torch.allclose(bernoulli_log_prob(x, logits), Bernoulli(logits=logits).log_prob(x))
    third = bernoulli_log_prob(torch.tensor(0.25), torch.tensor(math.log(3.0)))
    assert third.item() == pytest.approx(0.25 * math.log(0.75) + 0.75 * math.log(0.25))


@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.31, 1.0, 1.7])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 2.0])
def test_logistic_levels_sum_to_one(mean, scale):
    levels = torch.arange(256).double() / 255
    log_prob = logistic_log_prob(levels, torch.tensor(mean).double(), torch.tensor(scale).double().log())
    assert torch.logsumexp(log_prob, 0).item() == pytest.approx(0.0, abs=1e-9)


def test_logistic_level_is_the_mass_of_its_interval():
    def cdf(value):
        return 1 / (1 + math.exp(-(value - 0.4) / 0.1))

    levels = torch.tensor([0.0, 100.0, 255.0]) / 255
    expected = [cdf(0.5 / 255), cdf(100.5 / 255) - cdf(99.5 / 255), 1 - cdf(254.5 / 255)]
    log_prob = logistic_log_prob(levels.double(), torch.tensor(0.4).double(), torch.tensor(0.1).double().log())
    assert log_prob.exp().tolist() == pytest.approx(expected)


def test_logistic_gradients_are_finite_far_away():
    mean = torch.full((3,), 50.0, requires_grad=True)
    log_scale = torch.full((3,), math.log(0.05), requires_grad=True)
    logistic_log_prob(torch.tensor([0.0, 0.5, 1.0]), mean, log_scale).sum().backward()
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(log_scale.grad).all()


def test_kl_equals_the_textbook_and_vanishes_at_equality():
    generator = torch.Generator().manual_seed(1)
    mean_q, log_std_q, mean_p, log_std_p = torch.randn(4, 6, generator=generator).double()
    expected = kl_divergence(Normal(mean_q, log_std_q.exp()), Normal(mean_p, log_std_p.exp()))
    assert torch.allclose(kl_gaussians(mean_q, log_std_q, mean_p, log_std_p), expected)
    assert torch.allclose(kl_gaussians(mean_q, log_std_q), kl_divergence(Normal(mean_q, log_std_q.exp()), Normal(0.0, 1.0)))
    assert torch.allclose(kl_gaussians(mean_p, log_std_p, mean_p, log_std_p), torch.zeros(6).double())


def test_bits_per_dim_of_known_models():
    uniform_levels = torch.tensor(-10 * math.log(256.0))
    assert bits_per_dim(uniform_levels, 10, density=False).item() == pytest.approx(8.0)
    levels = torch.arange(256).double() / 255
    mean, std = torch.tensor(0.5).double(), torch.tensor(0.1).double()
    masses = Normal(mean, std).cdf(levels + 0.5 / 255) - Normal(mean, std).cdf(levels - 0.5 / 255)
    density = gaussian_log_prob(levels, mean, std.log())
    for level in (77, 128):
        exact = -math.log2(masses[level].item())
        assert bits_per_dim(density[level], 1, density=True).item() == pytest.approx(exact, abs=1e-3)
