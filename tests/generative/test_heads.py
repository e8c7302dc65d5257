"""Heads of simulators: what a fitted one says is the mean, at every scale of reward."""

import math

import pytest
import torch

from envs.api import UserError
from generative.heads import DiscountHead, RewardHead, symexp, two_hot

POINTS = torch.tensor([0.0, 1.0, -1.0, 0.3, 10.0, 200.0, -7.5, 4321.0])


def test_symexp_is_the_inverse_of_the_symmetric_logarithm():
    torch.testing.assert_close(symexp(POINTS.sign() * POINTS.abs().log1p()), POINTS)


def test_two_hot_by_hand():
    bins = torch.tensor([-2.0, 0.0, 4.0])
    weights = two_hot(torch.tensor([0.0, 1.0, -2.0, 4.0, -1.5, 9.0, -3.0]), bins)
    expected = [[0, 1, 0], [0, 0.75, 0.25], [1, 0, 0], [0, 0, 1], [0.75, 0.25, 0], [0, 0, 1], [1, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_two_hot_keeps_the_mean_and_the_shape():
    head = RewardHead(1)
    weights = two_hot(POINTS.view(2, 4), head.bins)
    assert weights.shape == (2, 4, 81)
    assert (weights > 0).sum(-1).max() <= 2
    torch.testing.assert_close(weights @ head.bins, POINTS.view(2, 4))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


def test_heads_start_at_no_reward_and_an_episode_that_goes_on():
    features = torch.randn(5, 7)
    head, discount = RewardHead(7), DiscountHead(7)
    assert torch.equal(head.mean(head(features)), torch.zeros(5))
    torch.testing.assert_close(discount.mean(discount(features)), torch.full((5,), 1 / (1 + math.exp(-4))))


def test_means_stay_exact_under_autocast():
    """A point in 1,001 is beyond bfloat16."""
    head = RewardHead(1, bins=3, largest=math.log(1002))
    logits = torch.tensor([[-99.0, -99.0, 99.0]])
    with torch.autocast("cpu", torch.bfloat16):
        mean = head.mean(logits)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1001, rel=1e-5)


def test_a_fitted_reward_is_the_mean_of_random_ones():
    """Nine steps in ten give nothing, one in ten 50 points: a network without any input must say 5."""
    head, rewards = RewardHead(1), torch.tensor([50.0] + 9 * [0.0])
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = head.loss(head(torch.ones(10, 1)), rewards).mean()
        value.backward()
        return value

    optimiser.step(loss)
    assert head.mean(head(torch.ones(1, 1))).item() == pytest.approx(5.0, abs=0.01)


def test_losses_in_closed_form():
    head, discount = RewardHead(1, bins=3, largest=math.log(3)), DiscountHead(1)
    torch.testing.assert_close(head.bins, torch.tensor([-2.0, 0.0, 2.0]))
    logits = torch.tensor([[0.1, 0.2, 0.3]])
    expected = -(0.25 * logits.log_softmax(-1)[0, 1] + 0.75 * logits.log_softmax(-1)[0, 2])
    torch.testing.assert_close(head.loss(logits, torch.tensor([1.5]))[0], expected)
    losses = discount.loss(torch.full((3,), 2.0), torch.tensor([1.0, 0.0, 0.5]))
    going, ending = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    torch.testing.assert_close(losses, torch.tensor([going, ending, (going + ending) / 2]))


def test_even_numbers_of_bins_are_refused():
    with pytest.raises(UserError, match="odd"):
        RewardHead(4, bins=4)
