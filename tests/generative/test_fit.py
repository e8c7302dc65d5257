"""The fitter: optimisers against their formulas, players in turn, stop and resume bit for bit, losses that are not finite."""

import pytest
import torch
from torch import nn

from envs.api import UserError
from generative.api import Clip
from generative.data import FrameMemory
from generative.fit import Fitter, NonFiniteLoss, choose_precision
from generative.vae import VAE

FRAMES = FrameMemory.from_tensor(torch.randint(0, 256, (50, 1, 10, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8))


class Quadratic(nn.Module):
    """loss = w^2 / 2 with w = 1 at first; from update `bad_from` on, loss or gradient are not finite."""

    def __init__(self, bad_from=None, kind="loss"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.bad_from, self.kind, self.calls, self.history = bad_from, kind, 0, []

    def players(self):
        return {"only": [self.weight]}

    def losses(self, clip):
        self.history.append(self.weight.item())
        self.calls += 1
        loss = self.weight**2 / 2
        if self.bad_from is not None and self.calls >= self.bad_from:
            loss = loss * float("nan") if self.kind == "loss" else loss + torch.sqrt((self.weight - self.weight.detach()).clamp(min=0))
        yield "only", loss, {"weight": self.weight.detach().clone()}


class Duel(nn.Module):
    """Two players: the second's loss is drawn after the first has stepped."""

    def __init__(self):
        super().__init__()
        self.critic, self.generator = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.seen = []

    def players(self):
        return {"critic": [self.critic], "generator": [self.generator]}

    def losses(self, clip):
        yield "critic", self.critic * self.generator, {}
        self.seen.append(self.critic.item())
        yield "generator", self.critic * self.generator, {}


def weights_after(updates, **knobs):
    model = Quadratic()
    for _ in Fitter(model, FRAMES, updates=updates, **knobs).run():
        pass
    return model.weight.item()


def test_one_update_of_each_optimiser_by_hand():
    """Gradient 1. Adam's first step is the learning rate; RMSProp's is rate / sqrt(0.01)."""
    assert weights_after(1, optimiser="adam", learning_rate=0.01) == pytest.approx(0.99)
    assert weights_after(1, optimiser="rmsprop", learning_rate=0.01) == pytest.approx(0.9)


def test_run_yields_every_update_and_stops():
    model = Quadratic()
    ticks = list(Fitter(model, FRAMES, updates=5, learning_rate=0.1).run())
    assert [tick.update for tick in ticks] == [1, 2, 3, 4, 5]
    assert [tick.metrics["weight"].item() for tick in ticks] == model.history
    assert ticks[0].metrics["only_loss"].item() == 0.5
    assert all(tick.seconds > 0 for tick in ticks)


def test_players_step_in_turn_on_their_own_parameters():
    model = Duel()
    list(Fitter(model, FRAMES, updates=1, optimiser="adam", learning_rate=0.25).run())
    assert model.seen == [pytest.approx(0.75)]
    assert model.critic.item() == pytest.approx(0.75)
    assert model.generator.item() == pytest.approx(0.75)


def fit_in_parts(parts, check_updates, optimiser, precision):
    """Fits for each part's updates with a new fitter and a new model that load what the part before left."""
    model_state = fitter_state = None
    done = 0
    for part in parts:
        torch.manual_seed(0)
        model = VAE((1, 10, 5), 4, "cpu", latents=3)
        fitter = Fitter(
            model, FRAMES, batch_size=8, updates=done + part, optimiser=optimiser, precision=precision, check_updates=check_updates
        )
        if model_state is not None:
            model.load_state_dict(model_state)
            fitter.load_state_dict(fitter_state)
        torch.manual_seed(100 + done)
        for tick in fitter.run():
            torch.manual_seed(100 + tick.update)
        done += part
        model_state = {name: value.clone() for name, value in model.state_dict().items()}
        fitter_state = fitter.state_dict()
    assert fitter_state["update"] == sum(parts)
    return model_state


@pytest.mark.parametrize("optimiser", ["adam", "rmsprop"])
@pytest.mark.parametrize("check_updates", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stop_and_resume_equals_never_stopped(optimiser, check_updates, precision):
    whole = fit_in_parts([6], check_updates, optimiser, precision)
    parts = fit_in_parts([3, 3], check_updates, optimiser, precision)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_state_dict_holds_tensors_and_numbers_under_string_keys():
    fitter = Fitter(VAE((1, 10, 5), 4, "cpu"), FRAMES, updates=2)
    list(fitter.run())

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for item in value.values():
                check(item)
        else:
            assert isinstance(value, int | float | torch.Tensor)

    check(fitter.state_dict())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_loss_stops_before_the_step(kind):
    model = Quadratic(bad_from=4, kind=kind)
    fitter = Fitter(model, FRAMES, updates=10, learning_rate=0.1)
    with pytest.raises(NonFiniteLoss, match="update 4"):
        list(fitter.run())
    assert model.calls == 4
    assert fitter.update == 3
    assert model.weight.item() == model.history[3]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_loss_between_checks_goes_back_to_the_last_good_state(kind):
    """Checks after updates 3, 6, 9; update 5 is bad, seen after 6, the state after 3 restored, and training could go on from it."""
    model = Quadratic(bad_from=5, kind=kind)
    fitter = Fitter(model, FRAMES, updates=10, learning_rate=0.1, check_updates=3)
    with pytest.raises(NonFiniteLoss, match="only is not finite at update 5"):
        list(fitter.run())
    assert model.calls == 6
    assert fitter.update == 3
    assert model.weight.item() == model.history[3]
    model.bad_from = None
    list(fitter.run())
    clean = Quadratic()
    list(Fitter(clean, FRAMES, updates=10, learning_rate=0.1).run())
    assert model.weight.item() == clean.weight.item()


@pytest.mark.parametrize("check_updates", [3, 50])
def test_a_bad_loss_is_found_at_the_end_and_before_saving(check_updates):
    fitter = Fitter(Quadratic(bad_from=5), FRAMES, updates=5, check_updates=check_updates)
    with pytest.raises(NonFiniteLoss):
        list(fitter.run())
    model = Quadratic(bad_from=5)
    fitter = Fitter(model, FRAMES, updates=100, check_updates=check_updates)
    for _ in zip(range(5), fitter.run()):
        pass
    with pytest.raises(NonFiniteLoss):
        fitter.state_dict()
    assert torch.isfinite(model.weight)


def test_bfloat16_learns_as_float32_does():
    results = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = VAE((1, 10, 5), 4, "cpu", latents=3)
        results[precision] = [tick.metrics["elbo"].item() for tick in Fitter(model, FRAMES, updates=40, precision=precision).run()]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert results["float32"] != results["bfloat16"]
    assert results["bfloat16"][-1] > results["bfloat16"][0] + 100
    assert results["bfloat16"][-1] == pytest.approx(results["float32"][-1], rel=0.05)


def test_precision_is_what_was_asked_for():
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="precision"):
        choose_precision("half", cpu)


@pytest.mark.parametrize(
    "knobs", [{"batch_size": 0}, {"updates": 0}, {"learning_rate": 0.0}, {"check_updates": 0}, {"optimiser": "sgd"}, {"precision": "int8"}]
)
def test_senseless_knobs_are_refused_by_name(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Fitter(Quadratic(), FRAMES, **knobs)


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="no frames"):
        Fitter(Quadratic(), FrameMemory((1, 10, 5), 4))


class Numbers:
    """Clips that hold their own number and length."""

    def __len__(self):
        return 100

    def starts(self, steps, lead):
        return 100 - steps

    def clips(self, indices, steps, lead):
        frames = indices.to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, steps + 1, 1, 1, 1)
        zeros = torch.zeros(len(indices), steps)
        return Clip(frames, zeros.long(), zeros, zeros, zeros.bool())


class Listener(Quadratic):
    """Notes the clips that it is given, and draws random numbers as it learns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def losses(self, clip):
        torch.rand(3)
        self.seen.append(clip.frames[..., 0, 0, 0].tolist())
        yield from super().losses(clip)


def test_clips_are_drawn_by_the_default_generator_whatever_the_thread_does():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(Listener())
        for _ in Fitter(runs[-1], Numbers(), batch_size=4, updates=5, clip_steps=6).run():
            torch.rand(1)
    assert runs[0].seen == runs[1].seen
    assert len(runs[0].seen) == 5
    assert all(len(row) == 7 for clip in runs[0].seen for row in clip)
    assert len({row[0] for clip in runs[0].seen for row in clip}) > 10


def test_a_retuned_fitter_takes_other_batches_and_steps():
    model = Listener()
    fitter = Fitter(model, Numbers(), batch_size=4, updates=3, learning_rate=0.01, clip_steps=6)
    assert [tick.update for tick in fitter.run(until=1)] == [1]
    assert model.weight.item() == pytest.approx(0.99)
    fitter.retune(batch_size=2, learning_rate=0.1, clip_steps=3)
    assert [tick.update for tick in fitter.run(until=9)] == [2, 3]
    assert model.weight.item() == pytest.approx(0.79, abs=1e-3)
    assert [(len(clip), len(clip[0])) for clip in model.seen] == [(4, 7), (2, 4), (2, 4)]
    with pytest.raises(UserError, match="at least 1 transition"):
        Fitter(model, Numbers(), clip_steps=0)


def test_the_learning_rate_grows_while_it_warms_up():
    """Adam's first steps on an even gradient are as long as its rate; RMSProp's as its rate over the root of the mean square."""
    model = Duel()
    fitter = Fitter(model, FRAMES, updates=4, learning_rate=0.4, warmup_updates=4)
    rates = [[group["lr"] for optimiser in fitter.optimisers.values() for group in optimiser.param_groups] for _ in fitter.run()]
    assert rates == [[pytest.approx(rate)] * 2 for rate in (0.1, 0.2, 0.3, 0.4)]
    quadratic = Quadratic()
    first = Fitter(quadratic, FRAMES, updates=1, learning_rate=0.4, warmup_updates=4)
    list(first.run())
    assert quadratic.weight.item() == pytest.approx(0.9)
    with pytest.raises(UserError, match="warmup_updates"):
        Fitter(quadratic, FRAMES, warmup_updates=-1)
