"""Grey levels: the cut at every pixel and number of levels, refusals in one line, padding left out of losses, loading all or nothing."""

import math

import pytest
import torch
from torch import nn

from envs.api import UserError
from generative.api import Clip
from generative.data import image_clip
from generative.grey_levels import clip_losses, grey_shape, load_whole, quantise, to_frames

ALL_PIXELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def test_quantise_is_pixel_times_levels_over_256_rounded_down():
    for levels in (2, 3, 8, 200, 256):
        got = quantise(ALL_PIXELS, levels, (1, 16, 16), "it").flatten().tolist()
        assert got == [math.floor(pixel * levels / 256) for pixel in range(256)]


def test_to_frames_is_undone_by_quantise_at_every_level_of_every_number_of_levels():
    for levels in range(2, 257):
        shown = torch.arange(levels).view(1, 1, levels)
        frames = to_frames(shown, levels)
        assert frames.dtype == torch.uint8
        assert frames.shape == (1, 1, 1, levels)
        assert torch.equal(quantise(frames, levels, (1, 1, levels), "it").long(), shown)
        assert (frames[0, 0, 0, 0], frames[0, 0, 0, -1]) == (0, 255)


@pytest.mark.parametrize("levels", [-1, 0, 1, 257])
def test_levels_outside_2_to_256_are_refused(levels):
    with pytest.raises(UserError) as error:
        grey_shape((1, 42, 42), levels, "it")
    assert str(error.value) == f"levels must lie in 2..256, got {levels}"


@pytest.mark.parametrize("shape", [(3, 42, 42), (1, 0, 42), (1, 42, 0)])
def test_frames_that_are_not_grey_are_refused(shape):
    with pytest.raises(UserError, match=r"it models grey frames \(1, H, W\), got frames of \(.*\)$"):
        grey_shape(shape, 8, "it")


@pytest.mark.parametrize("frames", [torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 4, 5).byte(), torch.zeros(2, 5, 4).byte()])
def test_frames_of_another_shape_or_dtype_are_refused(frames):
    with pytest.raises(UserError, match=r"^it takes uint8 frames \(B, 1, 5, 4\), got torch\.\w+ \([\d, ]+\)$"):
        quantise(frames, 8, (1, 5, 4), "it")


def test_losses_are_the_mean_over_frames_that_are_not_padding():
    frames = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 1, 2, 2)
    last = torch.tensor([[True, False], [False, False]])  # the first row's third frame is padding
    clip = Clip(frames, torch.zeros(2, 2).long(), torch.zeros(2, 2), torch.ones(2, 2), last)
    ((player, loss, metrics),) = clip_losses("it", lambda frames: -frames[:, 0, 0, 0].double(), clip)
    mean = (1 + 2 + 4 + 5 + 6) / 5
    assert player == "it"
    assert float(loss) == pytest.approx(mean / 4)
    assert float(metrics["nats"]) == pytest.approx(-mean)
    assert float(metrics["bits_per_dim"]) == pytest.approx(mean / 4 / math.log(2))


def test_losses_of_single_frames():
    ((_, loss, _),) = clip_losses("it", lambda frames: -torch.ones(len(frames)).double() * 8, image_clip(torch.zeros(3, 1, 2, 2).byte()))
    assert float(loss) == 2.0


def test_loading_another_shape_changes_nothing():
    model, other, deeper = nn.Linear(2, 3), nn.Linear(2, 4), nn.Sequential(nn.Linear(2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for stranger, words in ((other, r"weight is \(4, 2\) there and \(3, 2\) here"), (deeper, r"weight is missing there and \(3, 2\) here")):
        with pytest.raises(
            UserError, match=rf"^the checkpoint's it is of another shape \({words}\): set its knobs and frames as they were$"
        ):
            load_whole(model, stranger.state_dict(), "it")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    same = nn.Linear(2, 3)
    load_whole(model, same.state_dict(), "it")
    assert torch.equal(model.weight, same.weight)
