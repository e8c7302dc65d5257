"""State-space models: what the bound is made of, what is looked at and what is masked, states that are values."""

import copy
import math

import pytest
import torch
from state_space_cases import ACTIONS, CONTEXT, KINDS, PLAIN, SHAPE, clip_of, known, loss_of, model_of
from torch.distributions import Normal

from envs.api import UserError
from generative.api import Model, Simulator, Trainable
from generative.data import image_clip
from generative.nets import to_pixels
from generative.state_space import StateSpace


def slow_terms(model, clip, row, noise, first=0, ends=None):
    """One row, frame by frame from `first` to `ends`: a dict of lists, each from the model's parts and torch.distributions alone."""
    frames = clip.frames[row].float() / 255 - model.mean_image
    memory, latents = torch.zeros(1, *model.body.memory_shape), torch.zeros(1, *model.body.places, model.latents.numbers)
    found = {name: [] for name in ("distortion", "rate", "reward", "discount", "image")}
    for t in range(first, len(frames) if ends is None else ends):
        action = torch.zeros(1, ACTIONS)
        if t > first:
            action[0, clip.actions[row, t - 1]] = 1
        memory = model.body.advance(memory, latents, action)
        p = model.body.prior(memory)
        blind = t >= CONTEXT and (t - CONTEXT + 1) % model.horizon
        q = p if blind else model.body.posterior(memory, model.body.see(frames[t][None]))
        latents = model.latents.draw(q, noise[t, row][None])
        image, told = model.body.draw(memory, latents)
        outcome = model.outcome(told)
        found["image"].append(image[0])
        found["distortion"].append(-Normal(image[0], model.std).log_prob(frames[t]).sum())
        found["rate"].append(model.latents.kl(q, p).sum())
        if t > first:
            found["reward"].append(model.reward_head.loss(model.reward_head(outcome), clip.rewards[row, t - 1 : t])[0])
            found["discount"].append(model.discount_head.loss(model.discount_head(outcome), clip.discounts[row, t - 1 : t])[0])
    return found


def fixed_noise(model, count, batch, monkeypatch):
    torch.manual_seed(9)
    noise = model._noise(count, batch)
    monkeypatch.setattr(model, "_noise", lambda *shape: noise[: shape[0], : shape[1]])
    return noise


def led_and_ended():
    """Three rows of six frames: whole; known from its third frame on; ended by its third transition."""
    clip = clip_of(6, batch=3)
    clip.actions[1, :2] = -1
    clip.last[2, 2] = True
    return clip


SPANS = [(0, 6), (2, 6), (0, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("horizon", [1, 2])
def test_the_bound_is_made_of_what_each_row_gives_alone(kind, horizon, monkeypatch):
    model, clip = model_of(kind), led_and_ended()
    model.horizon = horizon
    noise = fixed_noise(model, 6, 3, monkeypatch)
    terms = model.terms(clip)
    rows = [slow_terms(model, clip, row, noise, *SPANS[row]) for row in range(3)]
    for row, (first, ends) in enumerate(SPANS):
        inside = torch.zeros(6, dtype=torch.bool)
        inside[first:ends] = True
        assert torch.equal(terms.counted[row].bool(), inside)
        for name in ("distortion", "rate", "reward", "discount"):
            part = getattr(terms, name)[row]
            assert part[~inside].eq(0).all()
            late = len(rows[row]["distortion"]) - len(rows[row][name])  # a row's first frame has neither reward nor discount
            assert part[first : first + late].eq(0).all()
            torch.testing.assert_close(part[first + late : ends], torch.stack(rows[row][name]), rtol=1e-4, atol=1e-4)
        assert terms.rate[row, inside].min() > 0.01 or horizon > 1
    if horizon == 2:  # of frames 3, 4 and 5 only the fourth is not looked at
        assert terms.rate[0, [3, 5]].abs().max() < 1e-4 < terms.rate[0, 4]
    sums = {name: sum(sum(row[name]) for row in rows) for name in ("distortion", "rate", "reward", "discount")}
    _, metrics, _ = loss_of(model, clip)
    for metric, name in {"distortion": "distortion", "rate": "rate", "reward_loss": "reward", "discount_loss": "discount"}.items():
        assert metrics[metric].item() == pytest.approx(sums[name].item() / 14, rel=1e-4)
    assert metrics["elbo"].item() == pytest.approx(-sum(sums.values()).item() / 14, rel=1e-4)
    torch.testing.assert_close(model.elbo(clip)[1], -sum(sum(rows[1][name]) for name in sums).detach(), rtol=1e-4, atol=1e-3)
    squares = [(image - (clip.frames[row, SPANS[row][0] + t] / 255 - model.mean_image)).square().mean() for row in range(3)
               for t, image in enumerate(rows[row]["image"])]  # fmt: skip
    torch.testing.assert_close(metrics["squared_error"], torch.stack(squares).mean().detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_the_negative_bound_where_nothing_departs_from_it(kind, monkeypatch):
    model, clip = model_of(kind, **PLAIN), clip_of(5)
    noise = fixed_noise(model, 5, 2, monkeypatch)
    loss, metrics, gradients = loss_of(model, clip)
    assert loss.item() == pytest.approx(-metrics["elbo"].item(), rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())
    rows = [slow_terms(model, clip, row, noise) for row in range(2)]
    expected = sum(sum(row[name]) for row in rows for name in ("distortion", "rate", "reward", "discount")) / 10
    model.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        slow = parameter.grad
        torch.testing.assert_close(gradients[name], slow, rtol=1e-3, atol=1e-4 * float(slow.abs().max()), msg=name)
        assert slow.abs().max() > 0, name
    assert {id(parameter) for parameter in model.players()["simulator"]} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_balancing_weighs_the_gradients_of_prior_and_posterior_apart_and_not_the_value(kind):
    whole = clip_of(5)

    def at(dynamics, representation, clip=whole):
        model = model_of(kind, dynamics_cost=dynamics, representation_cost=representation, free_nats=0.0)
        loss, metrics, gradients = loss_of(model, clip)
        assert loss.item() == pytest.approx(-metrics["elbo"].item(), rel=1e-6)
        return loss, gradients

    (loss, none), (_, prior), (_, posterior), (other, both) = at(0, 0), at(1, 0), at(0, 1), at(0.5, 0.25)
    assert loss.item() == other.item()
    for name in none:
        mixed = none[name] + 0.5 * (prior[name] - none[name]) + 0.25 * (posterior[name] - none[name])
        torch.testing.assert_close(both[name], mixed, rtol=1e-3, atol=1e-4 * float(mixed.abs().max()), msg=name)
    assert all(none[name].eq(0).all() and posterior[name].eq(0).all() for name in none if name.startswith("body.expect"))
    first = known(clip_of(5), 1)  # where no prior hangs on a posterior
    (_, none), (_, prior), (_, posterior) = (at(*costs, first) for costs in ((0, 0), (1, 0), (0, 1)))
    for name in none:
        if name.startswith("body.judge"):
            torch.testing.assert_close(prior[name], none[name])
            assert not torch.allclose(posterior[name], none[name], rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_of_a_frame_below_the_free_nats_has_no_gradient(kind):
    clip = led_and_ended()
    plain = model_of(kind, **PLAIN)
    torch.manual_seed(3)
    terms = plain.terms(clip)
    rates = terms.rate[terms.counted.bool()].detach()
    middle = rates.median().item() + 1e-3
    for free in (0.0, middle, 1e4):
        loss, metrics, gradients = loss_of(model_of(kind, **(PLAIN | {"free_nats": free})), clip)
        others = sum(metrics[name] for name in ("distortion", "reward_loss", "discount_loss"))
        assert (loss - others).item() == pytest.approx(rates.clamp(min=free).mean().item(), rel=1e-3)
        assert metrics["rate"].item() == pytest.approx(rates.mean().item(), rel=1e-4)
        moved = max(gradients[name].abs().max().item() for name in gradients if name.startswith("body.expect"))
        assert (moved > 0) == (free < 1e4)


def test_the_costs_of_rewards_and_ends_count():
    clip, found = clip_of(4), {}
    for costs in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7)):
        found[costs], metrics, _ = loss_of(model_of(KINDS[0], reward_cost=costs[0], discount_cost=costs[1]), clip)
        expected = found[0.0, 0.0] + costs[0] * metrics["reward_loss"] + costs[1] * metrics["discount_loss"]
        assert found[costs].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_what_stands_for_missing_frames_do_not_count(kind):
    model, clip = model_of(kind), led_and_ended()
    loss, _, gradients = loss_of(model, clip)
    other = type(clip)(*(part.clone() for part in clip))
    other.frames[2, 4:], other.actions[2, 3:], other.rewards[2, 3:], other.discounts[2, 3:], other.last[2, 4] = 255, 0, 1e4, 0.5, True
    other.frames[1, :2], other.rewards[1, :2], other.discounts[1, :2] = 255, 1e4, 0.5
    scribbled, _, theirs = loss_of(model, other)
    assert torch.equal(loss, scribbled)
    assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)
    for row, t in ((2, 3), (1, 2)):
        changed = other._replace(frames=other.frames.clone())
        changed.frames[row, t] = 255 - changed.frames[row, t]
        assert loss_of(model, changed)[0] != loss
    for name, row, t in (("rewards", 2, 2), ("discounts", 2, 2), ("rewards", 1, 2), ("actions", 1, 2)):
        changed = other._replace(**{name: getattr(other, name).clone()})
        getattr(changed, name)[row, t] = (getattr(changed, name)[row, t] + 1) % 3
        assert loss_of(model, changed)[0] != loss, name


# start and step


def still(clip, copies):
    """The clip with its first frame repeated before it."""
    frames = torch.cat([clip.frames[:, :1]] * copies + [clip.frames], 1)
    return clip._replace(frames=frames, actions=torch.cat((torch.full((len(frames), copies), -1), clip.actions), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_before_the_first_frame_are_left_out_and_only_the_last_frames_count(kind):
    model, clip = model_of(kind, sample=False), clip_of(CONTEXT + 2)
    for count in (1, 2):
        short = known(clip, count)
        full = still(short, CONTEXT - count)
        assert all(torch.equal(left, right) for left, right in zip(model.start(short), model.start(full), strict=True))
        stands = full._replace(actions=full.actions.clamp(min=0))  # a world that stood still is another one
        assert not torch.equal(model.start(short)[0], model.start(stands)[0])
    last = type(clip)(clip.frames[:, 2:], *(part[:, 2:] for part in clip[1:]))
    assert last.frames.shape[1] == CONTEXT
    assert all(torch.equal(left, right) for left, right in zip(model.start(clip), model.start(last), strict=True))
    assert not torch.equal(model.start(clip)[0], model.start(known(clip, 2))[0])
    for row, copies in enumerate((0, 2)):  # rows of a batch begin apart
        mixed = clip_of(CONTEXT)
        mixed.actions[1, :2] = -1
        alone = type(clip)(*(part[row : row + 1, copies:] for part in mixed))
        for left, right in zip(model.start(mixed), model.start(alone), strict=True):
            torch.testing.assert_close(left[row], right[0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_start_are_those_of_the_bound_where_nothing_is_looked_at(kind, monkeypatch):
    model, clip = model_of(kind, sample=False), clip_of(CONTEXT + 6)
    model.horizon = 7
    monkeypatch.setattr(model, "_noise", lambda *shape: None)
    monkeypatch.setattr(model, "_listen", lambda images, actions, sample=True: StateSpace._listen(model, images, actions, False))
    images, told = model.body.draw(*(part.flatten(0, 1) for part in model._listen(model._centre(clip.frames), clip.actions)[:2]))
    outcome = model.outcome(told)
    rewards, discounts = model.reward_head.mean(model.reward_head(outcome)), model.discount_head.mean(model.discount_head(outcome))
    state = model.start(known(clip, CONTEXT))
    for position in range(CONTEXT, CONTEXT + 6):
        state, frame, reward, discount = model.step(state, clip.actions[:, position - 1])
        rows = slice(2 * position, 2 * position + 2)
        assert (frame.int() - to_pixels(images[rows] + model.mean_image).int()).abs().max() <= 1
        torch.testing.assert_close(reward, rewards[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(discount, discounts[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_a_state_are_independent_and_leave_it_as_it_was(kind, sample):
    model, clip = model_of(kind, sample=sample), clip_of(CONTEXT)
    torch.manual_seed(0)
    state = model.start(clip)
    kept = tuple(part.clone() for part in state)

    def walk(actions, seed, state=state):
        torch.manual_seed(seed)
        results = []
        for action in actions:
            state, *seen = model.step(state, torch.full((2,), action))
            results += [*state, *seen]
        return results

    one, same, other, elsewhere = walk([0, 1, 2], 1), walk([0, 1, 2], 1), walk([0, 1, 2], 2), walk([1, 1, 2], 1)
    assert all(torch.equal(left, right) for left, right in zip(one, same, strict=True))
    assert torch.equal(one[-5], other[-5]) != sample  # the last memory: with other draws another future
    assert not torch.equal(one[-5], elsewhere[-5])
    assert all(torch.equal(part, old) for part, old in zip(state, kept, strict=True))
    rows = [part[1:] for part in state]
    alone, *_ = model.step(tuple(rows), torch.tensor([0]))
    torch.testing.assert_close(alone[0], one[0][1:])


@pytest.mark.parametrize("shape", [[3, 64, 64], (1, 84, 84), (1, 10, 5), (2, 33, 47), (3, 210, 160)], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=str)
def test_any_size_of_frame_starts_and_steps(shape, kind):
    sizes = {"groups": 4, "classes": 4, "memory": 8, "units": 8, "channels": 4}
    model = StateSpace(shape, 4, "cpu", architecture=kind[0], latents=kind[1], **sizes)
    assert all(isinstance(model, job) for job in (Model, Trainable, Simulator))
    state = model.start(image_clip(torch.zeros(3, *shape, dtype=torch.uint8)))
    for _ in range(2):
        state, frame, reward, discount = model.step(state, torch.tensor([0, 1, 3]))
    assert (frame.dtype, tuple(frame.shape)) == (torch.uint8, (3, *shape))
    assert reward.dtype == discount.dtype == torch.float32
    assert reward.shape == discount.shape == (3,)
    assert ((discount >= 0) & (discount <= 1)).all()
    assert all(len(part) == 3 and part.dtype == torch.float32 and not part.requires_grad for part in state)
    if max(shape) <= 84:
        ((_, loss, _),) = model.losses(clip_of(3, 1, tuple(shape)))
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("knob", "told"),
    [
        ({"architecture": "transformer"}, "architecture is one of vector, places, got transformer"),
        ({"latents": "binary"}, "latents is one of categorical, gaussian, got binary"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"latents": "gaussian", "groups": 0}, "groups must be at least 1"),
        ({"classes": 1}, "classes at least 2"),
        ({"memory": 0}, "memory must be at least 1"),
        ({"units": 0}, "units must be"),
        ({"channels": 0}, "channels must be"),
        ({"context_frames": 0}, "context_frames must be"),
        ({"std": 0.0}, "std must be above 0"),
        ({"std": math.nan}, "std must be above 0"),
        ({"dynamics_cost": -1.0}, "dynamics_cost must be"),
        ({"representation_cost": math.inf}, "representation_cost must be"),
        ({"free_nats": -0.1}, "free_nats must be"),
        ({"uniform_mix": 1.0}, "uniform_mix must be"),
        ({"reward_cost": -1.0}, "reward_cost must be"),
        ({"discount_cost": math.nan}, "discount_cost must be"),
    ],
)
def test_senseless_knobs_are_refused_by_name(knob, told):
    with pytest.raises(UserError, match=told):
        StateSpace((1, 10, 5), 4, "cpu", **knob)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_round_with_the_mean_image(kind):
    model, other = model_of(kind), model_of(kind, seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    clip, frames = clip_of(CONTEXT), []
    for each in (model, other):
        torch.manual_seed(0)
        frames.append(each.step(each.start(clip), torch.tensor([0, 2]))[1])
    assert torch.equal(*frames)
    assert torch.equal(other.mean_image, model.mean_image)


def test_the_mean_image_is_taken_off_and_put_back():
    model = model_of(KINDS[0])
    frames = torch.randint(0, 256, (7, *SHAPE), dtype=torch.uint8)
    model.prepare(frames)
    torch.testing.assert_close(model.mean_image, frames.double().mean(0).div(255).float())
    with torch.no_grad():
        for parameter in model.body.up.parameters():
            parameter.zero_()
    _, frame, _, _ = model.step(model.start(image_clip(frames)), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(frame, to_pixels(model.mean_image[None]).expand(7, -1, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_near_float32(kind):
    model, clip = model_of(kind), clip_of(CONTEXT + 2)
    exact, _, _ = loss_of(model, clip)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        ((_, loss, metrics),) = model.losses(clip)
        state = model.start(clip)
        state, frame, reward, _ = model.step(state, torch.tensor([0, 1]))
    assert loss.dtype == reward.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert all(part.dtype == torch.float32 for part in state)
    assert frame.dtype == torch.uint8
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind):
    """On the meta device tensors have no values, so whoever looks at one raises."""
    model = StateSpace(SHAPE, ACTIONS, "meta", architecture=kind[0], latents=kind[1], groups=2, classes=3, memory=4, units=4, channels=4)
    clip = type(clip_of(6))(*(part.to("meta") for part in clip_of(6)))
    ((_, loss, _),) = model.losses(clip)
    loss.backward()
    state = model.start(clip)
    _, frame, _, _ = model.step(state, clip.actions[:, 0])
    assert frame.shape == (2, *SHAPE)
    with pytest.raises(RuntimeError, match="meta"):
        bool(loss > 0)
