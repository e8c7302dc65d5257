"""Online steps: the rule against a plain one, frames that share a step, before and after, bad steps undone, resume bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

from envs.api import UserError
from generative import online
from generative.fit import NonFiniteLoss
from generative.online import OnlineRMSProp

RULE = {"learning_rate": 0.02, "decay": 0.8, "momentum": 0.7, "epsilon": 1e-3}


class Coin(nn.Module):
    """Frames are 0 or 1; the log-odds of 1 are a + b.

    A frame of 2 has the log-probability sqrt(-1), one of 3 explodes once a has moved, one of 4 has a gradient whose square
    overflows.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([0.3, 0.0])), nn.Parameter(torch.tensor(0.1))
        self.online = OnlineRMSProp(self.parameters(), "coin", dims=2, **RULE)

    def nats(self, frames):
        logits = self.a[0] + self.b + 0 * self.a[1]
        nats = -nn.functional.softplus(torch.where(frames == 1, -logits, logits)).double()
        nats = torch.where(frames == 2, torch.where(frames == 2, nats - 1e9, 1.0).sqrt(), nats)
        if (frames == 4).any():
            nats = nats + 1e30 * (self.a[0] - self.a[0].detach())
        return torch.where(frames == 3, nats + torch.where(self.a[0].detach() == 0.3, 0.0, math.nan), nats)


def by_hand(frames, per_step):
    """The same in plain python, float64."""
    a, b, square, velocity, before, after = 0.3, 0.1, [0.0, 0.0], [0.0, 0.0], [], []

    def nats(frame):
        return -math.log1p(math.exp(-(a + b) if frame else a + b))

    for first in range(0, len(frames), per_step):
        part = frames[first : first + per_step]
        before += [nats(frame) for frame in part]
        slope = -sum(frame - 1 / (1 + math.exp(-(a + b))) for frame in part) / len(part) / 2
        for place in (0, 1):
            square[place] = RULE["decay"] * square[place] + (1 - RULE["decay"]) * slope**2
            velocity[place] = RULE["momentum"] * velocity[place] + RULE["learning_rate"] * slope / math.sqrt(
                square[place] + RULE["epsilon"]
            )
        a, b = a - velocity[0], b - velocity[1]
        after += [nats(frame) for frame in part]
    return before, after, a, b


@pytest.mark.parametrize("per_step", [1, 2, 3, 10])
def test_steps_are_those_made_by_hand(per_step):
    coin = Coin()
    coin.online.frames_per_update = per_step
    frames = [1, 1, 0, 1, 1, 1, 0]
    recoding = coin.online.absorb(torch.tensor(frames), coin.nats)
    before, after, a, b = by_hand(frames, per_step)
    assert recoding.before.tolist() == pytest.approx(before, rel=1e-5)
    assert recoding.after.tolist() == pytest.approx(after, rel=1e-5)
    assert (float(coin.a[0].detach()), float(coin.b.detach())) == pytest.approx((a, b), rel=1e-5)
    assert float(coin.a[1].detach()) == 0.0
    assert int(coin.online.updates) == math.ceil(len(frames) / per_step)
    assert recoding.before.dtype == recoding.after.dtype == torch.float64
    assert not recoding.before.requires_grad


@pytest.mark.parametrize("bad", [2, 3, 4])
def test_a_step_that_is_not_finite_is_not_taken_and_the_frames_before_it_are_kept(bad):
    coin, good = Coin(), Coin()
    if bad != 3:
        good.online.absorb(torch.tensor([1, 0]), good.nats)
    frames = [3, 1] if bad == 3 else [1, 0, bad, 1]
    with pytest.raises(NonFiniteLoss) as error:
        coin.online.absorb(torch.tensor(frames), coin.nats)
    assert (error.value.player, error.value.update) == ("coin", 1 if bad == 3 else 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(coin.state_dict().values(), good.state_dict().values()))
    coin.online.absorb(torch.tensor([1, 1]), coin.nats)  # and it goes on
    good.online.absorb(torch.tensor([1, 1]), good.nats)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(coin.state_dict().values(), good.state_dict().values()))


def test_stop_and_resume_is_bit_for_bit():
    frames = torch.randint(0, 2, (60,))
    whole, first = Coin(), Coin()
    whole.online.absorb(frames, whole.nats)
    first.online.absorb(frames[:29], first.nats)
    second = Coin()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.online.absorb(frames[29:], second.nats)
    assert {"a", "b", "online.square", "online.velocity", "online.updates"} == set(whole.state_dict())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole.state_dict().values(), second.state_dict().values()))


def test_memory_never_becomes_denormal():
    coin = Coin()
    coin.online.square.fill_(2 * online.TINY)
    coin.online.velocity.fill_(2 * online.TINY)
    for _ in range(3):
        coin.online._move(torch.zeros(3))
    assert coin.online.square.abs().max() > 0  # 1.02e-30
    coin.online._move(torch.zeros(3))
    assert coin.online.square.abs().max() == coin.online.velocity.abs().max() == 0


@pytest.mark.parametrize(
    "knob",
    [{"learning_rate": 0.0}, {"learning_rate": math.inf}, {"epsilon": 0.0}, {"decay": 1.0}, {"momentum": -0.1}, {"frames_per_update": 0}],
)
def test_senseless_knobs_are_refused_by_name(knob):
    with pytest.raises(UserError, match=next(iter(knob))):
        OnlineRMSProp([nn.Parameter(torch.zeros(1))], "it", 1, **knob)
