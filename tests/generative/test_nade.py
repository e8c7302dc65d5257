"""NADE: a loop written out, mass one in both forms, the estimate of the order-agnostic loss, samples, online steps, resume, refusals."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from envs.api import UserError
from generative.api import Density, Model, Sampler, Trainable
from generative.data import FrameMemory, image_clip
from generative.fit import Fitter, NonFiniteLoss
from generative.grey_levels import to_frames
from generative.nade import NADE

FORMS = {
    "fixed": {},
    "deep": {"layers": 3},
    "agnostic": {"order_agnostic": True},
    "mixture": {"order_agnostic": True, "orderings": 3, "layers": 2},
}
forms = pytest.mark.parametrize("form", sorted(FORMS))


def make(form, shape=(1, 4, 5), **knobs):
    return NADE(shape, 4, "cpu", **({"hidden": 12} | FORMS[form] | knobs))


def frames_of(shape, count=3, levels=256):
    return to_frames(torch.randint(0, levels, (count, *shape[1:])), levels)


def every_frame(height, width, levels):
    return to_frames(torch.tensor(list(itertools.product(range(levels), repeat=height * width))).view(-1, height, width), levels)


def by_loop(model, pixels, order):
    """log p of levels (D) in an order, pixel by pixel, from scratch each time, in float64."""
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    activation = torch.relu if model.order_agnostic else torch.sigmoid
    total = 0.0
    for place, pixel in enumerate(order):
        hidden = weights["first_bias"].clone()
        for earlier in order[:place]:
            hidden += weights["into"][earlier * model.levels + pixels[earlier]]
        hidden = activation(hidden)
        for layer in range(len(model.between)):
            hidden = activation(weights[f"between.{layer}.weight"] @ hidden + weights[f"between.{layer}.bias"])
        logits = weights["out"][pixel] @ hidden + weights["bias"][pixel]
        total += float(torch.log_softmax(logits, 0)[pixels[pixel]])
    return total


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in (*first, *second))


@pytest.mark.parametrize("shape", [(1, 42, 42), (1, 10, 5), (1, 1, 3), (1, 1, 1)])
@forms
def test_every_job_at_every_shape(form, shape):
    model, frames = make(form, shape), frames_of(shape)
    assert all(isinstance(model, job) for job in (Model, Density, Trainable, Sampler))
    assert (model.exact, model.updates_per_frame, model.obs_shape) == (True, 1.0, shape)
    nats = model.log_prob(frames)
    assert (nats.dtype, tuple(nats.shape), nats.requires_grad) == (torch.float64, (3,), False)
    for part in model.absorb(frames):
        assert (part.dtype, tuple(part.shape), part.requires_grad) == (torch.float64, (3,), False)
    if math.prod(shape) < 100:
        samples = model.sample(2)
        assert (samples.dtype, tuple(samples.shape)) == (torch.uint8, (2, *shape))


@pytest.mark.parametrize(("height", "width", "levels"), [(3, 3, 2), (2, 3, 3), (1, 4, 5)])
@forms
def test_probabilities_of_all_frames_sum_to_one(form, height, width, levels):
    model, frames = make(form, (1, height, width), levels=levels), every_frame(height, width, levels)
    assert float(model.log_prob(frames).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    model.absorb(frames[torch.randperm(len(frames))[:40]])
    assert float(model.log_prob(frames).exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("levels", [2, 7])
@forms
def test_it_equals_a_loop_over_pixels(form, levels):
    model, frames = make(form, levels=levels), frames_of((1, 4, 5), 4, levels)
    model.absorb(frames[:2])
    each = [[by_loop(model, pixels, order) for order in model.orders] for pixels in model.quantise(frames).flatten(1).long()]
    expected = torch.logsumexp(torch.tensor(each, dtype=torch.float64), 1) - math.log(len(model.orders))
    assert torch.allclose(model.log_prob(frames), expected, atol=1e-4)
    assert model.orders[0].tolist() == list(range(20))
    assert all(sorted(order.tolist()) == list(range(20)) for order in model.orders)


def test_float32_is_good_for_whole_frames():
    model = make("fixed", (1, 42, 42), hidden=64)
    frames = frames_of((1, 42, 42), 2)
    found, exact = model.log_prob(frames), copy.deepcopy(model).double()
    assert float((found - exact.log_prob(frames)).abs().max()) < 2e-3  # of 3,700 nats


def test_the_loss_of_the_order_agnostic_form_estimates_the_mean_over_all_orders():
    model = make("agnostic", (1, 1, 4), levels=3, layers=2)
    frame = frames_of((1, 1, 4), 1, 3)
    with torch.no_grad():
        model.out.mul_(4.0)
    pixels = model.quantise(frame).flatten().long()
    each = torch.tensor([by_loop(model, pixels, order) for order in itertools.permutations(range(4))])
    assert float(each.std()) > 0.05
    with torch.no_grad():
        draws = model.estimate(model.quantise(frame).expand(200_000, 1, 4))
    error = float(draws.std()) / math.sqrt(len(draws))
    assert error < 0.01
    assert float(draws.mean()) == pytest.approx(float(each.mean()), abs=4 * error)


@forms
def test_each_form_has_its_own_loss(form):
    model, frames = make(form), frames_of((1, 4, 5), 6)
    shown = model.quantise(frames)
    torch.manual_seed(1)
    ((_, loss, _),) = model.losses(image_clip(frames))
    torch.manual_seed(1)
    expected = model.estimate(shown) if model.order_agnostic else model.log_prob(frames)
    assert float(loss.detach()) == pytest.approx(-float(expected.detach().mean()) / 20)


@forms
def test_samples_follow_the_exact_distribution(form):
    model, frames = (
        make(form, (1, 2, 2), levels=2, learning_rate=0.1 if form in ("fixed", "deep") else 0.03, epsilon=1e-4),
        every_frame(2, 2, 2),
    )
    for _ in range(6 if form == "deep" else 2):
        model.absorb(frames[[3, 12, 3, 5]])
    expected = 4_000 * model.log_prob(frames).exp()
    drawn = model.sample(4_000)
    observed = torch.tensor([(drawn == frame).all((1, 2, 3)).sum() for frame in frames])
    assert int(observed.sum()) == 4_000
    likely = expected > 10
    assert likely.sum() >= 6
    assert expected.max() > 5 * expected.min()
    observed, expected = (torch.cat((part[likely], part[~likely].sum().view(1))).double() for part in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1)).sum()
    assert float(statistic) < 30.6  # chi-square, 15 degrees at most: 1 in 100


@forms
def test_gradients_reach_all_parameters(form):
    model = make(form, (1, 4, 4), levels=3)
    ((player, loss, metrics),) = model.losses(image_clip(frames_of((1, 4, 4), 200, 3)))
    loss.backward()
    assert player == "nade"
    assert float(metrics["bits_per_dim"]) == pytest.approx(float(loss.detach()) / math.log(2), rel=1e-6)
    for name, parameter in model.named_parameters():
        reached = parameter.grad != 0
        if name == "into" and not model.order_agnostic:  # nothing comes after the last pixel
            assert not reached[-3:].any()
            reached = reached[:-3]
        assert reached.float().mean() > 0.9, name
    assert sum(parameter.numel() for parameter in model.players()["nade"]) == model.online.square.numel()


@forms
def test_before_and_after_are_the_log_probability_before_and_after(form):
    model, frames = make(form), frames_of((1, 4, 5))
    for frame in frames.split(1):
        before = model.log_prob(frame)
        recoding = model.absorb(frame)
        assert torch.equal(recoding.before, before)
        assert torch.equal(recoding.after, model.log_prob(frame))


@forms
def test_a_repeated_frame_becomes_likelier_and_a_new_one_stands_out(form):
    model, frames = make(form, (1, 6, 6)), frames_of((1, 6, 6), 2, 8)
    gains = []
    for _ in range(150):
        before, after = model.absorb(frames[:1])
        gains.append(float(after - before))
    assert float(after) > -10  # of 75 at first
    assert sum(gain > 0 for gain in gains) > 120
    before, after = model.absorb(frames[1:])
    assert float(after - before) > 5 * sum(gains[-10:]) / 10


@forms
def test_frames_may_share_a_step(form):
    model, frames = make(form, frames_per_update=4), frames_of((1, 4, 5), 10)
    before = model.log_prob(frames[:4])
    recoding = model.absorb(frames)
    assert model.updates_per_frame == 0.25
    assert int(model.online.updates) == 3
    assert torch.allclose(recoding.before[:4], before, atol=1e-4)


@forms
def test_stop_and_resume_is_bit_for_bit(form):
    frames = frames_of((1, 4, 5), 20)
    whole, first, second = make(form), make(form), make(form)
    first.load_state_dict(copy.deepcopy(whole.state_dict()))
    expected = torch.cat([whole.absorb(part).after for part in frames.split(5)])
    found = [first.absorb(part).after for part in frames[:10].split(5)]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += [second.absorb(part).after for part in frames[10:].split(5)]
    assert torch.equal(torch.cat(found), expected)
    assert same(whole.state_dict(), second.state_dict())
    assert {"orders", "online.square", "online.velocity", "online.updates"} < set(whole.state_dict())


@forms
def test_a_loss_that_is_not_finite_leaves_the_last_good_state(form):
    model, frames = make(form), frames_of((1, 4, 5), 3)
    model.absorb(frames)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.bias[3] = math.inf
    start["bias"] = model.bias.detach().clone()
    with pytest.raises(NonFiniteLoss) as error:
        model.absorb(frames)
    assert error.value.player == "nade"
    assert error.value.update == int(start["online.updates"]) + 1
    assert same(model.state_dict(), start)


@forms
def test_the_fitter_fits_it(form):
    frames = frames_of((1, 5, 5), 1, 2).repeat(30, 1, 1, 1)
    model = make(form, (1, 5, 5), levels=2)
    ticks = list(Fitter(model, FrameMemory.from_tensor(frames), batch_size=16, learning_rate=1e-2, updates=80).run())
    bits = [float(tick.metrics["bits_per_dim"]) for tick in ticks]
    assert bits[0] > 0.7
    assert bits[-1] < 0.1
    assert -float(model.log_prob(frames[:1])) / 25 / math.log(2) < 0.1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"levels": 1}, "levels must lie in 2..256, got 1"),
        ({"levels": 257}, "levels must lie in 2..256, got 257"),
        ({"hidden": 0}, "hidden and layers must be at least 1, got 0 and 1"),
        ({"layers": 0}, "hidden and layers must be at least 1, got 12 and 0"),
        ({"orderings": 0}, "orderings must be 1, or at least 1 with order_agnostic=true, got 0"),
        ({"orderings": 2}, "orderings must be 1, or at least 1 with order_agnostic=true, got 2"),
        ({"decay": 1.0}, "decay and momentum lie in [0, 1), got 1.0 and 0.9"),
        ({"frames_per_update": -1}, "frames_per_update must be at least 1, got -1"),
    ],
)
def test_senseless_knobs_are_refused_in_one_line(knobs, words):
    with pytest.raises(UserError) as error:
        make("fixed", **knobs)
    assert str(error.value) == words


@forms
def test_frames_and_checkpoints_of_another_shape_are_refused(form):
    model = make(form)
    for act in (model.log_prob, model.absorb):
        with pytest.raises(UserError, match=r"^a NADE takes uint8 frames \(B, 1, 4, 5\), got torch.uint8 \(2, 1, 5, 4\)$"):
            act(torch.zeros(2, 1, 5, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="the checkpoint's NADE is of another shape"):
        model.load_state_dict(make(form, hidden=13).state_dict())


def test_configuration_builds():
    knobs = dict(OmegaConf.load(Path(__file__).parent.parent.parent / "configs" / "model" / "nade.yaml"))
    assert knobs.pop("_target_") == "generative.nade.NADE"
    assert NADE((1, 42, 42), 4, "cpu", **knobs).out.shape == (1764, 8, 64)


def test_no_frames_at_all():
    for model in (make("fixed"), make("mixture")):
        nothing = torch.zeros(0, 1, 4, 5, dtype=torch.uint8)
        assert len(model.log_prob(nothing)) == len(model.absorb(nothing).before) == len(model.absorb(nothing).after) == 0
