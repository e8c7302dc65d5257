"""Clips from a ring of what was played are those that a list of everything gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agents.trajectories import Trajectories
from envs.api import UserError
from generative.api import Clip
from generative.data import frame_weights

LANES, SHAPE = 3, (1, 2, 2)


def played(steps: int, seed: int, capacity: int) -> tuple[Trajectories, list[list[dict[str, float]]]]:
    """A ring, and for each lane everything that ever happened: pictures are numbered by a running count, 0 to 255 and over."""
    generator = torch.Generator().manual_seed(seed)
    memory, story = Trajectories(capacity, SHAPE), [[] for _ in range(LANES)]
    count = torch.arange(LANES) * 80
    obs, age = count.clone(), torch.zeros(LANES, dtype=torch.int64)
    for t in range(steps):
        action = torch.randint(5, (LANES,), generator=generator)
        reward = torch.randn(LANES, generator=generator)
        last = torch.rand(LANES, generator=generator) < 0.15
        if t == steps // 2:
            last = torch.ones(LANES, dtype=torch.bool)
        discount = torch.rand(LANES, generator=generator)
        following = obs + 1
        ended = bool(last.any())
        memory.append(picture(obs), action, reward, discount, last if ended else None, picture(following))
        for lane in range(LANES):
            numbers = (obs, action, reward, discount, last, following, age)
            keys = ("picture", "action", "reward", "discount", "last", "next", "age")
            story[lane].append({key: float(part[lane]) for key, part in zip(keys, numbers)})
        obs = torch.where(last, following + 1, following)
        age = torch.where(last, 0, age + 1)
    return memory, story


def picture(number: Tensor) -> Tensor:
    return (number % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *SHAPE).clone()


def clip_by_hand(lane: list[dict[str, float]], at: int, steps: int, lead: int) -> list[list[float]]:
    """Pictures, actions, rewards, discounts and ends of one row, step by step."""
    known = int(min(lead, lane[at]["age"]))
    rows = lane[at - known :]
    pictures, actions, rewards, discounts, lasts = [rows[0]["picture"]] * (lead - known + 1), [], [], [], []
    actions, rewards, discounts, lasts = [-1.0] * (lead - known), [0.0] * (lead - known), [1.0] * (lead - known), [0.0] * (lead - known)
    for row in rows:
        if len(actions) == steps:
            break
        actions.append(row["action"])
        rewards.append(row["reward"])
        discounts.append(row["discount"])
        lasts.append(row["last"])
        pictures.append(row["next"])
        if row["last"]:
            break
    short = steps - len(actions)
    assert not short or lasts[-1], "this clip is not whole"
    pictures += pictures[-1:] * short
    return [[number % 256 for number in pictures], *(part + [0.0] * short for part in (actions, rewards, discounts, lasts))]


@pytest.mark.parametrize(("steps", "lead"), [(1, 0), (6, 0), (6, 3), (3, 3), (0, 0), (12, 2)])
@pytest.mark.parametrize("capacity", [192, 4_000])
def test_every_clip_is_that_of_a_list_of_everything(steps: int, lead: int, capacity: int) -> None:
    memory, story = played(120, seed=steps, capacity=capacity)
    wanted = []
    for lane in story:
        slots = sum(2 if row["last"] else 1 for row in lane)
        held, number = slots - capacity // LANES, 0
        numbers = []
        for row in lane:
            numbers.append(number)
            number += 2 if row["last"] else 1
        for at, row in enumerate(lane):
            whole = at + steps - lead < len(lane) or any(later["last"] for later in lane[at:])
            if whole and numbers[at] - min(lead, row["age"]) >= held:
                wanted.append(clip_by_hand(lane, at, steps, lead))
    assert memory.starts(steps, lead) == len(wanted) > 100
    found = memory.clips(torch.arange(len(wanted)), steps, lead)
    assert (found.frames.dtype, found.actions.dtype, found.last.dtype) == (torch.uint8, torch.int64, torch.bool)
    for row, (pictures, actions, rewards, discounts, lasts) in enumerate(wanted):
        assert found.frames[row].flatten(1).tolist() == [[number] * 4 for number in pictures]
        assert found.actions[row].tolist() == actions
        torch.testing.assert_close(found.rewards[row], torch.tensor(rewards))
        torch.testing.assert_close(found.discounts[row], torch.tensor(discounts))
        assert found.last[row].tolist() == [bool(last) for last in lasts]


def test_contexts_tell_how_many_pictures_are_known() -> None:
    memory, _ = played(120, seed=1, capacity=192)
    clip, known = memory.contexts(500, 5)
    assert clip.frames.shape == (500, 5, *SHAPE)
    assert clip.actions.shape == (500, 4)
    assert set(known.tolist()) == {1, 2, 3, 4, 5}
    numbers = clip.frames[:, :, 0, 0, 0].int()
    repeated = (numbers == numbers[:, :1]).sum(1)
    assert torch.equal(repeated, 6 - known), "the first picture stands as often as others are missing"
    assert (frame_weights(clip) == 1).all(), "a context holds no end"


def test_contexts_of_openings_show_one_picture() -> None:
    memory, story = played(120, seed=1, capacity=4_000)
    clip, known = memory.contexts(300, 4, opening=True)
    assert (known == 1).all()
    openings = {row["picture"] % 256 for lane in story for row in lane if row["age"] == 0}
    assert {float(number) for number in clip.frames[:, -1, 0, 0, 0]} == openings


def test_contexts_without_an_opening_are_any() -> None:
    memory = Trajectories(LANES * 64, SHAPE)
    numbers, nothing = torch.arange(LANES), torch.zeros(LANES)
    for _ in range(80):
        memory.append(picture(numbers), numbers, nothing, nothing + 1, None, picture(numbers))
    _, known = memory.contexts(20, 4, opening=True)
    assert (known == 4).all()


def test_draws_follow_the_generator() -> None:
    memory, _ = played(60, seed=2, capacity=4_000)
    first, second, other = (memory.contexts(9, 3, generator=torch.Generator().manual_seed(seed))[0].frames for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("steps", [0, 7, 120])
def test_what_is_loaded_goes_on_as_what_was_saved(steps: int) -> None:
    memory, _ = played(steps, seed=5, capacity=192)
    state = memory.state_dict()
    copy = {"shape": state["shape"], "lanes": {lane: {k: clone(v) for k, v in saved.items()} for lane, saved in state["lanes"].items()}}
    other = Trajectories(192, SHAPE)
    other.load_state_dict(copy)
    for each in (memory, other):
        for t in range(3):
            numbers, nothing = torch.arange(LANES) + t, torch.zeros(LANES)
            each.append(picture(numbers), numbers, nothing, nothing, torch.tensor([t == 1, False, False]), picture(numbers + 1))
    assert memory.starts(4, 2) == other.starts(4, 2)
    every = torch.arange(memory.starts(4, 2))
    for mine, theirs in zip(memory.clips(every, 4, 2), other.clips(every, 4, 2)):
        assert torch.equal(mine, theirs)


def clone(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def test_memory_is_as_large_as_promised() -> None:
    memory, _ = played(120, seed=1, capacity=192)
    assert memory.nbytes == 3 * 64 * memory.bytes_per_slot == memory.required_bytes(1_000)
    assert memory.required_bytes(10) == 20 * memory.bytes_per_slot


@pytest.mark.parametrize(
    ("capacity", "word"), [(0, "agent.capacity must be at least 1"), (100, "agent.capacity must be at least 192 for 3")]
)
def test_too_small_a_memory_is_refused(capacity: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        played(1, seed=0, capacity=capacity)


def test_another_shape_is_refused() -> None:
    memory, _ = played(3, seed=0, capacity=192)
    with pytest.raises(UserError, match="the saved trajectories have"):
        Trajectories(193, SHAPE).load_state_dict(memory.state_dict())


def test_spread_takes_pictures_that_were_acted_on() -> None:
    memory, story = played(30, seed=6, capacity=4_000)
    acted_on = [row["picture"] % 256 for lane in story for row in lane]
    assert [float(number) for number in memory.spread(10**6)[:, 0, 0, 0]] == acted_on
    assert memory.spread(7).shape == (7, *SHAPE)
    drawn = memory.sample(500)[:, 0, 0, 0].tolist()
    assert len(set(drawn)) > 40
    assert set(drawn) <= set(acted_on)
    assert isinstance(memory.clips(torch.tensor([0]), 1), Clip)
