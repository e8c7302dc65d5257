"""The slim PixelCNN's kernel: contexts against a plain set, scores and steps against autograd, exp, bits that do not depend on company."""

import copy
import math

import numpy as np
import pytest
import torch
from numba import njit

from generative import vectors
from generative.fit import NonFiniteLoss
from generative.grey_levels import to_frames
from generative.masked import SlimNet
from generative.pixelcnn import PixelCNN
from generative.pixelcnn_kernel import find_contexts

SHAPES = [
    ((1, 42, 42), {}),
    ((1, 6, 5), {"levels": 2, "first_kernel": 3}),
    ((1, 9, 20), {"levels": 256, "planes": 32, "head_planes": 16}),
    ((1, 1, 3), {"levels": 17, "blocks": 0}),
    ((1, 13, 8), {"levels": 3, "first_kernel": 5, "blocks": 1, "planes": 48, "head_planes": 32}),
]


class ByAutograd(PixelCNN):
    """The same model without its kernel."""

    _compiled = False


def pair(shape, **knobs):
    fast, slow = PixelCNN(shape, 4, "cpu", **knobs), ByAutograd(shape, 4, "cpu", **knobs)
    slow.load_state_dict(copy.deepcopy(fast.state_dict()))
    assert fast._compiled
    return fast, slow


def pictures(shape, count, levels):
    """Frames with large even areas, so that contexts repeat, and some noise."""
    shown = torch.zeros(count, *shape[1:], dtype=torch.int64)
    shown[:, : shape[1] // 2] = torch.randint(0, levels, (count, 1, 1))
    noise = torch.rand(shown.shape) < 0.1
    shown[noise] = torch.randint(0, levels, (int(noise.sum()),))
    return to_frames(shown, levels)


@pytest.mark.parametrize(("shape", "knobs"), SHAPES)
def test_scores_are_autograds(shape, knobs):
    fast, slow = pair(shape, **knobs)
    frames = pictures(shape, 20, fast.levels)
    exact = ByAutograd(shape, 4, "cpu", **knobs)
    exact.load_state_dict(fast.state_dict())
    exact.double()
    found, expected = fast.log_prob(frames), exact.nats(exact.quantise(frames)).detach()
    pixels = math.prod(shape)
    assert float((found - expected).abs().max()) < 2e-7 * pixels
    assert torch.allclose(slow.log_prob(frames), expected, atol=1e-6 * pixels)


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize(("shape", "knobs"), SHAPES)
def test_steps_are_autograds(shape, knobs, per_step):
    fast, slow = pair(shape, frames_per_update=per_step, **knobs)
    frames = pictures(shape, 4, fast.levels)
    found, expected = fast.absorb(frames), slow.absorb(frames)
    pixels = math.prod(shape)
    assert torch.allclose(found.before, expected.before, atol=2e-6 * pixels)
    assert torch.allclose(found.after, expected.after, atol=2e-6 * pixels)
    for name, value in fast.state_dict().items():
        there = slow.state_dict()[name]
        assert torch.allclose(value.double(), there.double(), atol=1e-3 * float(there.double().abs().max()), rtol=0), name
    assert float((found.after - found.before).abs().max()) > 1e-3


def test_the_whole_gradient_is_autograds():
    """One step with the rule turned into p -= g: every entry of it."""
    fast, slow = pair((1, 12, 11), decay=0.0, momentum=0.0, epsilon=1e12, learning_rate=1e6)
    frames = pictures((1, 12, 11), 1, 8)
    start = fast.net.weights.detach().clone()
    fast.absorb(frames)
    slow.nats(slow.quantise(frames)).sum().div(-132).backward()
    gradient = slow.net.weights.grad
    assert (gradient != 0).float().mean() > 0.3
    assert torch.allclose(start - fast.net.weights.detach(), gradient, atol=2e-6 * float(gradient.abs().max()) + 1e-7)


def test_logits_far_apart():
    fast, slow = pair((1, 8, 8))
    last = fast.net.layers[-1][1]
    for model in (fast, slow):
        model.net.weights.data[last + 5], model.net.weights.data[last] = 300.0, -300.0
    frames = pictures((1, 8, 8), 3, 8)
    expected = slow.log_prob(frames)
    assert expected.min() < -1_000
    assert torch.allclose(fast.log_prob(frames), expected, rtol=1e-6)


@pytest.mark.parametrize("model", [PixelCNN, ByAutograd])
def test_a_gradient_that_is_not_finite_is_not_followed(model):
    """A hidden unit of 1e25 that no logit listens to: the loss is as before, the square of its weights' gradient overflows."""
    model = model((1, 8, 8), 4, "cpu")
    (_, bias, *_), (matrix, *_) = model.net.layers[-2:]
    model.net.weights.data[bias], model.net.weights.data[matrix : matrix + 8] = 1e25, 0.0
    frames, start = pictures((1, 8, 8), 2, 8), copy.deepcopy(model.state_dict())
    assert model.log_prob(frames).isfinite().all()
    with pytest.raises(NonFiniteLoss):
        model.absorb(frames)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_many_steps_stay_together():
    fast, slow = pair((1, 10, 10))
    frames = pictures((1, 10, 10), 60, 8)
    found, expected = fast.absorb(frames), slow.absorb(frames)
    assert torch.allclose(found.after, expected.after, rtol=1e-3)
    assert float(found.after[-10:].mean()) > 0.7 * float(found.before[0])


@pytest.mark.parametrize(("levels", "reach"), [(2, 1), (8, 3), (256, 3), (7, 2)])
def test_contexts_are_those_of_a_plain_set(levels, reach):
    frames = (pictures((1, 9, 12), 3, levels)[:, 0].int() * levels // 256).to(torch.uint8)
    count, height, width = frames.shape
    cells = np.zeros((count, height + reach, width + 2 * reach), np.uint16)
    words, slots = np.zeros((count, 2, height + reach, width), np.int64), np.zeros(1024, np.int32)
    which, examples = np.zeros(frames.numel(), np.int32), np.zeros(frames.numel(), np.int64)
    found = find_contexts(frames.numpy(), reach, levels, cells, words, slots, which, examples)
    net = SlimNet(levels, 2 * reach + 1)
    contexts = [tuple(row) for row in net.contexts(frames).tolist()]
    assert found == len(set(contexts)) < len(contexts)
    assert len(set(zip(contexts, which.tolist()))) == found
    flat, places = cells.reshape(-1), [(i, j) for i in range(-reach, 1) for j in range(-reach, reach + 1) if i < 0 or j < 0]
    for context, number in zip(contexts, which.tolist()):
        around = [int(flat[examples[number] + i * (width + 2 * reach) + j]) for i, j in places]
        assert tuple(around) == context


def test_a_context_that_differs_in_one_cell_of_256_levels_is_another():
    """Both ends of each word: nothing spills over."""
    frames = torch.zeros(49, 4, 7, dtype=torch.uint8)
    for place in range(24):
        frames[1 + place].view(-1)[place] = 255
        frames[25 + place].view(-1)[place] = 1
    cells, words = np.zeros((49, 7, 13), np.uint16), np.zeros((49, 2, 7, 7), np.int64)
    which, examples = np.zeros(frames.numel(), np.int32), np.zeros(frames.numel(), np.int64)
    find_contexts(frames.numpy(), 3, 256, cells, words, np.zeros(4096, np.int32), which, examples)
    assert len(set(which.reshape(49, 4, 7)[:, 3, 3].tolist())) == 49


def test_a_frame_has_the_same_bits_in_any_company():
    model = PixelCNN((1, 16, 16), 4, "cpu")
    frames = pictures((1, 16, 16), 40, 8)
    model.absorb(frames[:3])
    alone = torch.cat([model.log_prob(frame) for frame in frames.split(1)])
    assert torch.equal(model.log_prob(frames), alone)
    assert torch.equal(model.log_prob(frames.flip(0)).flip(0), alone)


def test_exp():
    @njit
    def run(x, y):
        for place in range(len(x)):
            y[place] = vectors.exp(x[place])

    x = np.concatenate([np.linspace(-60, 88, 100_001), [-1e30, -61.0, 0.0, 1e30, np.nan]]).astype(np.float32)
    y = np.empty_like(x)
    run(x, y)
    exact = np.exp(np.clip(x.astype(np.float64), -60, 88))
    assert np.abs(y[:-1] / exact[:-1] - 1).max() < 2e-7
    assert np.isnan(y[-1])


@pytest.mark.parametrize(("rows", "columns", "terms"), [(8, 16, 1), (16, 48, 7), (64, 32, 16), (24, 80, 33)])
def test_multiply_forward_and_transposed(rows, columns, terms):
    x, w = np.random.default_rng(0).normal(size=(rows, terms)), np.random.default_rng(1).normal(size=(terms, columns))
    x, w, start = x.astype(np.float32), w.astype(np.float32), np.arange(columns, dtype=np.float32)
    y, flipped = np.zeros((rows, columns), np.float32), np.ascontiguousarray(x.T)
    vectors.multiply(
        y.ctypes.data, 4 * columns, start.ctypes.data, 0, x.ctypes.data, 4 * terms, 4, w.ctypes.data, 4 * columns, rows, columns, terms
    )
    assert np.allclose(y, start + x @ w, atol=1e-4)
    at = y.ctypes.data
    vectors.multiply(at, 4 * columns, at, 4 * columns, flipped.ctypes.data, 4, 4 * rows, w.ctypes.data, 4 * columns, rows, columns, terms)
    assert np.allclose(y, start + 2 * x @ w, atol=1e-4)
