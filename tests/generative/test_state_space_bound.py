"""The bound of a state-space model against exact likelihoods: every latent enumerated, and Kalman's filter."""

import itertools
import math

import numpy as np
import pytest
import torch
from state_space_cases import ACTIONS, clip_of, model_of
from torch import nn

from generative.api import Clip
from generative.latents import Gaussians
from generative.state_space import StateSpace

CASES = [
    ("vector", (1, 2, 2), {"groups": 2, "classes": 2}),
    ("places", (1, 1, 2), {"groups": 1, "classes": 2}),  # two places of two classes
]
COPIES = 20_000


def copies(clip, count=COPIES):
    return Clip(*(part.expand(count, *part.shape[1:]) for part in clip))


def mean_and_error(values):
    return values.double().mean().item(), values.double().std().item() / math.sqrt(len(values))


def enumerated(model, clip):
    """(log p of everything and z, log q of z), (combinations) each, of a clip of one row: all sequences of latents, one by one."""
    places = model.body.places
    sites = math.prod(places) * model.latents.groups
    classes = model.latents.classes
    choices = [torch.tensor(one) for one in itertools.product(range(classes), repeat=sites)]
    images = clip.frames[0].float() / 255 - model.mean_image
    joint, chosen = [], []
    for sequence in itertools.product(choices, repeat=len(images)):
        memory, latents = torch.zeros(1, *model.body.memory_shape), torch.zeros(1, *places, model.latents.numbers)
        log_p = log_q = 0.0
        for t, classes_of in enumerate(sequence):
            action = nn.functional.one_hot(clip.actions[:, t - 1], ACTIONS).float() if t else torch.zeros(1, ACTIONS)
            memory = model.body.advance(memory, latents, action)
            where = torch.arange(sites)

            def log_prob(statistics, classes_of=classes_of, where=where):
                probs = statistics.reshape(sites, classes).softmax(-1)
                return ((1 - model.latents.uniform_mix) * probs + model.latents.uniform_mix / classes).log()[where, classes_of].sum()

            log_p = log_p + log_prob(model.body.prior(memory))
            log_q = log_q + log_prob(model.body.posterior(memory, model.body.see(images[t][None])))
            latents = nn.functional.one_hot(classes_of, classes).float().reshape(1, *places, model.latents.numbers)
            image, told = model.body.draw(memory, latents)
            log_p = log_p + torch.distributions.Normal(image[0], model.std).log_prob(images[t]).sum()
            if t:
                outcome = model.outcome(told)
                log_p = log_p - model.reward_head.loss(model.reward_head(outcome), clip.rewards[:, t - 1]).sum()
                log_p = log_p - model.discount_head.loss(model.discount_head(outcome), clip.discounts[:, t - 1]).sum()
        joint.append(log_p)
        chosen.append(log_q)
    return torch.stack(joint).double(), torch.stack(chosen).double()


@pytest.mark.parametrize(("architecture", "shape", "sizes"), CASES)
def test_the_mean_of_draws_is_the_bound_over_all_latents_and_lies_below_the_likelihood(architecture, shape, sizes):
    model = model_of((architecture, "categorical"), shape, **sizes, std=0.3, uniform_mix=0.05)
    clip = clip_of(3, batch=1, shape=shape)
    with torch.no_grad():
        log_p, log_q = enumerated(model, clip)
    assert log_q.exp().sum().item() == pytest.approx(1.0, rel=1e-4)
    likelihood, bound = log_p.logsumexp(0).item(), (log_q.exp() * (log_p - log_q)).sum().item()
    torch.manual_seed(0)
    mean, error = mean_and_error(model.elbo(copies(clip)))
    assert abs(mean - bound) < 4 * error
    assert error < 0.05
    assert bound + 10 * error < likelihood


@pytest.mark.parametrize(("architecture", "shape", "sizes"), CASES)
def test_with_the_true_posterior_the_bound_is_the_likelihood(architecture, shape, sizes, monkeypatch):
    """Of one frame, where the true posterior can be had from all latents; groups of one, since it does not factor."""
    sizes = {"groups": 1, "classes": 4} if architecture == "vector" else sizes
    shape = (1, 1, 1) if architecture == "places" else shape
    model = model_of((architecture, "categorical"), shape, **sizes, std=0.3, uniform_mix=0.0)
    clip = clip_of(1, batch=1, shape=shape)
    with torch.no_grad():
        log_p, _ = enumerated(model, clip)
    exact = log_p.float().view(1, *model.body.places, -1)
    monkeypatch.setattr(model.body, "posterior", lambda memory, seen: exact.expand(len(memory), *exact.shape[1:]))
    torch.manual_seed(0)
    mean, error = mean_and_error(model.elbo(copies(clip)))
    assert abs(mean - log_p.logsumexp(0).item()) < 4 * error + 1e-4
    assert error < 0.02


# a linear world: z_t = N(A z_{t-1} + B a_{t-1} + c, diag(P)), frame_t = N(C z_t, std^2)

LOADS = np.array([[0.3, 0.1], [0.3, -0.1], [0.0, 0.2]])  # C: columns at right angles, so that the posterior of two numbers factors
SPREAD, OFFSET = np.array([0.8, 0.5]), np.array([0.6, 0.9])
PUSH = np.array([[0.5, -0.4, 0.0], [0.0, 0.3, -0.6]])  # B
TURN = np.array([[0.7, 0.5], [-0.4, 0.8]])  # A
STD = 0.2


class Linear(nn.Module):
    """A body whose memory is the mean of the next z, and whose posterior of z, given memory and frame, is exact."""

    places, memory_shape = (), (2,)

    def __init__(self, turn, features):
        super().__init__()
        self.turn, self.features = torch.tensor(turn).float(), features
        self.push, self.offset, self.loads = (torch.tensor(part).float() for part in (PUSH, OFFSET, LOADS))
        self.variance = torch.tensor(SPREAD).float() ** 2
        self.precision = 1 / self.variance + self.loads.square().sum(0) / STD**2

    def see(self, images):
        return images.flatten(1) @ self.loads / STD**2

    def advance(self, memory, latents, actions):
        return latents @ self.turn.T + actions @ self.push.T + self.offset

    def statistics(self, mean, variance):
        return torch.cat((mean, (variance.sqrt() - 0.1).expm1().log().expand_as(mean)), -1)

    def prior(self, memory):
        return self.statistics(memory, self.variance)

    def posterior(self, memory, seen):
        return self.statistics((memory / self.variance + seen) / self.precision, 1 / self.precision)

    def draw(self, memory, latents):
        return (latents @ self.loads.T).view(-1, 1, 1, 3), torch.zeros(len(latents), self.features)


def log_normal(x, mean, cov):
    return -0.5 * (x - mean) @ np.linalg.solve(cov, x - mean) - 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]


def kalman(turn, frames, actions):
    """log p(frames | actions): predict, weigh, correct."""
    mean, cov, total = OFFSET, np.diag(SPREAD**2), 0.0
    for t, frame in enumerate(frames):
        if t:
            mean = turn @ mean + PUSH[:, actions[t - 1]] + OFFSET
            cov = turn @ cov @ turn.T + np.diag(SPREAD**2)
        seen = LOADS @ cov @ LOADS.T + STD**2 * np.eye(3)
        total += log_normal(frame, LOADS @ mean, seen)
        gain = cov @ LOADS.T @ np.linalg.inv(seen)
        mean, cov = mean + gain @ (frame - LOADS @ mean), cov - gain @ LOADS @ cov
    return total


def filtering_bound(turn, frames, actions):
    """The bound of a posterior that is exact given z of the step before, but knows no later frame: the mean of sum_t log p(frame_t |
    z_{t-1}) over its own draws, Gaussian at every t, so that it has a closed form."""
    precision = np.diag(1 / SPREAD**2) + LOADS.T @ LOADS / STD**2
    shrink = np.linalg.inv(precision)
    seen = LOADS @ np.diag(SPREAD**2) @ LOADS.T + STD**2 * np.eye(3)
    mean, cov, total = OFFSET, np.zeros((2, 2)), 0.0  # of what the memory says
    for t, frame in enumerate(frames):
        if t:
            keep = shrink @ np.diag(1 / SPREAD**2)
            after = keep @ mean + shrink @ LOADS.T @ frames[t - 1] / STD**2  # of z
            spread = keep @ cov @ keep.T + shrink
            mean, cov = turn @ after + PUSH[:, actions[t - 1]] + OFFSET, turn @ spread @ turn.T
        total += log_normal(frame, LOADS @ mean, seen) - 0.5 * np.trace(np.linalg.solve(seen, LOADS @ cov @ LOADS.T))
    return total


@pytest.mark.parametrize("turn", [TURN, np.zeros((2, 2))], ids=["turning", "forgetful"])
def test_in_a_linear_world_the_bound_is_what_theory_says_below_kalmans_likelihood(turn):
    """Where z forgets what was, later frames tell nothing, the posterior is exact, and the bound is the likelihood."""
    torch.manual_seed(0)
    model = StateSpace((1, 1, 3), ACTIONS, "cpu", architecture="vector", latents="gaussian", groups=2, units=4, memory=2, std=STD)
    assert isinstance(model.latents, Gaussians)
    model.body = Linear(turn, model.body.features)
    clip = clip_of(5, batch=1, shape=(1, 1, 3))
    clip.discounts[:] = 1
    frames, actions = clip.frames[0].flatten(1).double().numpy() / 255, clip.actions[0].tolist()
    heads = 4 * (math.log(81) + math.log1p(math.exp(-4)))  # as they start: an even softmax, and a logit of 4 for going on
    exact, bound = kalman(turn, frames, actions) - heads, filtering_bound(turn, frames, actions) - heads
    mean, error = mean_and_error(model.elbo(copies(clip, 100_000)))
    assert error < 0.02
    assert abs(mean - bound) < 4 * error
    if turn.any():
        assert bound + 0.1 < exact
    else:
        assert bound == pytest.approx(exact, abs=1e-9)
