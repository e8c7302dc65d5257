import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from envs.api import UserError
from generative.api import Density, Sampler
from generative.cts import CTS

ROOT = Path(__file__).parent.parent.parent


def log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))


class Node:
    """A node of the reference: sparse, in log space, weights never normalised away."""

    def __init__(self, levels: int) -> None:
        self.levels, self.counts, self.children = levels, [0] * levels, {}
        self.stay = self.split = math.log(0.5)

    def estimate(self, level: int) -> float:
        return math.log((self.counts[level] + 1 / self.levels) / (sum(self.counts) + 1))

    def child(self, context: tuple[int, ...]) -> "Node":
        return self.children.setdefault(context[0], Node(self.levels))

    def log_prob(self, context: tuple[int, ...], level: int) -> float:
        own = self.estimate(level)
        if not context:
            return own
        below = self.child(context).log_prob(context[1:], level)
        return log_add(self.stay + own, self.split + below) - log_add(self.stay, self.split)

    def update(self, context: tuple[int, ...], level: int, rate: float) -> float:
        own = self.estimate(level)
        self.counts[level] += 1
        if not context:
            return own
        below = self.child(context).update(context[1:], level, rate)
        mixed = log_add(self.stay + own, self.split + below) - log_add(self.stay, self.split)
        keep, change = math.log1p(-rate), math.log(rate)
        stay = log_add(keep + self.stay + own, change + self.split + below)
        split = log_add(keep + self.split + below, change + self.stay + own)
        self.stay, self.split = stay, split
        return mixed


class Reference:
    """Context-tree switching over frames, pixel after pixel, as slow as can be."""

    def __init__(self, height: int, width: int, levels: int) -> None:
        self.levels, self.updates = levels, 0
        self.roots = [[Node(levels) for _ in range(width)] for _ in range(height)]

    def _places(self, frame: np.ndarray):
        shown = frame.astype(int) * self.levels // 256
        framed = np.pad(shown, 1)  # zeros beyond the border
        for i, row in enumerate(self.roots):
            for j, root in enumerate(row):
                context = framed[i + 1, j], framed[i, j + 1], framed[i, j], framed[i, j + 2]
                yield root, tuple(int(level) for level in context), int(shown[i, j])

    def log_prob(self, frame: np.ndarray) -> float:
        return sum(root.log_prob(context, level) for root, context, level in self._places(frame))

    def absorb(self, frame: np.ndarray) -> tuple[float, float]:
        self.updates += 1
        rate = 1 / (self.updates + 1)
        before = sum(root.update(context, level, rate) for root, context, level in self._places(frame))
        return before, self.log_prob(frame)


def moving_squares(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 1, H, W): a few grey squares that walk, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.zeros(count, 1, height, width, dtype=torch.uint8)
    for t in range(count):
        frames[t, 0, (t // 3) % height, :] = 90
        frames[t, 0, :, (t // 2) % width] = 200
    noise = torch.rand(frames.shape, generator=generator) < 0.02
    return torch.where(noise, torch.randint(256, frames.shape, generator=generator).to(torch.uint8), frames)


@pytest.mark.parametrize(("height", "width", "levels", "count"), [(9, 11, 8, 400), (5, 1, 3, 200), (1, 6, 16, 100), (4, 4, 2, 200)])
def test_equals_the_reference_in_log_space(height, width, levels, count):
    frames = moving_squares(count, height, width)
    model, reference = CTS(height, width, levels), Reference(height, width, levels)
    expected = torch.tensor([reference.absorb(frame[0].numpy()) for frame in frames], dtype=torch.float64)
    parts = [model.absorb(part) for part in frames.split(7)]
    assert torch.cat([part.before for part in parts]).allclose(expected[:, 0], rtol=0, atol=1e-9 * height * width)
    assert torch.cat([part.after for part in parts]).allclose(expected[:, 1], rtol=0, atol=1e-9 * height * width)
    unseen = moving_squares(5, height, width, seed=1)
    later = torch.tensor([reference.log_prob(frame[0].numpy()) for frame in unseen], dtype=torch.float64)
    assert model.log_prob(unseen).allclose(later, rtol=0, atol=1e-9 * height * width)


def test_full_frames_equal_the_reference():
    frames = moving_squares(30, 42, 42)
    model, reference = CTS(), Reference(42, 42, 8)
    expected = torch.tensor([reference.absorb(frame[0].numpy()) for frame in frames], dtype=torch.float64)
    recoding = model.absorb(frames)
    assert torch.stack([recoding.before, recoding.after], 1).allclose(expected, rtol=0, atol=1e-7)


def test_first_frame_costs_a_uniform_guess_a_pixel():
    model = CTS(6, 5, 4)
    recoding = model.absorb(torch.full((1, 1, 6, 5), 77, dtype=torch.uint8))
    assert float(recoding.before) == pytest.approx(30 * math.log(1 / 4))
    after = (1 + 1 / 4) / 2  # every node on the path saw one count of one, whatever the weights
    assert float(recoding.after) == pytest.approx(30 * math.log(after))


def test_probabilities_of_all_tiny_frames_sum_to_one():
    model = CTS(2, 3, 2)
    model.absorb(moving_squares(50, 2, 3))
    frames = torch.tensor(list(itertools.product((0, 255), repeat=6)), dtype=torch.uint8).view(-1, 1, 2, 3)
    assert float(model.log_prob(frames).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_batches_are_absorbed_one_frame_after_another():
    frames = moving_squares(40, 8, 8)
    together, alone = CTS(8, 8), CTS(8, 8)
    recoding = together.absorb(frames)
    single = [alone.absorb(frame[None]) for frame in frames]
    assert recoding.before.tolist() == [float(one.before) for one in single]
    assert recoding.after.tolist() == [float(one.after) for one in single]


def test_threads_change_nothing():
    frames = moving_squares(20, 10, 7)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            model = CTS(10, 7)
            results.append([*model.absorb(frames), model.log_prob(frames)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_log_prob_learns_nothing_and_agrees_with_absorb():
    model = CTS(8, 8)
    frames = moving_squares(30, 8, 8)
    model.absorb(frames)
    new = moving_squares(1, 8, 8, seed=3)
    first = model.log_prob(new)
    assert torch.equal(first, model.log_prob(new))
    recoding = model.absorb(new)
    assert recoding.before.allclose(first, rtol=0, atol=1e-11)
    assert recoding.after.allclose(model.log_prob(new), rtol=0, atol=1e-11)


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_levels_are_equal_shares_of_the_pixels(levels):
    shown = CTS(1, 1, levels).quantise(torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1))
    assert shown.flatten().tolist() == [pixel * levels // 256 for pixel in range(256)]


@pytest.mark.parametrize("levels", [2, 3, 8, 12])
def test_samples_show_their_levels_and_follow_the_model(levels):
    model = CTS(1, 2, levels)
    dark_then_bright = torch.tensor([[[[0, 255]]]], dtype=torch.uint8).expand(200, 1, 1, 2)
    model.absorb(dark_then_bright)
    torch.manual_seed(0)
    samples = model.sample(3000)
    assert samples.shape == (3000, 1, 1, 2)
    assert samples.dtype == torch.uint8
    frequency = (model.quantise(samples).view(-1, 2) == torch.tensor([0, levels - 1])).all(1).double().mean()
    assert float(frequency) == pytest.approx(float(model.log_prob(dark_then_bright[:1]).exp()), abs=0.02)


def test_samples_draw_from_the_joint_distribution():
    model = CTS(2, 2, 2)
    model.absorb(moving_squares(60, 2, 2, seed=5))
    frames = torch.tensor(list(itertools.product((0, 255), repeat=4)), dtype=torch.uint8).view(-1, 1, 2, 2)
    torch.manual_seed(1)
    samples = model.quantise(model.sample(40_000)).view(-1, 4).long()
    counts = torch.bincount(samples @ torch.tensor([8, 4, 2, 1]), minlength=16).double()
    expected = model.log_prob(frames).exp() * 40_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 37.7  # the 0.999 quantile of chi-square with 15 degrees of freedom


def test_resumes_bit_for_bit():
    frames = moving_squares(60, 12, 9)
    model, resumed = CTS(12, 9), CTS(12, 9)
    model.absorb(frames[:30])
    resumed.absorb(frames[40:])  # what it knew before is forgotten
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    first, second = model.absorb(frames[30:]), resumed.absorb(frames[30:])
    assert torch.equal(first.before, second.before)
    assert torch.equal(first.after, second.after)


def test_a_state_of_another_shape_is_refused():
    model = CTS(6, 6, 8)
    model.absorb(moving_squares(10, 6, 6))
    for other in (CTS(6, 6, 4), CTS(5, 6, 8), CTS(7, 6, 8)):
        with pytest.raises(UserError, match="checkpoint"):
            other.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"levels": 1}, r"levels must lie in 2\.\.256, got 1"),
        ({"levels": 257}, r"levels must lie in 2\.\.256, got 257"),
        ({"height": 0}, "height and width"),
        ({"obs_shape": (3, 42, 42)}, "grey"),
        ({"levels": 256}, r"take [\d,]+ bytes"),
    ],
)
def test_wrong_knobs_are_refused(knobs, words):
    with pytest.raises(UserError, match=words):
        CTS(**knobs)


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 1, 41, 42, dtype=torch.uint8), torch.zeros(1, 42, 42, dtype=torch.uint8), torch.zeros(1, 1, 42, 42)]
)
def test_frames_of_another_size_or_dtype_are_refused(frames):
    for method in (CTS().absorb, CTS().log_prob):
        with pytest.raises(UserError, match="takes uint8 frames"):
            method(frames)


def test_does_the_jobs_of_a_density():
    model = CTS(obs_shape=(1, 10, 12), num_actions=6, device=torch.device("cpu"))
    assert model.obs_shape == (1, 10, 12)
    assert isinstance(model, Density)
    assert isinstance(model, Sampler)
    assert model.exact


CUDA_SIMULATION = """
import torch
import numpy as np
from generative.cts import CTS
from generative import cts_cuda
from tests.generative.test_cts import moving_squares
frames = moving_squares(6, 5, 7)
host, device = CTS(5, 7, 4), CTS(5, 7, 4)
counts, inner = device._counts.numpy(), device._inner.numpy()
for part in frames.split(4):
    shown = device.quantise(part).numpy()
    before, after = np.empty((2, len(part), 35))
    cts_cuda.absorb_pixels[1, 64](counts, inner, shown, device.updates, before, after)
    device.updates += len(part)
    recoding = host.absorb(part)
    assert np.allclose(before.sum(1), recoding.before.numpy(), rtol=0, atol=1e-10)
    assert np.allclose(after.sum(1), recoding.after.numpy(), rtol=0, atol=1e-10)
assert np.array_equal(counts, host._counts.numpy())
assert np.allclose(inner, host._inner.numpy(), rtol=1e-13, atol=0)
shown = host.quantise(frames).numpy()
nats = np.empty((6, 35))
cts_cuda.predict_pixels[4, 64](counts, inner, shown, nats)
assert np.allclose(nats.sum(1), host.log_prob(frames).numpy(), rtol=0, atol=1e-10)
torch.manual_seed(0)
expected = host.quantise(host.sample(2)).numpy()
torch.manual_seed(0)
drawn, uniform = np.zeros((2, 5, 7), np.uint8), torch.rand(2, 5, 7, dtype=torch.float64).numpy()
cts_cuda.sample_frames[1, 64](counts, inner, drawn, uniform)
assert np.array_equal(drawn, expected)
print("equal")
"""


def test_the_cuda_kernels_do_the_same_in_the_simulator():
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CUDA_SIMULATION], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_the_host():
    frames = moving_squares(64, 42, 42)
    host, device = CTS(), CTS(device="cuda")
    for part in frames.split(16):
        expected, got = host.absorb(part), device.absorb(part.cuda())
        assert got.before.cpu().allclose(expected.before, rtol=0, atol=1e-8)
        assert got.after.cpu().allclose(expected.after, rtol=0, atol=1e-8)
    assert device.log_prob(frames.cuda()).cpu().allclose(host.log_prob(frames), rtol=0, atol=1e-8)
    assert device.sample(4).shape == (4, 1, 42, 42)


@njit
def log_space_pair(first, second, nats):
    """Nats of the second of two binary pixels, given the first on its left, by a log-space tree; the other contexts are constant."""
    own = np.zeros((2, 5, 2))  # left context, node of the path (0 is the root, which both share), level
    weight = np.full((2, 4, 2), math.log(0.5))
    logs = np.empty(5)
    for t in range(first.shape[0]):
        left, level, rate = first[t], second[t], 1.0 / (t + 2.0)
        for depth in range(5):
            branch = left if depth else 0
            seen = own[branch, depth]
            logs[depth] = math.log((seen[level] + 0.5) / (seen[0] + seen[1] + 1.0))
            seen[level] += 1.0
        below = logs[4]
        for depth in range(3, -1, -1):
            pair = weight[left if depth else 0, depth]
            stay, split = pair[0] + logs[depth], pair[1] + below
            high = max(stay, split)
            mixed = high + math.log(math.exp(stay - high) + math.exp(split - high))
            keep, change = math.log1p(-rate), math.log(rate)
            for side, (mine, other) in enumerate(((stay, split), (split, stay))):
                high = max(keep + mine, change + other)
                pair[side] = high + math.log(math.exp(keep + mine - high) + math.exp(change + other - high)) - mixed
            below = mixed
        nats[t] = below


@pytest.mark.slow
def test_ten_million_updates_keep_their_precision():
    """The right pixel copies the left one for six million frames, then ignores it, then copies it again: weights run to both ends."""
    count = 10_000_000
    random = np.random.default_rng(0)
    first = (random.random(count) < 0.7).astype(np.int64)
    second = np.where(random.random(count) < 0.999, first, 1 - first)
    second[6_000_000:8_000_000] = random.random(2_000_000) < 0.4
    expected = np.empty(count)
    log_space_pair(first, second, expected)
    both, alone = CTS(1, 2, 2), CTS(1, 1, 2)
    frames = torch.from_numpy((np.stack([first, second], 1) * 255).astype(np.uint8)).view(-1, 1, 1, 2)
    worst = 0.0
    for begin in range(0, count, 100_000):
        part = frames[begin : begin + 100_000]
        nats = (both.absorb(part).before - alone.absorb(part[..., :1]).before).numpy()
        worst = max(worst, float(np.abs(nats - expected[begin : begin + 100_000]).max()))
    assert both.updates == count
    assert worst < 1e-6
