import pytest
import torch

from agents.episode import FIRST_STEPS, OpenEpisodes
from agents.stack import empty_stack, push_frame

CPU = torch.device("cpu")


def test_lanes_are_taken_out_whole_and_in_order():
    episodes = OpenEpisodes()
    for t in range(3):
        episodes.append(reward=torch.tensor([t, 10 + t]), key=torch.full((2, 4), float(t)))
    taken = episodes.take(1)
    assert taken["reward"].tolist() == [10, 11, 12]
    assert taken["key"].shape == (3, 4)
    episodes.append(reward=torch.tensor([3, 20]), key=torch.zeros(2, 4))
    assert episodes.take(1)["reward"].tolist() == [20]
    assert episodes.take(0)["reward"].tolist() == [0, 1, 2, 3]


def test_dropped_steps_are_gone():
    episodes = OpenEpisodes()
    episodes.append(reward=torch.tensor([1, 2]))
    episodes.drop(0)
    episodes.append(reward=torch.tensor([3, 4]))
    assert episodes.take(0)["reward"].tolist() == [3]
    assert episodes.take(1)["reward"].tolist() == [2, 4]


def test_long_episodes_outgrow_the_first_buffer():
    episodes = OpenEpisodes()
    for t in range(3 * FIRST_STEPS):
        episodes.append(reward=torch.tensor([t]))
    assert episodes.take(0)["reward"].tolist() == list(range(3 * FIRST_STEPS))


def test_what_was_taken_is_not_overwritten():
    episodes = OpenEpisodes()
    episodes.append(reward=torch.tensor([1]))
    taken = episodes.take(0)
    episodes.append(reward=torch.tensor([2]))
    assert taken["reward"].tolist() == [1]


def test_number_of_lanes_may_change_only_between_episodes():
    episodes = OpenEpisodes()
    episodes.append(reward=torch.zeros(2))
    with pytest.raises(ValueError, match="lanes"):
        episodes.append(reward=torch.zeros(3))
    episodes.drop(0)
    episodes.drop(1)
    episodes.append(reward=torch.zeros(3))
    assert episodes.take(2)["reward"].shape == (1,)


def frame(value: int) -> torch.Tensor:
    return torch.full((2, 1, 2, 2), value, dtype=torch.uint8)


def test_stack_holds_the_last_frames_oldest_first_and_zeros_before_an_episode():
    stack, opens = empty_stack(2, 3, (1, 2, 2), CPU), torch.tensor([True, True])
    frames, stack = push_frame(stack, frame(1), opens)
    assert frames[:, :, 0, 0, 0].tolist() == [[0, 0, 1]] * 2
    frames, stack = push_frame(stack, frame(2), ~opens)
    frames, stack = push_frame(stack, frame(3), torch.tensor([False, True]))
    assert frames[:, :, 0, 0, 0].tolist() == [[1, 2, 3], [0, 0, 3]]
    assert stack[:, :, 0, 0, 0].tolist() == [[2, 3], [0, 3]]


def test_a_stack_of_one_frame_is_the_frame():
    frames, stack = push_frame(empty_stack(2, 1, (1, 2, 2), CPU), frame(7), torch.tensor([True, False]))
    assert frames.shape == (2, 1, 1, 2, 2)
    assert stack.shape == (2, 0, 1, 2, 2)
