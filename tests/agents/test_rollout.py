import itertools

import pytest
import torch
from lanes import CPU, SPEC, steps_of

from agents.api import Decision
from agents.nets import patches
from agents.rollout import Carry, Rollout
from agents.stack import empty_stack, push_frame

K = 3


class Watcher:
    """Notes the frames that each decision saw; its state counts the steps of the episode."""

    def initial(self, lanes):
        return Carry(empty_stack(lanes, K, SPEC.obs_shape, CPU), torch.zeros(lanes, 1, 2))

    def act(self, step, carry):
        frames, stack = push_frame(carry.stack, step.obs, step.last)
        state = torch.where(step.last.view(-1, 1, 1), 0.0, carry.state) + 1
        return Decision(torch.arange(len(frames)), Carry(stack, state), {"frames": frames, **carry._asdict()})


def fill(rollout, steps, carry=None):
    watcher, decisions = Watcher(), []
    carry = watcher.initial(steps[0].last.shape[0]) if carry is None else carry
    for step, after in itertools.pairwise(steps):
        decisions.append(watcher.act(step, carry))
        rollout.append(step, decisions[-1], after)
        carry = decisions[-1].carry
    return decisions


def test_steps_come_out_in_their_order():
    steps = steps_of(2, [[0, 0], [0, 1], [0, 0]], [[1, 0], [1, 1], [1, 1]])
    rollout = Rollout(3)
    decisions = fill(rollout, steps)
    assert rollout.full
    batch = rollout.take()
    assert torch.equal(batch.reward, torch.stack([step.reward for step in steps[1:]]))
    assert batch.discount.tolist() == [[1, 0], [1, 1], [1, 1]]
    assert batch.last.tolist() == [[False, False], [False, True], [False, False]]
    assert batch.opens.tolist() == [[True, True], [False, False], [False, True]]
    assert batch.action.tolist() == [[0, 1]] * 3
    assert not batch.bonus.any()
    assert not batch.state.any()
    assert [list(notes) for notes in batch.notes] == [["frames"]] * 2
    assert all(notes["frames"] is decision.notes["frames"] for notes, decision in zip(batch.notes, decisions[1:]))
    assert len(rollout) == 0


def test_first_stack_is_rebuilt_as_acting_saw_it_across_rollouts_and_ends():
    torch.manual_seed(1)
    ends = (torch.rand(40, 4) < 0.2).int()
    ends[ends.all(1)] = 0
    steps = steps_of(4, ends.tolist(), torch.ones(40, 4).int().tolist())
    rollout, carry, start = Rollout(4), None, 0
    while start < 40:
        decisions = fill(rollout, steps[start : start + 5], carry)
        batch = rollout.take()
        assert torch.equal(batch.frames, decisions[0].notes["frames"])
        expected = carry.state if carry is not None else torch.zeros_like(batch.state)
        assert torch.equal(batch.state, expected)
        carry, start = decisions[-1].carry, start + 4


def test_every_stack_of_acting_can_be_rebuilt_from_single_frames():
    """Frame by frame in plain words: the K last frames of the same episode, zeros before its first."""
    torch.manual_seed(2)
    ends = (torch.rand(12, 2) < 0.3).int().tolist()
    steps = steps_of(2, ends, torch.ones(12, 2).int().tolist())
    watcher = Watcher()
    carry, seen = watcher.initial(2), [[], []]
    for step in steps:
        decision = watcher.act(step, carry)
        for lane in range(2):
            seen[lane] = ([] if step.last[lane] else seen[lane]) + [step.obs[lane]]
            stack = ([torch.zeros_like(step.obs[lane])] * K + seen[lane])[-K:]
            assert torch.equal(decision.notes["frames"][lane], torch.stack(stack))
            assert torch.equal(patches(decision.notes["frames"], 1)[lane], torch.cat(stack))
        carry = decision.carry


def test_values_are_asked_for_where_a_lane_was_cut_and_at_the_end():
    last = [[0, 1], [1, 0], [0, 0], [0, 0]]
    discount = [[1, 1], [0, 1], [0, 1], [1, 1]]
    steps = steps_of(2, last, discount)
    rollout = Rollout(4)
    decisions = fill(rollout, steps)
    limit, final = rollout.take().successors  # the termination in between needs no value
    assert (limit.t, limit.shown, final.t, final.shown) == (0, False, 3, True)
    assert limit.obs is steps[1].next_obs
    assert limit.carry is decisions[0].carry
    assert final.obs is steps[4].obs
    assert final.carry is decisions[3].carry


def test_all_lanes_cut_at_once_close_it_and_what_was_before_is_forgotten():
    steps = steps_of(2, [[0, 0], [1, 1], [0, 0], [0, 0]], [[1, 1], [1, 0], [1, 1], [1, 1]])
    rollout = Rollout(4)
    decisions = fill(rollout, steps[:3])
    assert rollout.full
    assert len(rollout) == 2
    batch = rollout.take()
    assert [successor.t for successor in batch.successors] == [1]
    fill(rollout, steps[2:], decisions[-1].carry)
    assert not rollout.full
    batch = rollout.take()
    assert batch.opens[0].all()
    assert not batch.frames[:, :-1].any()


def test_a_full_rollout_takes_no_more():
    steps = steps_of(2, [[0, 0], [0, 0]], [[1, 1], [1, 1]])
    rollout = Rollout(1)
    with pytest.raises(RuntimeError, match="full"):
        fill(rollout, steps)


def test_bonuses_belong_to_the_oldest_steps_without_one():
    steps = steps_of(2, [[0, 0], [0, 0]], [[1, 1], [1, 1]])
    rollout = Rollout(2)
    fill(rollout, steps)
    rollout.add_bonus(torch.tensor([1.0, 2.0]))
    rollout.add_bonus(torch.tensor([3.0, 4.0]))
    assert rollout.take().bonus.tolist() == [[1, 2], [3, 4]]
