import copy
import math

import pytest
import torch

from agents.bonus import Bonus, CountBonus, NonFiniteBonus, density_shape, shrink_frames
from agents.distillation import RandomNetworkDistillation
from envs.api import UserError
from envs.area import shrink
from generative.api import Recoding
from generative.cts import CTS
from generative.hash_counts import HashCounts


class Empirical:
    """A density that counts whole frames."""

    obs_shape, exact, updates_per_frame = (1, 2, 2), True, 1.0

    def __init__(self, exact=True):
        self.exact, self.counts, self.total = exact, {}, 0

    def absorb(self, frames):
        rows = []
        for frame in frames.flatten(1).tolist():
            count = self.counts.get(tuple(frame), 0)
            self.counts[tuple(frame)] = count + 1
            self.total += 1
            before = math.log(count / (self.total - 1)) if count else -math.inf
            rows.append((before, math.log((count + 1) / self.total)))
        return Recoding(*torch.tensor(rows, dtype=torch.float64).unbind(1))

    def log_prob(self, frames):
        return torch.zeros(len(frames))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Learned(Empirical):
    """The same, as if learnt by gradients."""

    def players(self):
        return {}

    def losses(self, clip):
        return iter(())


def frames_of(*levels):
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def count_bonus_of(density, **knobs):
    return CountBonus((1, 2, 2), "cpu", density, **knobs)


def test_pays_by_the_square_root_of_the_true_count():
    bonus = count_bonus_of(Empirical())
    first = bonus(frames_of(5, 5, 9))
    assert first.dtype == torch.float32
    # Before its second sight frame 5 is all that was ever seen: rho = rho' = 1, and nothing can be learned from it.
    assert first.tolist() == pytest.approx([10, 0, 10], rel=1e-5)
    assert bonus(frames_of(5, 9)).tolist() == pytest.approx([(2.01) ** -0.5, (1.01) ** -0.5], rel=1e-5)


def test_forms():
    for form, expected in (("inverse", 1 / 2.01), ("inverse_sqrt", 2.01**-0.5), ("gain", math.log((3 / 4) / (2 / 3)))):
        density = Empirical()
        density.absorb(frames_of(5, 9, 5))
        bonus = count_bonus_of(density, form=form)
        assert bonus(frames_of(5)).tolist() == pytest.approx([expected], rel=1e-5)


def test_gains_of_models_learnt_by_gradients_are_scaled():
    gain = math.log((3 / 4) / (2 / 3))
    for density, knobs, scale in (
        (Learned(), {}, 0.1 / 2),
        (Learned(), {"gain_scale": 0.0}, None),
        (Empirical(), {"gain_scale": 0.5}, 0.5 / 2),
    ):
        bonus = count_bonus_of(density, **knobs)
        bonus(frames_of(5, 9, 5))
        count = 2 if scale is None else 1 / math.expm1(scale * gain)  # the fourth frame: n^(-1/2) is a half
        assert bonus(frames_of(5)).tolist() == pytest.approx([(count + 0.01) ** -0.5], rel=1e-5)


def test_a_bound_is_refused_unless_allowed():
    with pytest.raises(UserError, match="allow_bound=true"):
        count_bonus_of(Empirical(exact=False))
    assert not count_bonus_of(Empirical(exact=False), allow_bound=True).exact


@pytest.mark.parametrize("knobs", [{"form": "sqrt"}, {"gain_scale": -1.0}, {"gain_scale": math.nan}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(UserError, match=f"bonus.{next(iter(knobs))}"):
        count_bonus_of(Empirical(), **knobs)


def test_a_bonus_that_is_not_finite_stops():
    class Broken(Empirical):
        def absorb(self, frames):
            return Recoding(torch.tensor([math.nan]), torch.tensor([-1.0]))

    with pytest.raises(NonFiniteBonus):
        count_bonus_of(Broken())(frames_of(1))


def test_metrics_are_means_since_the_last_call():
    bonus = count_bonus_of(Empirical())
    assert bonus.metrics() == {}
    values = torch.cat([bonus(frames_of(1, 2)), bonus(frames_of(1))])
    shown = bonus.metrics()
    assert float(shown["bonus/mean"]) == pytest.approx(float(values.mean()))
    assert float(shown["bonus/max"]) == pytest.approx(float(values.max()))
    assert bonus.metrics() == {}


def test_frames_are_shrunk_by_area():
    frames = torch.randint(256, (3, 1, 84, 84), dtype=torch.uint8)
    expected = frames.view(3, 1, 42, 2, 42, 2).double().mean((3, 5)).round()
    assert density_shape((1, 84, 84)) == (1, 42, 42)
    assert torch.equal(shrink_frames(frames, (1, 42, 42)), expected.to(torch.uint8))
    for height, width in ((64, 64), (210, 160), (43, 42)):
        noise = torch.randint(256, (2, 1, height, width), dtype=torch.uint8)
        whole = torch.stack([torch.from_numpy(shrink(frame[0].numpy(), 42, 42)) for frame in noise]).unsqueeze(1)
        assert (shrink_frames(noise, (1, 42, 42)).int() - whole.int()).abs().max() <= 1  # ties
    colour = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    colour[:, 1] = 200
    assert shrink_frames(colour, density_shape((3, 64, 64))).unique().tolist() == [round(200 * 0.587)]
    small = torch.zeros(2, 1, 8, 10, dtype=torch.uint8)
    assert shrink_frames(small, density_shape((1, 8, 10))) is small


def test_context_trees_resume_within_a_bonus():
    frames = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8)
    first, second = (CountBonus((1, 16, 16), "cpu", CTS(16, 16)) for _ in range(2))
    first(frames[:20])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first(frames[20:]), second(frames[20:]))
    assert isinstance(first, Bonus)
    assert first.required_bytes(10**9) == first.density.nbytes


def test_memory_of_a_density_that_grows_is_told_for_all_frames():
    bonus = CountBonus((1, 16, 16), "cpu", HashCounts((1, 16, 16), 2, "cpu", bits=64))
    assert bonus.required_bytes(10**6) - bonus.required_bytes(0) >= 16 * 10**6


def test_gain_is_refused_of_a_density_that_holds_new_frames_impossible():
    with pytest.raises(UserError, match="bonus=gain needs a density that holds no frame impossible; HashCounts"):
        CountBonus((1, 8, 8), "cpu", HashCounts((1, 8, 8), 2, "cpu"), form="gain")
    CountBonus((1, 8, 8), "cpu", CTS(8, 8), form="gain")


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 42])
def test_distillation_takes_frames_of_any_size(side):
    bonus = RandomNetworkDistillation((1, side, side + 1), "cpu")
    assert bonus(torch.randint(256, (4, 1, side, side + 1), dtype=torch.uint8)).isfinite().all()


def test_distillation_pays_less_for_what_it_has_seen():
    torch.manual_seed(0)
    bonus = RandomNetworkDistillation((1, 16, 16), "cpu", learning_rate=1e-3)
    known = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    known[:, :, 4:8, 4:8] = 255
    new = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    new[:, :, 10:14, 2:6] = 255
    for _ in range(200):
        bonus(torch.where(torch.rand(8, 1, 16, 16) < 0.05, 60, known).to(torch.uint8))
    assert float(bonus(new)) > 5 * float(bonus(known[:1]))
    assert isinstance(bonus, Bonus)


def test_distillation_resumes_bit_for_bit():
    torch.manual_seed(0)
    frames = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8)
    first, second = (RandomNetworkDistillation((1, 16, 16), "cpu") for _ in range(2))
    first(frames[:20])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first(frames[20:]), second(frames[20:]))


def test_distillation_refuses_wrong_knobs():
    for knobs in ({"features": 0}, {"learning_rate": 0.0}):
        with pytest.raises(UserError, match="bonus"):
            RandomNetworkDistillation((1, 16, 16), "cpu", **knobs)
