"""Dreams in a perfect simulator are the world itself; they begin where play has been and end as the contract of environments has it."""

import pytest
import torch
from perfect import PerfectCatch

from agents.trajectories import Trajectories
from envs.api import UserError, VectorEnv, check_step
from envs.toy import Catch
from generative.dream import DreamEnv

SIZE, LANES, HORIZON = 7, 6, 9


def played(env, ticks, seed=0):
    """Random play, remembered, and every step of it."""
    memory, step, story = Trajectories(10_000, env.spec.obs_shape), env.reset(seed), []
    for _ in range(ticks):
        action = torch.randint(env.spec.num_actions, (env.num_envs,))
        after = env.step(action)
        story.append((step, action, after))
        memory.append(step.obs, action, after.reward, after.discount, after.last, after.next_obs)
        step = after
    return memory, story


@pytest.fixture
def memory():
    return played(Catch(4, "cpu", size=SIZE), 40)[0]


def dreams(memory, simulator=None, num_envs=LANES, horizon=HORIZON, context=3):
    env = Catch(1, "cpu", size=SIZE)
    return DreamEnv(simulator or PerfectCatch(SIZE), memory, env.spec, num_envs, horizon, context, "cpu")


class At:
    """Starts at one step of the play that is remembered, all lanes of it."""

    def __init__(self, story, t):
        self.step = story[t][0]

    def contexts(self, n, length, opening=False, generator=None):
        clip, known = Trajectories.contexts(self.memory, n, length, opening, generator)
        return clip._replace(frames=self.step.obs.unsqueeze(1).expand(-1, length, -1, -1, -1)), known


def test_a_dream_of_a_perfect_simulator_is_what_was_played():
    env = Catch(4, "cpu", size=SIZE)
    memory, story = played(env, 12)
    starts = At(story, 2)
    starts.memory = memory
    dream = dreams(starts, num_envs=4, horizon=8)
    first = dream.reset(0)
    assert torch.equal(first.obs, story[2][0].obs)
    running, compared = torch.ones(4, dtype=torch.bool), 0
    for _, action, after in story[2:10]:
        seen = dream.step(action)
        assert torch.equal(seen.next_obs[running], after.next_obs[running])
        assert torch.equal(seen.reward[running], after.reward[running])
        compared += int(running.sum())
        if not running.any() or len(story) == 0:
            break
        assert torch.equal(seen.last[running], after.last[running])
        running &= ~after.last
    assert compared > 8


def test_dreams_keep_the_contract_of_environments(memory):
    dream = dreams(memory)
    assert isinstance(dream, VectorEnv)
    assert dream.spec.name == "dream of Catch"
    step = dream.reset(3)
    check_step(step, dream.spec)
    assert step.last.all()
    assert step.next_obs is step.obs
    ends = 0
    for t in range(1, 4 * HORIZON):
        step = dream.step(torch.randint(3, (LANES,)))
        check_step(step, dream.spec)
        if t % HORIZON == 0:
            assert step.last.all()
            assert set(step.discount.tolist()) <= {0.0, 1.0}
        else:
            assert torch.equal(step.last, step.discount < 0.5)
            ends += int(step.last.sum())
            balls = step.obs[step.last, 0, 0].sum(1)
            assert (balls == 255).all(), "after an end an episode opens: the ball is in the top row"
    assert ends > LANES


def test_all_dreams_begin_together_at_the_horizon(memory):
    dream = dreams(memory)
    dream.reset(0)
    first = dream.context
    for _ in range(HORIZON):
        step = dream.step(torch.ones(LANES, dtype=torch.int64))
    assert dream.context is not first
    assert torch.equal(step.obs, dream.context.frames[:, -1])
    assert not torch.equal(step.obs, step.next_obs)


def test_a_seed_is_a_dream(memory):
    actions = torch.randint(3, (2 * HORIZON, LANES))

    def dreamt(seed):
        dream = dreams(memory)
        steps = [dream.reset(seed), *(dream.step(action) for action in actions)]
        return torch.stack([step.obs for step in steps])

    assert torch.equal(dreamt(1), dreamt(1))
    assert not torch.equal(dreamt(1), dreamt(2))


def test_lanes_that_end_early_leave_the_others_alone(memory):
    """A lane's dream is the same whether or not its neighbours end."""

    class Ends(PerfectCatch):
        def step(self, state, action):
            *rest, discount = super().step(state, action)
            return *rest, discount * (torch.arange(len(action)) != 1)

    actions = torch.randint(3, (4, LANES))
    plain, ending = dreams(memory), dreams(memory, Ends(SIZE))
    plain.reset(5)
    ending.reset(5)
    running = torch.ones(LANES, dtype=torch.bool)
    running[1] = False
    for action in actions:
        one, other = plain.step(action), ending.step(action)
        assert other.last[1]
        assert torch.equal(one.next_obs[running], other.next_obs[running])
        running &= ~one.last
    assert running.any()


def test_expected_discounts_are_passed_on(memory):
    class Doubts(PerfectCatch):
        def step(self, state, action):
            *rest, discount = super().step(state, action)
            return *rest, 0.25 + 0.5 * discount

    dream = dreams(memory, Doubts(SIZE), horizon=2, num_envs=60)
    dream.reset(0)
    for cut in (False, True):
        step = dream.step(torch.ones(60, dtype=torch.int64))
        landed = step.reward != 0
        assert landed.any()
        assert torch.equal(step.discount, torch.where(landed, 0.25, 0.75))
        assert torch.equal(step.last, landed | cut)


def test_the_context_and_the_state_lie_on_the_device(memory):
    dream = dreams(memory)
    dream.reset(0)
    assert dream.context.frames.shape == (LANES, 3, 1, SIZE, SIZE)
    assert dream.known.shape == (LANES,)


@pytest.mark.parametrize("knob", ["num_envs", "horizon", "context"])
def test_numbers_that_make_no_dream_are_refused(memory, knob):
    with pytest.raises(UserError, match=f"{knob} of dreams must be at least 1"):
        dreams(memory, **{knob: 0})


def test_a_context_shorter_than_the_simulator_looks_is_refused(memory):
    simulator = PerfectCatch(SIZE)
    simulator.context_frames = 4
    with pytest.raises(UserError, match="context of dreams must be at least 4, got 3"):
        dreams(memory, simulator)


def test_steps_come_in_turn(memory):
    dream = dreams(memory)
    with pytest.raises(RuntimeError, match="send comes after reset"):
        dream.send(torch.zeros(LANES, dtype=torch.int64))
    dream.reset(0)
    with pytest.raises(RuntimeError, match="recv comes after send"):
        dream.recv()
    with pytest.raises(ValueError, match=r"0\.\.2"):
        dream.send(torch.full((LANES,), 3))
    dream.close()
    dream.close()
    with pytest.raises(RuntimeError):
        dream.step(torch.zeros(LANES, dtype=torch.int64))
