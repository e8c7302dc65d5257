import math

import pytest
import torch

from generative.api import Recoding
from generative.cts import CTS
from generative.pseudo_count import count_bonus, prediction_gain, pseudo_count, pseudo_total, scaled_count


def empirical(counts: list[int], total: int) -> Recoding:
    """The recoding of an empirical density over frames that were seen `counts` times of `total`."""
    count = torch.tensor(counts, dtype=torch.float64)
    return Recoding((count / total).log(), ((count + 1) / (total + 1)).log())


def test_of_an_empirical_density_it_is_the_true_count():
    counts = [0, 1, 2, 17, 999]
    recoding = empirical(counts, 1000)
    assert pseudo_count(recoding).tolist() == pytest.approx(counts, rel=1e-9)
    assert pseudo_total(recoding)[1:].tolist() == pytest.approx([1000] * 4, rel=1e-9)


def test_huge_frames_whose_probabilities_underflow():
    recoding = Recoding(torch.tensor([-5000.0]), torch.tensor([-5000.0 + math.log(1 + 1 / 7)], dtype=torch.float64))
    assert float(pseudo_count(recoding)) == pytest.approx(7, rel=1e-3)


def test_a_frame_that_was_not_learned_counts_as_known():
    recoding = Recoding(torch.tensor([-3.0, -3.0]), torch.tensor([-3.0, -4.0]))
    assert pseudo_count(recoding).tolist() == [math.inf, math.inf]
    assert prediction_gain(recoding).tolist() == [0, 0]
    assert count_bonus(pseudo_count(recoding), "inverse_sqrt").tolist() == [0, 0]
    assert scaled_count(recoding, 0.1, torch.tensor([1, 1])).tolist() == [math.inf, math.inf]


def test_an_impossible_frame_counts_zero():
    recoding = empirical([0], 50)
    assert float(pseudo_count(recoding)) == 0
    assert float(prediction_gain(recoding)) == math.inf
    assert float(count_bonus(pseudo_count(recoding), "inverse_sqrt")) == pytest.approx(10)
    assert float(count_bonus(pseudo_count(recoding), "inverse")) == pytest.approx(100)


def test_bonuses_by_hand():
    count = torch.tensor([0.24, 3.99, 99.99], dtype=torch.float64)
    assert count_bonus(count, "inverse_sqrt").tolist() == pytest.approx([2, 0.5, 0.1])
    assert count_bonus(count, "inverse").tolist() == pytest.approx([4, 0.25, 0.01])
    with pytest.raises(ValueError, match="gain"):
        count_bonus(count, "gain")


def test_the_inequalities_of_the_paper_hold_for_context_trees():
    """Theorem 1: PG <= 1 / N and PG <= N^(-1/2)."""
    model = CTS(6, 6)
    generator = torch.Generator().manual_seed(0)
    frames = (torch.randint(4, (300, 1, 6, 6), generator=generator) * 60).to(torch.uint8)
    frames[::2] = frames[0]
    recoding = model.absorb(frames)
    count, gain = pseudo_count(recoding), prediction_gain(recoding)
    assert (gain <= 1 / count + 1e-12).all()
    assert (gain <= count.rsqrt() + 1e-12).all()
    assert count[-2] > 5  # the frame seen every other time
    assert count[-1] < 0.5
    assert (recoding.after >= recoding.before).all()


def test_scaled_counts_by_hand():
    recoding = Recoding(torch.tensor([-9.0, -9.0]), torch.tensor([-8.0, -8.0]))
    scaled = scaled_count(recoding, 0.1, torch.tensor([1, 100]))
    assert scaled.tolist() == pytest.approx([1 / math.expm1(0.1), 1 / math.expm1(0.01)])
