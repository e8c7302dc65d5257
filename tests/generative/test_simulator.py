"""Simulators of frames: the transform by an action, which frames are fed in when, masks, states that are values."""

import copy
import math

import pytest
import torch
from torch import nn

from envs.api import UserError
from generative.api import Clip, Model, Simulator, Trainable
from generative.data import image_clip
from generative.last_frame import LastFrame
from generative.nets import to_pixels
from generative.simulator import FrameSimulator
from generative.simulator_nets import ActionTransform, FrameStack, oh_sizes

SHAPE, ACTIONS, CONTEXT = (2, 6, 5), 3, 3
KINDS = ["feedforward", "recurrent", "local"]


def clip_of(count, batch=2, shape=SHAPE, actions=ACTIONS, seed=0):
    """Random frames, actions, rewards and discounts; nothing ends."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (batch, count, *shape), dtype=torch.uint8, generator=generator)
    taken = torch.randint(0, actions, (batch, count - 1), generator=generator)
    rewards = torch.randint(-2, 3, (batch, count - 1), generator=generator).float()
    discounts = torch.rand(batch, count - 1, generator=generator)
    return Clip(frames, taken, rewards, discounts, torch.zeros(batch, count - 1, dtype=torch.bool))


def chosen(kind):
    return {"encoder": "feedforward", "architecture": "local"} if kind == "local" else {"encoder": kind}


def model_of(kind, shape=SHAPE, seed=0, **knobs):
    """A small model whose every weight counts: those that start at or near 0 are moved away from it."""
    torch.manual_seed(seed)
    model = FrameSimulator(shape, ACTIONS, "cpu", **chosen(kind), **({"context_frames": CONTEXT, "hidden": 16, "factors": 12} | knobs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.02 if kind == "local" else 0.1) * torch.randn_like(parameter))  # `local` is wide and deep
    model.prepare(torch.randint(0, 256, (5, *shape), dtype=torch.uint8))
    return model


def known(clip, count):
    return Clip(clip.frames[:, :count], *(part[:, : count - 1] for part in clip[1:]))


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# the networks


def test_the_transform_is_a_bilinear_form_of_what_was_seen_and_what_is_done():
    torch.manual_seed(0)
    transform = ActionTransform(5, 3, 7, 4).double()
    encode, act, decode = transform.encode_factors.weight, transform.act_factors.weight, transform.decode_factors[0]
    dense = torch.einsum("of,fi,af->oia", decode.weight, encode, act)
    features, actions = torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = torch.einsum("oia,bi,ba->bo", dense, features, nn.functional.one_hot(actions, 3).double()) + decode.bias
    torch.testing.assert_close(transform(features, actions), expected)
    assert not torch.equal(expected[0], transform(features[:1], actions[1:2])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_without_actions_ignores_them_exactly_and_the_other_does_not(kind):
    clip = clip_of(CONTEXT + 2)
    for action, same in (("none", True), ("multiplicative", False)):
        model = model_of(kind, action=action)
        state = model.start(clip)
        (one, *seen), (other, *also_seen) = (model.step(state, torch.full((2,), taken)) for taken in (0, 1))
        for left, right in zip([*one, *seen], [*other, *also_seen], strict=True):
            assert torch.equal(left, right) == same


def test_paper_networks_are_section_3():
    torch.manual_seed(0)
    model = FrameSimulator((3, 210, 160), 6, "cpu", architecture="paper", hidden=2048, factors=2048)
    assert oh_sizes(210, 160)[-1] == (11, 8)
    convolutions = [layer for layer in model.memory.network if isinstance(layer, nn.Conv2d)]
    mirrored = [layer for layer in model.decoder if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.in_channels for layer in convolutions] == [12, 64, 128, 128]
    for layers in (convolutions, mirrored[::-1]):
        assert [layer.kernel_size for layer in layers] == [(8, 8), (6, 6), (6, 6), (4, 4)]
        assert [layer.padding for layer in layers] == [(0, 1), (1, 1), (1, 1), (0, 0)]
        assert all(layer.stride == (2, 2) for layer in layers)
    assert [layer.out_channels for layer in mirrored] == [128, 128, 128, 3]
    assert all(layer.output_padding == (0, 0) for layer in mirrored)
    with torch.no_grad():
        maps = torch.zeros(1, 12, 210, 160)
        for layer in model.memory.network[:8]:
            maps = layer(maps)
        assert maps.shape == (1, 128, 11, 8)
        assert model.decoder(torch.zeros(1, 2048)).shape == (1, 3, 210, 160)
    assert isinstance(model.memory.network[-1], nn.ReLU)
    assert isinstance(model.decoder[-1], nn.ConvTranspose2d)  # what comes out is linear
    transform = model.transform
    for weight, bound in ((transform.encode_factors.weight, 1.0), (transform.act_factors.weight, 0.1)):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    encoder = 12 * 64 * 64 + 64 + 64 * 128 * 36 + 128 + 128 * 128 * 36 + 128 + 128 * 128 * 16 + 128 + 11264 * 2048 + 2048
    factors = 2048 * 2048 + 6 * 2048 + 2048 * 2048 + 2048
    decoder = 2048 * 11264 + 11264 + 128 * 128 * 16 + 128 + 2 * (128 * 128 * 36 + 128) + 128 * 3 * 64 + 3
    heads = 2048 * 256 + 256 + 256 * 81 + 81 + 256 + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == encoder + factors + decoder + heads


def test_the_recurrent_paper_network_adds_an_lstm_of_2048():
    with torch.device("meta"):
        models = [
            FrameSimulator((3, 210, 160), 6, "meta", encoder=encoder, architecture="paper", hidden=2048, factors=2048, action=action)
            for encoder, action in (("feedforward", "multiplicative"), ("recurrent", "multiplicative"), ("feedforward", "none"))
        ]
    stacked, recurrent, blind = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    assert [model.context_frames for model in models] == [4, 11, 4]
    assert recurrent - stacked == 4 * 2048 * (2048 + 2048 + 2) - 9 * 64 * 64
    assert stacked - blind == 2048 * 2048 + 6 * 2048
    lstm = FrameSimulator((1, 6, 5), 2, "cpu", encoder="recurrent", hidden=64).memory.lstm
    assert 0.079 < lstm.weight_hh_l0.abs().max() <= 0.08
    assert 0.079 < lstm.weight_ih_l0.abs().max() <= 0.08
    assert lstm.bias_ih_l0.eq(0).all()
    assert lstm.bias_hh_l0.eq(0).all()


@pytest.mark.parametrize(
    ("shape", "architecture"),
    [([3, 64, 64], "small"), ((1, 84, 84), "small"), ((1, 10, 5), "small"), ((2, 33, 47), "small"), ((1, 84, 84), "paper")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_frame_starts_and_steps(shape, architecture, kind):
    model = FrameSimulator(shape, 4, "cpu", **({"architecture": architecture} | chosen(kind)), hidden=32, factors=32)
    assert all(isinstance(model, job) for job in (Model, Trainable, Simulator))
    state = model.start(image_clip(torch.zeros(3, *shape, dtype=torch.uint8)))
    for _ in range(2):
        state, frame, reward, discount = model.step(state, torch.tensor([0, 1, 3]))
    assert (frame.dtype, tuple(frame.shape)) == (torch.uint8, (3, *shape))
    assert reward.dtype == discount.dtype == torch.float32
    assert reward.shape == discount.shape == (3,)
    assert ((discount >= 0) & (discount <= 1)).all()
    assert all(len(part) == 3 and part.dtype == torch.float32 and not part.requires_grad for part in state)


def test_small_is_small():
    for kind in KINDS:
        model = FrameSimulator((3, 64, 64), 18, "cpu", **chosen(kind))
        assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6


@pytest.mark.parametrize(
    ("knob", "told"),
    [
        ({"encoder": "transformer"}, "feedforward, recurrent"),
        ({"architecture": "huge"}, "small, local, paper"),
        ({"architecture": "local", "encoder": "recurrent"}, "local takes encoder=feedforward"),
        ({"action": "additive"}, "multiplicative, none"),
        ({"context_frames": -1}, "context_frames must be"),
        ({"hidden": 0}, "hidden must be"),
        ({"factors": 0}, "factors must be"),
        ({"reward_cost": -1.0}, "reward_cost must be"),
        ({"discount_cost": math.nan}, "discount_cost must be"),
        ({"architecture": "paper"}, "10x5 are too small"),
    ],
)
def test_senseless_knobs_are_refused_by_name(knob, told):
    with pytest.raises(UserError, match=told):
        FrameSimulator((1, 10, 5), 4, "cpu", **knob)


# what is fed in when


def slow_loss(model, clip, horizon):
    """The loss, one position after another, each from all the frames before it: true ones, or the predictions that stand for them."""
    frames = clip.frames.float() / 255 - model.mean_image
    predicted, terms = {}, []
    for position in range(CONTEXT, frames.shape[1]):
        if isinstance(model.memory, FrameStack):
            restart = position - (position - CONTEXT) % horizon
            seen = [frames[:, at] if at < restart else predicted[at] for at in range(position - CONTEXT, position)]
            features = model.memory.network(torch.cat(seen, 1))
        else:
            seen = [frames[:, at] if at < CONTEXT or (at + 1 - CONTEXT) % horizon == 0 else predicted[at] for at in range(position)]
            features = model.memory.lstm(torch.stack([model.memory.network(image) for image in seen]))[0][-1]
        if model.local is not None:
            predicted[position], hidden = model.local(features, clip.actions[:, position - 1])
        else:
            hidden = model.transform(features, clip.actions[:, position - 1])
            predicted[position] = model.decoder(hidden) + (seen[-1] if model.residual else 0)
        outcome = model.outcome(hidden)
        squares = (predicted[position] - frames[:, position]).square().flatten(1).mean(1)
        reward = model.reward_head.loss(model.reward_head(outcome), clip.rewards[:, position - 1])
        discount = model.discount_head.loss(model.discount_head(outcome), clip.discounts[:, position - 1])
        terms.append(squares + model.reward_cost * reward + model.discount_cost * discount)
    return torch.stack(terms).mean(), predicted


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_true_frames_and_predictions_are_fed_in_where_they_should(kind, residual, horizon):
    """Seven predictions: with a horizon of 3 or 5 the last stretch is cut short."""
    model, clip = model_of(kind, residual=residual, reward_cost=0.3, discount_cost=0.7), clip_of(CONTEXT + 7)
    expected, predicted = slow_loss(model, clip, horizon)
    slow = gradients_of(model, expected)
    model.horizon = horizon
    images, _, positions = model.predict(clip)
    assert sorted(positions) == list(range(CONTEXT, CONTEXT + 7))
    for image, position in zip(images, positions):
        torch.testing.assert_close(image, predicted[position])
    ((player, loss, _),) = model.losses(clip)
    assert player == "simulator"
    torch.testing.assert_close(loss, expected)
    fast = gradients_of(model, loss)
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)
        assert gradient.abs().max() > 0, name
    assert {id(parameter) for parameter in model.players()["simulator"]} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_start_are_the_predictions_that_are_fed_back(kind, residual):
    model, clip = model_of(kind, residual=residual), clip_of(CONTEXT + 6)
    model.horizon = 6
    images, hidden, positions = model.predict(clip)
    assert positions == list(range(CONTEXT, CONTEXT + 6))
    outcome = model.outcome(hidden)
    rewards, discounts = model.reward_head.mean(model.reward_head(outcome)), model.discount_head.mean(model.discount_head(outcome))
    state = model.start(known(clip, CONTEXT))
    for depth, position in enumerate(positions):
        state, frame, reward, discount = model.step(state, clip.actions[:, position - 1])
        assert (frame.int() - to_pixels(images[depth] + model.mean_image).int()).abs().max() <= 1  # the last bits may differ
        torch.testing.assert_close(reward, rewards[depth], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(discount, discounts[depth], rtol=1e-4, atol=1e-4)
    assert images.std() > 0.1


def test_clips_that_are_too_short_are_refused():
    model = model_of("feedforward")
    model.horizon = 3
    next(model.losses(clip_of(CONTEXT + 3)))
    with pytest.raises(UserError, match="clip of 5 frames is too short: 3 are known and 3 predicted, so 6 are needed"):
        next(model.losses(clip_of(CONTEXT + 2)))


# what counts


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_loss_nor_gradient_but_the_end_of_an_episode_counts(kind, horizon):
    """Row 0 goes on, row 1 ends at transition 3: of its frames 3, 4, 5, 6 and 7 the first two count, the rest is padding."""
    model, clip = model_of(kind), clip_of(CONTEXT + 5)
    model.horizon = horizon
    clip.last[1, 3] = True

    def loss_and_gradients(clip):
        ((_, loss, metrics),) = model.losses(clip)
        return loss, gradients_of(model, loss), metrics

    loss, gradients, metrics = loss_and_gradients(clip)
    other = Clip(*(part.clone() for part in clip))
    other.frames[1, 5:], other.actions[1, 4:], other.rewards[1, 4:], other.discounts[1, 4:], other.last[1, 5] = 255, 0, 1e4, 0.5, True
    scribbled, theirs, _ = loss_and_gradients(other)
    assert torch.equal(loss, scribbled)
    assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)
    other.frames[1, 4] = 255 - other.frames[1, 4]
    assert loss_and_gradients(other)[2]["squared_error"] != metrics["squared_error"]
    other.discounts[1, 3] = 1 - other.discounts[1, 3]
    assert loss_and_gradients(other)[2]["discount_loss"] != metrics["discount_loss"]
    images, _, positions = model.predict(clip)
    errors = (images - (clip.frames[:, positions].transpose(0, 1) / 255 - model.mean_image)).square().flatten(2).mean(2)
    count = torch.tensor([[1.0, position <= 4] for position in positions])
    torch.testing.assert_close(metrics["squared_error"], (errors * count).sum() / 7)


def test_the_loss_adds_what_the_heads_lose_by_hand():
    """Heads at their start: an even softmax over 81 bins, ln 81 nats for every reward, and a logit of 4 for going on."""
    clip = clip_of(CONTEXT + 1)
    clip.discounts[:] = torch.tensor([1.0, 0.0])[:, None]
    torch.manual_seed(0)
    model = FrameSimulator(SHAPE, ACTIONS, "cpu", context_frames=CONTEXT, reward_cost=0.5, discount_cost=0.25)
    ((_, loss, metrics),) = model.losses(clip)
    assert metrics["reward_loss"].item() == pytest.approx(math.log(81), rel=1e-5)
    goes_on, ends = math.log1p(math.exp(-4)), math.log1p(math.exp(4))
    assert metrics["discount_loss"].item() == pytest.approx((goes_on + ends) / 2, rel=1e-5)
    expected = metrics["squared_error"] + 0.5 * math.log(81) + 0.25 * (goes_on + ends) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_mean_image_is_taken_off_and_put_back():
    model = FrameSimulator((1, 4, 4), 2, "cpu", context_frames=1, hidden=8, factors=8, residual=False)
    frames = torch.randint(0, 256, (7, 1, 4, 4), dtype=torch.uint8)
    assert model.mean_image.eq(0).all()
    model.prepare(frames)
    torch.testing.assert_close(model.mean_image, frames.double().mean(0).div(255).float())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    mean = to_pixels(model.mean_image[None])
    _, frame, _, _ = model.step(model.start(image_clip(frames)), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(frame, mean.expand(7, -1, -1, -1))
    ((_, _, metrics),) = model.losses(Clip(frames[None], *(torch.zeros(1, 6, dtype=kind) for kind in (torch.int64, *3 * [torch.float32]))))
    torch.testing.assert_close(metrics["squared_error"], (frames[1:] / 255 - model.mean_image).square().mean())


# the state is a value


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_frame_is_repeated_where_fewer_are_known_and_only_the_last_count(kind, residual):
    model, clip = model_of(kind, residual=residual), clip_of(CONTEXT + 2)
    for count in (1, 2):
        short = known(clip, count)
        frames = torch.cat([short.frames[:, :1]] * (CONTEXT - count) + [short.frames], 1)
        full = clip._replace(frames=frames)
        assert all(torch.equal(left, right) for left, right in zip(model.start(short), model.start(full), strict=True))
    later = clip._replace(frames=clip.frames[:, -CONTEXT:])
    assert all(torch.equal(left, right) for left, right in zip(model.start(clip), model.start(later), strict=True))
    assert not torch.equal(model.start(clip)[0], model.start(known(clip, 2))[0])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_a_state_are_independent_and_leave_it_as_it_was(kind, residual):
    model, clip = model_of(kind, residual=residual), clip_of(CONTEXT)
    state = model.start(clip)
    kept = tuple(part.clone() for part in state)
    first, second = (torch.full((2,), action) for action in (0, 1))

    def walk(state, action):
        results = []
        for _ in range(3):
            state, *seen = model.step(state, action)
            results += [*state, *seen]
        return results

    (left, *_), (right, *_) = model.step(state, first), model.step(state, second)
    branches = walk(left, second), walk(right, first)
    assert all(torch.equal(part, old) for part, old in zip(state, kept, strict=True))
    for opening, action, branch in ((first, second, branches[0]), (second, first, branches[1])):
        alone, *_ = model.step(model.start(clip), opening)
        assert all(torch.equal(one, other) for one, other in zip(walk(alone, action), branch, strict=True))
    assert not torch.equal(branches[0][-3], branches[1][-3])


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_round_with_the_mean_image(kind):
    model, other = model_of(kind), model_of(kind, seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.mean_image, model.mean_image)
    clip, action = clip_of(CONTEXT), torch.tensor([0, 2])
    (_, frame, *_), (_, same, *_) = (each.step(each.start(clip), action) for each in (model, other))
    assert torch.equal(frame, same)


PAPER = {"architecture": "paper", "shape": (1, 52, 52)}


@pytest.mark.parametrize(("kind", "knobs"), [*((kind, {}) for kind in KINDS), ("feedforward", PAPER), ("recurrent", PAPER)])
def test_bfloat16_autocast_is_near_float32(kind, knobs):
    model, clip = model_of(kind, **knobs), clip_of(CONTEXT + 2, shape=knobs.get("shape", SHAPE))
    for horizon in (1, 2):
        model.horizon = horizon
        ((_, exact, _),) = model.losses(clip)
        with torch.autocast("cpu", torch.bfloat16):
            ((_, loss, _),) = model.losses(clip)
            images, _, _ = model.predict(clip)
            state = model.start(clip)
            state, frame, reward, _ = model.step(state, torch.tensor([0, 1]))
        assert loss.dtype == images.dtype == reward.dtype == torch.float32
        assert all(part.dtype == torch.float32 for part in state)
        assert frame.dtype == torch.uint8
        assert loss.item() == pytest.approx(exact.item(), rel=0.05)
        assert all(gradient.isfinite().all() for gradient in gradients_of(model, loss).values())


def test_the_last_frame_stays():
    model, clip = LastFrame(list(SHAPE), ACTIONS, "cpu"), clip_of(4)
    assert isinstance(model, Simulator)
    assert not isinstance(model, Trainable)
    assert (model.obs_shape, model.context_frames, len(model.state_dict())) == (SHAPE, 1, 0)
    model.load_state_dict(model.state_dict())
    state = model.start(clip)
    for _ in range(2):
        state, frame, reward, discount = model.step(state, torch.tensor([0, 1]))
        assert torch.equal(frame, clip.frames[:, -1])
        assert (reward.tolist(), discount.tolist()) == ([0.0, 0.0], [1.0, 1.0])
