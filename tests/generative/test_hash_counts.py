"""SimHash counts: codes against signs by hand, counts against a plain dict, pseudo-counts equal the true ones, resume, refusals."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from envs.api import UserError
from generative import hash_counts
from generative.api import Density, Model
from generative.hash_counts import HashCounts, _merge
from generative.pseudo_count import count_bonus, prediction_gain, pseudo_count

SHAPE = (1, 6, 7)


def make(shape=SHAPE, **knobs):
    return HashCounts(shape, 4, "cpu", **knobs)


def stream(count, kinds):
    """uint8 (count, 1, 6, 7), drawn from so many different frames."""
    pictures = torch.randint(0, 256, (kinds, *SHAPE), dtype=torch.uint8)
    return pictures[torch.randint(0, kinds, (count,))]


def by_hand(frames, model):
    """Codes as strings of signs, in exact integers."""
    levels = frames.flatten(1).numpy().astype(object) * model.levels // 256
    directions = model.state_dict()["directions"].numpy().astype(object)
    sums = (2 * levels - (model.levels - 1)) @ directions.T
    return ["".join("1" if value >= 0 else "0" for value in row) for row in sums]


@pytest.mark.parametrize("shape", [(1, 42, 42), (1, 84, 84), (1, 1, 1)])
def test_it_is_a_density_at_every_shape(shape):
    model = make(shape)
    assert isinstance(model, Density)
    assert isinstance(model, Model)
    assert (model.exact, model.updates_per_frame, model.obs_shape) == (True, 1.0, shape)
    frames = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    for part in model.absorb(frames):
        assert (part.dtype, tuple(part.shape)) == (torch.float64, (3,))


@pytest.mark.parametrize(("bits", "levels"), [(1, 256), (5, 8), (62, 2), (63, 256), (200, 16)])
def test_codes_tell_frames_apart_as_their_signs_do(bits, levels):
    model = make(bits=bits, levels=levels)
    frames = torch.cat((stream(150, 150), torch.zeros(1, *SHAPE).byte(), torch.full((1, *SHAPE), 255).byte()))
    codes, signs = model.codes(frames).tolist(), by_hand(frames, model)
    assert len(set(codes)) == len(set(signs)) == len(set(zip(codes, signs)))
    assert all(0 <= code < 2**62 for code in codes)
    if bits <= 62:
        assert codes == [int(sign[::-1], 2) for sign in signs]


def test_the_order_of_a_long_codes_words_counts():
    model = make((1, 1, 2), bits=124)
    directions = torch.zeros(124, 2, dtype=torch.int16)
    directions[:62, 0], directions[62:, 1] = 1, 1
    model.load_state_dict({**model.state_dict(), "directions": directions})
    white_first, black_first = torch.tensor([[255, 0], [0, 255]], dtype=torch.uint8).view(2, 1, 1, 1, 2)
    assert int(model.codes(white_first)) != int(model.codes(black_first))


def test_codes_do_not_depend_on_the_batch():
    model, frames = make(), stream(40, 40)
    assert torch.equal(model.codes(frames), torch.cat([model.codes(frame) for frame in frames.split(1)]))


def test_near_frames_share_more_signs_than_far_ones():
    """An angle t between centred frames: a sign differs with probability t / pi."""
    model = make((1, 20, 20), bits=4_000)
    first = torch.randint(0, 256, (1, 1, 20, 20), dtype=torch.uint8)
    second = torch.where(torch.rand(first.shape) < 0.3, torch.randint(0, 256, first.shape, dtype=torch.uint8), first)
    one, two = (frame.double().flatten() * 2 - 255 for frame in (first, second))
    angle = math.acos(float(one @ two / one.norm() / two.norm()))
    signs = [np.array(list(by_hand(frame, model)[0])) for frame in (first, second)]
    assert (signs[0] != signs[1]).mean() == pytest.approx(angle / math.pi, abs=4 * 0.5 / math.sqrt(4_000))


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_counts_are_those_of_a_plain_dict(chunk, monkeypatch):
    monkeypatch.setattr(hash_counts, "RECENT", 16)
    monkeypatch.setattr(hash_counts, "ROWS", 64)
    model, frames, plain = make(bits=6), stream(500, 300), Counter()
    before, after = (torch.cat(parts) for parts in zip(*[model.absorb(part) for part in frames.split(chunk)]))
    for seen, code in enumerate(by_hand(frames, model)):
        expected = math.log(plain[code] / seen) if plain[code] else -math.inf
        assert float(before[seen]) == pytest.approx(expected, abs=1e-12)
        plain[code] += 1
        assert float(after[seen]) == pytest.approx(math.log(plain[code] / (seen + 1)), abs=1e-12)
    assert len(model) == len(plain) > 16
    assert model.frames == 500
    assert model.count(frames).tolist() == [plain[code] for code in by_hand(frames, model)]
    assert torch.allclose(model.log_prob(frames), torch.tensor([math.log(plain[code] / 500) for code in by_hand(frames, model)]).double())


def test_log_prob_before_is_what_absorb_tells():
    model, frames = make(bits=4), stream(60, 20)
    for frame in frames.split(1):
        before = model.log_prob(frame)
        recoding = model.absorb(frame)
        assert torch.equal(recoding.before, before)
        assert torch.equal(recoding.after, model.log_prob(frame))


def test_probabilities_of_all_codes_sum_to_one():
    model = make(bits=3)
    model.absorb(stream(200, 100))
    state = model.state_dict()
    assert int(state["counts"].sum()) == 200
    frames = stream(2_000, 2_000)
    first = {code: place for place, code in enumerate(model.codes(frames).tolist())}
    assert len(first) == 8
    assert float(model.log_prob(frames[list(first.values())]).exp().sum()) == pytest.approx(1.0)


def test_the_pseudo_count_is_the_true_count_and_0_for_a_new_code():
    model, frames = make(bits=6), stream(400, 100)
    truth = []
    for frame in frames.split(1):
        truth.append(int(model.count(frame)))
        model.absorb(frame)
    recoding = make(bits=6)
    recoding.load_state_dict({**recoding.state_dict(), "directions": model.state_dict()["directions"]})
    recoding = recoding.absorb(frames)
    counts = pseudo_count(recoding)
    new = torch.tensor(truth) == 0
    assert 10 < int(new.sum()) < 100
    assert torch.isneginf(recoding.before[new]).all()
    assert torch.isposinf(prediction_gain(recoding)[new]).all()
    assert (counts[new] == 0).all()
    assert torch.allclose(counts[~new], torch.tensor(truth)[~new].double(), rtol=1e-9)
    assert torch.allclose(count_bonus(counts, "inverse_sqrt")[new], torch.tensor(10.0).double())


def test_while_one_code_alone_was_seen_the_pseudo_count_is_inf_and_count_knows():
    model, frame = make(), stream(1, 1)
    model.absorb(frame.repeat(5, 1, 1, 1))
    recoding = model.absorb(frame)
    assert (float(recoding.before), float(recoding.after)) == (0.0, 0.0)
    assert float(pseudo_count(recoding)) == math.inf
    assert int(model.count(frame)) == 6


def test_nothing_seen():
    model = make()
    assert model.count(stream(3, 3)).tolist() == [0, 0, 0]
    assert torch.isneginf(model.log_prob(stream(3, 3))).all()
    assert len(model) == 0


def test_stop_and_resume_is_bit_for_bit(monkeypatch):
    monkeypatch.setattr(hash_counts, "RECENT", 8)
    frames = stream(300, 200)
    whole, first, second = make(bits=7), make(bits=7), make(bits=7)
    first.load_state_dict(whole.state_dict())
    expected = [whole.absorb(part) for part in frames.split(16)]
    found = [first.absorb(part) for part in frames.split(16)[:9]]
    state = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in first.state_dict().items()}
    kept = state["counts"].clone()
    second.load_state_dict(state)
    found += [second.absorb(part) for part in frames.split(16)[9:]]
    assert all(torch.equal(torch.cat(mine), torch.cat(theirs)) for mine, theirs in zip(zip(*found), zip(*expected)))
    for name, value in whole.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state_dict()[name]))
    assert torch.equal(state["counts"], kept)  # a loaded state is not written to


def test_merge():
    codes, counts = _merge(torch.tensor([2, 5, 9]), torch.tensor([1, 2, 3]), torch.tensor([1, 6, 11]), torch.tensor([7, 8, 9]))
    assert codes.tolist() == [1, 2, 5, 6, 9, 11]
    assert counts.tolist() == [7, 1, 2, 8, 3, 9]


def test_bytes_are_announced():
    model = make()
    model.absorb(torch.randint(0, 256, (5_000, *SHAPE), dtype=torch.uint8))
    assert len(model) == 5_000
    assert model.nbytes <= model.required_bytes(5_000)
    held = sum(value.nbytes for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    assert held < model.nbytes


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"bits": 0}, "bits must be at least 1, got 0"),
        ({"levels": 1}, "levels must lie in 2..256, got 1"),
        ({"levels": 257}, "levels must lie in 2..256, got 257"),
    ],
)
def test_senseless_knobs_are_refused_in_one_line(knobs, words):
    with pytest.raises(UserError) as error:
        make(**knobs)
    assert str(error.value) == words


def test_frames_and_checkpoints_of_another_shape_are_refused():
    model = make()
    for act in (model.log_prob, model.absorb, model.count):
        with pytest.raises(UserError, match=r"^hash counting takes uint8 frames \(B, 1, 6, 7\), got torch.uint8 \(2, 1, 7, 6\)$"):
            act(torch.zeros(2, 1, 7, 6, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"hash counts are of another shape \(\(8, 42\) directions there, \(256, 42\) here\)"):
        model.load_state_dict(make(bits=8).state_dict())
    with pytest.raises(UserError, match="models grey frames"):
        make((3, 6, 7))


def test_configuration_builds():
    knobs = dict(OmegaConf.load(Path(__file__).parent.parent.parent / "configs" / "model" / "hash_counts.yaml"))
    assert knobs.pop("_target_") == "generative.hash_counts.HashCounts"
    assert make(**knobs).bits == 256


def test_no_frames_at_all():
    for model in (make(),):
        nothing = torch.zeros(0, 1, 6, 7, dtype=torch.uint8)
        assert len(model.log_prob(nothing)) == len(model.absorb(nothing).before) == len(model.absorb(nothing).after) == 0
