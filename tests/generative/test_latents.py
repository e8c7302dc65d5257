"""Latents: divergences against torch.distributions, draws against their probabilities, gradients against closed forms."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, OneHotCategorical, kl_divergence

from envs.api import UserError
from generative.latents import Categoricals, Gaussians, weigh_gradient

CPU = torch.device("cpu")


def mixed(logits, share, classes):
    """Probabilities with a uniform share, written another way."""
    return (1 - share) * torch.softmax(logits.double(), -1) + share * torch.full_like(logits.double(), 1 / classes)


def test_the_kl_of_gaussians_is_torchs():
    torch.manual_seed(0)
    latents, q, p = Gaussians(3), torch.randn(4, 5, 6), torch.randn(4, 5, 6)

    def normal(statistics):
        return Independent(Normal(statistics[..., :3], 0.1 + torch.log1p(statistics[..., 3:].exp())), 1)

    torch.testing.assert_close(latents.kl(q, p), kl_divergence(normal(q), normal(p)))
    assert latents.kl(q, q).abs().max() < 1e-6
    assert (latents.numbers, latents.statistics) == (3, 6)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_the_kl_of_categoricals_is_torchs_with_the_uniform_share_mixed_in(share):
    torch.manual_seed(0)
    latents, q, p = Categoricals(3, 4, share), 3 * torch.randn(2, 5, 12), 3 * torch.randn(2, 5, 12)
    ours, theirs = (Categorical(probs=mixed(logits.unflatten(-1, (3, 4)), share, 4)) for logits in (q, p))
    torch.testing.assert_close(latents.kl(q, p).double(), kl_divergence(ours, theirs).sum(-1), rtol=1e-4, atol=1e-5)
    assert latents.kl(q, q).abs().max() < 1e-6
    assert latents.numbers == latents.statistics == 12


def test_the_kl_stays_finite_however_sure_both_are():
    sure, other = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert Categoricals(1, 2, 0.01).kl(sure, other).item() == pytest.approx(0.99 * math.log(199), rel=1e-4)
    for one in (Categoricals(1, 2, 0.0), Categoricals(1, 2, 0.01)):
        logits = sure.clone().requires_grad_()
        one.kl(logits, logits.detach()).sum().backward()
        assert logits.grad.isfinite().all()
    narrow = torch.tensor([[3.0, -1e4]])
    assert Gaussians(1).kl(narrow, narrow).item() == pytest.approx(0.0, abs=1e-6)
    assert Gaussians(1).draw(narrow, torch.ones(1, 1)).item() == pytest.approx(3.1)
    assert Gaussians(1).kl(narrow, torch.tensor([[2.0, -1e4]])).item() == pytest.approx(50, rel=1e-5)


def test_categoricals_are_drawn_as_often_as_their_probabilities_say_and_independently():
    torch.manual_seed(0)
    latents, count = Categoricals(2, 3, 0.1), 40_000
    logits = torch.tensor([[1.0, 0.0, -2.0, 0.0, 0.5, 0.2]])
    drawn = latents.draw(logits.expand(count, -1), latents.noise(count, device=CPU)).unflatten(-1, (2, 3))
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}
    assert drawn.sum(-1).eq(1).all()
    probs = mixed(logits.view(2, 3), 0.1, 3).float()
    torch.testing.assert_close(drawn.mean(0), probs, atol=0.01, rtol=0)
    joint = torch.einsum("ni,nj->ij", drawn[:, 0], drawn[:, 1]) / count
    torch.testing.assert_close(joint, probs[0][:, None] * probs[1], atol=0.01, rtol=0)
    assert OneHotCategorical(probs=probs).support.check(latents.draw(logits, None).view(2, 3)).all()
    assert latents.draw(logits, None).tolist() == [[1, 0, 0, 0, 1, 0]]


def test_gaussians_are_drawn_by_their_mean_and_std():
    torch.manual_seed(0)
    latents, statistics = Gaussians(2), torch.tensor([[1.0, -2.0, 0.3, -1.0]])
    noise = latents.noise(40_000, device=CPU)
    drawn = latents.draw(statistics.expand(40_000, -1), noise)
    std = 0.1 + torch.log1p(torch.tensor([0.3, -1.0]).exp())
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, -2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), std, atol=0.02, rtol=0)
    torch.testing.assert_close(latents.draw(statistics, noise[:1]), statistics[:, :2] + std * noise[:1])
    assert torch.equal(latents.draw(statistics, None), statistics[:, :2])


@pytest.mark.parametrize("latents", [Gaussians(6), Categoricals(2, 3, 0.01)], ids=["gaussian", "categorical"])
def test_the_same_seed_draws_the_same(latents):
    statistics = torch.zeros(7, latents.statistics)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(latents.draw(statistics, latents.noise(7, device=CPU)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert latents.noise(4, 7, 2, device=CPU).shape == (4, 7, 2, latents.numbers)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_gradient_goes_straight_through_to_the_probabilities(share):
    torch.manual_seed(0)
    latents, weights = Categoricals(2, 3, share), torch.randn(5, 6)
    logits, others = (torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    (latents.draw(logits, latents.noise(5, device=CPU)) * weights).sum().backward()
    (mixed(others.unflatten(-1, (2, 3)), share, 3).flatten(1) * weights).sum().backward()
    torch.testing.assert_close(logits.grad, others.grad)
    assert logits.grad.abs().min() > 0


def test_a_weighed_gradient_leaves_the_value_as_it_is():
    values = torch.randn(100).requires_grad_()
    for weight in (0.0, 0.1, 1.0, 2.0):
        (gradient,) = torch.autograd.grad((weigh_gradient(values, weight) * torch.arange(100.0)).sum(), values)
        torch.testing.assert_close(gradient, weight * torch.arange(100.0))
        assert torch.equal(weigh_gradient(values, weight), values)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Gaussians(0), "groups must be at least 1, got 0"),
        (lambda: Categoricals(0, 4, 0.01), "got 0 and 4"),
        (lambda: Categoricals(4, 1, 0.01), "classes at least 2, got 4 and 1"),
        (lambda: Categoricals(4, 4, 1.0), "uniform_mix must be"),
        (lambda: Categoricals(4, 4, -0.1), "uniform_mix must be"),
        (lambda: Categoricals(4, 4, math.nan), "uniform_mix must be"),
    ],
)
def test_senseless_numbers_are_refused(make, told):
    with pytest.raises(UserError, match=told):
        make()
