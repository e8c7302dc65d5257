import itertools

import pytest
import torch

from agents.api import Decision
from agents.loop import cut, evaluate, play, ticks_for
from agents.random import RandomAgent
from envs.api import first_step
from envs.toy import Catch, Ring

CPU = torch.device("cpu")


class Recorder(RandomAgent):
    """Random play that remembers in which order it was called and what it saw."""

    def __init__(self, spec):
        super().__init__(spec, CPU)
        self.calls, self.seen, self.carries = [], [], []

    def initial(self, num_envs):
        return torch.zeros(num_envs)

    def act(self, step, carry, explore):
        self.calls.append("act" if explore else "greedy")
        carry = torch.where(step.last, 0.0, carry) + 1
        self.carries.append(carry)
        return Decision(super().act(step, None, explore).action, carry, {"note": carry})

    def observe(self, step, decision, after):
        self.calls.append("observe")
        self.seen.append((step, decision, after))

    def learn(self):
        self.calls.append("learn")
        return {"count": float(len(self.calls))}


def test_order_of_calls_and_last_lesson():
    env = Catch(2, CPU)
    agent = Recorder(env.spec)
    ticks = list(play(env, agent, frames=6, seed=0))
    assert agent.calls == ["act", "learn", "observe"] * 3 + ["learn"]
    assert [tick.played for tick in ticks] == [2, 4, 6]
    assert all(part >= 0 for tick in ticks for part in tick.seconds)


def test_budget_is_rounded_up_to_whole_ticks():
    env = Catch(4, CPU)
    assert ticks_for(9, env) == 3
    assert [tick.played for tick in play(env, RandomAgent(env.spec, CPU), frames=9, seed=0)] == [4, 8, 12]


def test_only_the_last_observation_is_cut():
    env = Ring(3, CPU)
    agent = Recorder(env.spec)
    ticks = list(play(env, agent, frames=15, seed=0))
    assert [bool(after.last.all()) for _, _, after in agent.seen] == [False] * 4 + [True]
    assert not ticks[-1].after.last.any()
    final = agent.seen[-1][2]
    assert final.discount.tolist() == [1, 1, 1]
    assert final.next_obs is not final.obs
    assert torch.equal(final.next_obs, ticks[-1].after.next_obs)


def test_what_is_acted_on_is_what_came_after():
    env = Catch(2, CPU)
    agent = Recorder(env.spec)
    ticks = list(play(env, agent, frames=60, seed=0))
    for before, tick in itertools.pairwise(ticks):
        assert tick.step is before.after
    lived = torch.stack(agent.carries)
    opened = torch.stack([tick.step.last for tick in ticks])
    assert torch.equal(lived == 1, opened)


def test_listener_ends_the_loop_with_one_more_tick_that_is_cut():
    env = Catch(2, CPU)
    agent = Recorder(env.spec)
    ticks = play(env, agent, frames=1000, seed=0)
    next(ticks)
    final = ticks.send(True)
    assert final.played == 4
    assert bool(agent.seen[-1][2].last.all())
    with pytest.raises(StopIteration):
        next(ticks)
    assert agent.calls[-1] == "learn"


def test_stopping_on_the_last_tick_plays_no_more():
    env = Catch(2, CPU)
    agent = Recorder(env.spec)
    ticks = play(env, agent, frames=4, seed=0)
    next(ticks)
    assert next(ticks).played == 4
    with pytest.raises(StopIteration):
        ticks.send(True)
    assert [bool(after.last.all()) for _, _, after in agent.seen] == [False, True]


def test_failing_lesson_leaves_no_step_pending():
    env = Catch(2, CPU)

    class Broken(RandomAgent):
        def learn(self):
            raise FloatingPointError("loss is not finite")

    with pytest.raises(FloatingPointError):
        next(play(env, Broken(env.spec, CPU), frames=10, seed=0))
    env.step(torch.zeros(2, dtype=torch.int64))


def test_evaluation_gives_every_lane_its_quota_and_never_learns():
    env = Catch(3, CPU)
    agent = Recorder(env.spec)
    ended = sum(tick.after.last for tick in evaluate(env, agent, episodes_per_lane=4, seed=0))
    assert int(ended.min()) == 4
    assert set(agent.calls) == {"greedy"}


def test_evaluation_epsilon_is_applied_outside_the_agent():
    env = Catch(500, CPU)

    class Left(RandomAgent):
        def act(self, step, carry, explore):
            return Decision(torch.zeros(step.last.shape[0], dtype=torch.int64), None, {})

    torch.manual_seed(0)
    actions = torch.cat([tick.decision.action for tick in evaluate(env, Left(env.spec, CPU), 1, seed=0, epsilon=0.3)])
    moved = 1 - 1 / env.spec.num_actions
    assert float((actions != 0).float().mean()) == pytest.approx(0.3 * moved, abs=0.03)


def test_cut_keeps_a_termination_a_termination():
    step = first_step(torch.zeros(2, 1, 1, 1, dtype=torch.uint8))._replace(
        discount=torch.tensor([0.0, 1.0]), last=torch.tensor([True, False])
    )
    assert cut(step).discount.tolist() == [0, 1]
    assert cut(step).last.tolist() == [True, True]
