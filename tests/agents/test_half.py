"""Half-precision layers against torch's float32 ones, and a torso of them against the torso that it is made of."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numba import get_num_threads
from torch.nn import functional

from agents.half import HalfConvolution, HalfDense, HalfTorso, _scale, half_layers, pixels
from agents.nets import patches, torso

ROOT = Path(__file__).parents[2]
SHAPES = [  # channels, outputs, kernel, stride, size: those of the Nature network, and one whose tiles overlap
    (64, 32, 2, 1, (21, 21)),
    (32, 64, 4, 2, (20, 20)),
    (64, 64, 3, 1, (9, 9)),
    (64, 64, 2, 1, (4, 18)),
]
ROUNDING = 2e-3  # relative; float32 sums of products of bfloat16 numbers are off by 2e-3 to 3e-3


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def layer(shape, count=3):
    """A layer, its input half (B, H, W, C) with zeros in it, weights and biases that halves hold exactly."""
    channels, outputs, kernel, _, size = shape
    torch.manual_seed(sum(shape[:4]))
    images = torch.randn(count, *size, channels).relu().half()
    weight = (torch.randn(outputs, channels, kernel, kernel) / (channels * kernel * kernel) ** 0.5).half().float()
    return HalfConvolution(*shape), images, weight, torch.randn(outputs)


def channels_first(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_and_its_gradients_equal_those_of_float32(shape):
    made, images, weight, bias = layer(shape)
    before, stride = channels_first(images), shape[3]
    expected = functional.conv2d(before, weight, bias, stride).relu()
    out = made.forward(images, made.packed(weight), bias)
    assert error(channels_first(out), expected) < ROUNDING

    whole, inside = made.slopes(len(images))
    inside.copy_(torch.randn(inside.shape) * (out > 0))
    slopes = channels_first(inside)
    of_weight, of_bias = made.backward_weight(inside, images, 0.25)
    assert error(of_weight, 0.25 * torch.nn.grad.conv2d_weight(before, weight.shape, slopes, stride)) < ROUNDING
    assert error(of_bias, 0.25 * slopes.sum((0, 2, 3))) < ROUNDING

    below = torch.full((len(images), shape[4][0] + 2, shape[4][1] + 4, shape[0]), 7.0, dtype=torch.float16)
    view = below[:, 1:-1, 2:-2]
    made.backward_images(whole, made.turned(weight), images, view)
    assert error(channels_first(view), torch.nn.grad.conv2d_input(before.shape, weight, slopes, stride) * (before > 0)) < ROUNDING
    assert float(below.double().sum() - view.double().sum()) == pytest.approx(
        7.0 * (below.numel() - view.numel())
    )  # the rest was left alone


@pytest.mark.parametrize("count", [3, 5, 10, 130, 300])
def test_dense_layer_and_its_gradients_equal_those_of_float32(count):
    torch.manual_seed(count)
    made, high, wide, channels = HalfDense(3 * 2 * 64, 128), 3, 2, 64
    images = torch.randn(count, high, wide, channels).relu().half()
    weight, bias = torch.randn(128, 384).div(20).half().float(), torch.randn(128)
    out = made.forward(images.flatten(1), made.packed(weight), bias)
    assert error(out, functional.linear(images.flatten(1).float(), weight, bias).relu()) < ROUNDING
    slopes = torch.randn(count, 128).half()
    expected = slopes.float().t() @ images.flatten(1).float()
    found = made.backward_weight(slopes, images.flatten(1), 0.5)
    assert error(found, 0.5 * expected) < ROUNDING
    assert found.t().is_contiguous()
    below = torch.full((count, high + 2, wide + 2, channels), 7.0, dtype=torch.float16)
    view = below[:, 1:-1, 1:-1]
    made.backward_images(slopes, made.packed(weight), images, view)
    assert error(view.flatten(1), (slopes.float() @ weight) * (images.flatten(1) > 0)) < ROUNDING
    assert float(below.double().sum() - view.double().sum()) == pytest.approx(7.0 * (below.numel() - view.numel()))


@pytest.mark.parametrize(
    "shape",
    [(16, 32, 2, 1, (9, 9)), (32, 96, 2, 1, (9, 9)), (32, 32, 3, 2, (9, 9)), (32, 32, 4, 2, (9, 10)), (32, 32, 3, 1, (2, 9))],
    ids=str,
)
def test_what_has_no_kernel_is_refused(shape):
    assert not HalfConvolution.fits(*shape)


@pytest.mark.parametrize(("stack", "channels", "high", "wide"), [(4, 1, 84, 84), (1, 2, 9, 10), (2, 3, 8, 4)])
def test_pixels_are_exact(stack, channels, high, wide):
    frames = torch.randint(0, 256, (3, stack, channels, high, wide), dtype=torch.uint8)
    expected = patches(frames, 4).permute(0, 2, 3, 1).float() / 256
    assert torch.equal(pixels(frames).float(), expected)
    assert torch.equal(pixels(frames.flip(0).flip(0)), pixels(frames))


def pair(obs_shape=(1, 84, 84), stack=4):
    torch.manual_seed(1)
    plain = torso(obs_shape, stack)
    for parameter in plain.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # biases, too
    return plain, HalfTorso(copy.deepcopy(plain), obs_shape)


def pictures(count: int) -> torch.Tensor:
    """Smooth frames uint8 (count, 4, 1, 84, 84)."""
    coarse = torch.randint(0, 256, (count, 4, 1, 7, 7)).float()
    return functional.interpolate(coarse.flatten(0, 1), (84, 84), mode="bilinear").view(count, 4, 1, 84, 84).to(torch.uint8)


def test_torso_and_its_gradient_stay_closer_to_float32_than_bfloat16():
    """Units next to 0 round to either side of it, so gradients differ by more than rounding."""
    plain, halved = pair()
    rough, frames, weights = copy.deepcopy(plain).bfloat16(), pictures(9), torch.randn(9, 512) * 1e-5
    features, gradients = {}, {}
    for name, network in (("plain", plain), ("half", halved), ("bfloat16", rough)):
        out = network(frames)
        gradients[name] = torch.autograd.grad((out.float() * weights).sum(), list(network.parameters()))
        features[name] = out.detach()
    assert features["half"].dtype == torch.float32
    assert error(features["half"], features["plain"]) < 3e-3
    assert error(features["half"], features["plain"]) < error(features["bfloat16"], features["plain"])
    for expected, half, bfloat16 in zip(gradients["plain"], gradients["half"], gradients["bfloat16"]):
        assert half.shape == expected.shape
        assert error(half, expected) < 0.1
        assert error(half, expected) < error(bfloat16, expected)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gradients_of_any_size_neither_vanish_nor_overflow(size):
    plain, halved = pair()
    frames, weights = pictures(5), torch.randn(5, 512)
    found = {}
    for name, network in (("plain", plain), ("half", halved)):
        loss = (network(frames).double() * weights.double()).sum()
        found[name] = torch.autograd.grad(loss * size, list(network.parameters()))
    for expected, half in zip(found["plain"], found["half"]):
        assert error(half.double() / size, expected.double() / size) < 0.15


def test_scale_is_a_power_of_two_below_the_largest_slope():
    assert [_scale(torch.tensor([value, 0.0])) for value in (4.0, -3.9, 1.0, 5.0)] == [0.5, 1.0, 2.0, 0.5]
    assert [_scale(torch.tensor([value])) for value in (0.0, float("inf"), float("nan"))] == [1.0, 1.0, 1.0]


def test_gradients_of_nothing_are_nothing_and_what_is_not_finite_shows():
    _, halved = pair()
    parameters, features = list(halved.parameters()), halved(pictures(5))
    assert all(not gradient.any() for gradient in torch.autograd.grad(features.sum() * 0, parameters, retain_graph=True))
    assert any(not torch.isfinite(gradient).all() for gradient in torch.autograd.grad(features.sum() * torch.nan, parameters))


def test_recalling_what_was_seen_is_looking_again():
    _, halved = pair()
    frames = pictures(5)
    seen = halved.look(frames)
    assert seen["pixels"].shape == (5, 64, 21, 21)
    assert [seen[f"map{number}"].shape for number in (1, 2, 3)] == [(5, 32, 20, 20), (5, 64, 9, 9), (5, 64, 7, 7)]
    assert not seen["features"].requires_grad
    assert torch.equal(halved.recall(seen), halved(frames))
    assert halved.recall(seen).requires_grad


def test_each_stack_is_seen_alike_in_any_company_and_by_any_number_of_threads():
    _, halved = pair()
    frames = pictures(9)
    together = halved.look(frames)["features"]
    assert torch.equal(torch.cat([halved.look(part)["features"] for part in frames.split(2)]), together)
    gradients, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            features = halved(frames)
            gradients.append(torch.autograd.grad(features.square().sum(), list(halved.parameters())))
            assert get_num_threads() == min(count, get_num_threads())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*gradients))


def test_torch_keeps_the_number_of_its_threads():
    """In a process of its own, in which numba has not started yet: its start gives OpenMP as many threads as there are processors."""
    script = """
import torch
torch.set_num_threads(1)
from agents.half import share_threads
share_threads()
print(torch.get_num_threads())
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


def test_new_parameters_are_taken_up_after_refresh():
    _, halved = pair()
    frames = pictures(2)
    before = halved(frames)
    with torch.no_grad():
        halved.torso.convolutions[1].weight.mul_(0.5)
        halved.torso.hidden.weight.mul_(0.5)
    halved.refresh()
    fresh = HalfTorso(copy.deepcopy(halved.torso), (1, 84, 84))
    assert not torch.equal(halved(frames), before)
    assert torch.equal(halved(frames), fresh(frames))


@pytest.mark.parametrize(("obs_shape", "stack", "fits"), [((1, 84, 84), 4, True), ((1, 84, 84), 2, True), ((1, 84, 84), 1, False),
                                                         ((3, 64, 64), 4, False), ((1, 7, 7), 4, False)])  # fmt: skip
def test_torsos_without_kernels_are_told_apart(obs_shape, stack, fits):
    """Of one frame the first layer sees 16 channels; of 64x64 the second layer's windows do not fill the first's picture."""
    assert (half_layers(torso(obs_shape, stack), obs_shape) is not None) == fits
