"""Rollouts and the errors of their pictures, against arrays made by hand."""

import math

import numpy as np
import pytest
import torch

from envs.api import UserError
from generative.api import Clip
from generative.rollouts import moving_error, psnr, rollout, squared_error, ssim


class Adder:
    """A simulator whose picture grows by the action, of the mean of the frames that it was shown."""

    context_frames = 2
    obs_shape = (1, 2, 2)

    def __init__(self):
        self.starts = []

    def start(self, clip):
        self.starts.append(clip)
        return (clip.frames[:, -2:].float().mean(1),)

    def step(self, state, action):
        picture = state[0] + action.float()[:, None, None, None]
        return (picture,), picture.to(torch.uint8), action.float(), torch.full(action.shape, 0.5)


def clip_of(rows, steps, last=()):
    random = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 100, (rows, steps + 1, 1, 2, 2), dtype=torch.uint8, generator=random)
    actions = torch.randint(0, 5, (rows, steps), generator=random)
    ends = torch.zeros(rows, steps, dtype=torch.bool)
    for row, t in last:
        ends[row, t] = True
    return Clip(frames, actions, torch.zeros(rows, steps), 1 - ends.float(), ends)


def test_a_rollout_takes_the_actions_after_its_context():
    clip, simulator = clip_of(3, 6, last=[(1, 3), (2, 0)]), Adder()
    found = rollout(simulator, clip, 4)
    assert torch.equal(simulator.starts[0].frames, clip.frames[:, :2])
    assert simulator.starts[0].actions.shape == (3, 1)
    base, total = clip.frames[:, :2].float().mean(1), torch.zeros(3)
    for t in range(4):
        total = total + clip.actions[:, 1 + t]
        assert torch.equal(found.frames[:, t], (base + total[:, None, None, None]).to(torch.uint8))
        assert torch.equal(found.truth[:, t], clip.frames[:, 2 + t])
        assert torch.equal(found.before[:, t], clip.frames[:, 1 + t])
        assert torch.equal(found.rewards[:, t], clip.actions[:, 1 + t].float())
        assert torch.equal(found.clip.discounts[:, t], clip.discounts[:, 1 + t])
    assert found.weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert found.clip.actions.shape == (3, 4)
    assert torch.equal(found.discounts, torch.full((3, 4), 0.5))


def test_clips_that_are_too_short_are_refused():
    with pytest.raises(UserError, match="5 steps after 2 frames need clips of 6 transitions, these have 5"):
        rollout(Adder(), clip_of(1, 5), 5)


def test_errors_by_hand():
    truth = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    frames = truth.clone()
    frames[0, 1, 2, 3] = 51  # a fifth, in one of 48 numbers
    error = squared_error(frames, truth)
    torch.testing.assert_close(error, torch.tensor([0.04 / 48, 0.0]))
    torch.testing.assert_close(psnr(error), torch.tensor([-10 * math.log10(0.04 / 48), 100.0]))
    before = truth.clone()
    before[0, 2, 2, 3] = 9  # moves, in another channel
    before[0, 0, 0, 0] = 1  # moves, and is foretold
    before[1, 0, 1, 1] = 1
    total, count = moving_error(frames, truth, before)
    torch.testing.assert_close(total, torch.tensor([0.04 / 3, 0.0]))
    assert count.tolist() == [2, 1]
    with pytest.raises(AssertionError, match="uint8"):
        squared_error(frames.float(), truth)


def slow_ssim(x, y, size):
    """Window by window, in float64."""
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2, values = 0.01**2, 0.03**2, []
    for channel in range(x.shape[0]):
        for i in range(x.shape[1] - size + 1):
            for j in range(x.shape[2] - size + 1):
                a, b = (z[channel, i : i + size, j : j + size] / 255 for z in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb, cov = ((window * p * q).sum() for p, q in ((a - ma, a - ma), (b - mb, b - mb), (a - ma, b - mb)))
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


@pytest.mark.parametrize(("shape", "size"), [((3, 16, 14), 11), ((1, 10, 5), 5), ((2, 6, 9), 5), ((1, 1, 4), 1)])
def test_ssim_is_that_of_a_slow_loop(shape, size):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (4, *shape)).astype(np.uint8)
    y = x.copy()
    y[1:] = np.clip(x[1:] + random.normal(0, 30, x[1:].shape), 0, 255).astype(np.uint8)
    y[3] = 255 - x[3]
    found = ssim(torch.from_numpy(x), torch.from_numpy(y))
    expected = [slow_ssim(a.astype(float), b.astype(float), size) for a, b in zip(x, y)]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert ssim(torch.from_numpy(x)[None, :2], torch.from_numpy(y)[None, :2]).shape == (1, 2)
