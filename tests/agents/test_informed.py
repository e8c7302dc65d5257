"""Informed exploration: the kernel and the choice against brute force, what is remembered and shown, and how much more it sees."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from foretold import Deaf, PerfectMaze, PerfectToy
from lanes import DISCOUNTS, ENDS, steps_of
from lanes import SPEC as MADE_UP
from whole import CPU, SPEC, assert_equal, frame, stopped_and_resumed

from agents.api import Agent
from agents.dqn import DQN
from agents.informed import InformedExploration, _differences, _differences_on_host, visit_counts
from agents.loop import evaluate, play
from envs.api import Step, UserError, first_step
from envs.gridmaze import GridMaze
from envs.toy import Catch, Ring
from generative.api import Simulator
from generative.clips import ClipData
from generative.recording import ClipWriter
from generative.simulator import FrameSimulator

GREY = np.array([0.299, 0.587, 0.114])


def agent(spec, simulator, **knobs):
    given = {"capacity": 4000, "stack_frames": 1, "precision": "float32", "learning_starts_frames": 10**9, "simulator": simulator}
    return DQN(spec, CPU, **given | knobs)


def picture(obs):
    """What is compared, as float64: grey, and means of 2x2 where the picture has 168x168."""
    grey = np.tensordot(GREY, obs, 1) if len(obs) == 3 else obs[0].astype(float)
    if len(grey) == 168:
        grey = grey.reshape(84, 2, 84, 2).mean((1, 3))
    return grey.round()


def brute_visits(candidate, seen, delta, sigma):
    """n_D as the paper writes it."""
    total = 0.0
    for other in seen:
        total += math.exp(-np.minimum(np.maximum((candidate - other) ** 2 - delta, 0), 1).sum() / sigma)
    return total


@pytest.mark.parametrize("delta", [0, 1, 48, 49, 50, 65_024])
@pytest.mark.parametrize("sigma", [0.5, 100.0])
def test_the_kernel_is_the_papers(delta, sigma):
    generator = np.random.default_rng(delta)
    seen = generator.integers(0, 256, (2, 5, 30), dtype=np.uint8)
    foretold = (seen[:, :3].astype(int) + generator.integers(-9, 10, (2, 3, 30))).clip(0, 255).astype(np.uint8)
    foretold[0, 0, :2], seen[0, :, :2] = (0, 255), (255, 0)
    known = generator.random((2, 5)) < 0.7
    parts = torch.from_numpy(foretold), torch.from_numpy(seen), math.isqrt(delta)
    assert torch.equal(_differences(*parts), _differences_on_host(*parts))  # that of other devices and that of this one
    got = visit_counts(*(torch.from_numpy(part) for part in (foretold, seen, known)), delta, sigma)
    for lane, action in itertools.product(range(2), range(3)):
        expected = brute_visits(foretold[lane, action].astype(float), seen[lane, known[lane]].astype(float), delta, sigma)
        assert float(got[lane, action]) == pytest.approx(expected, rel=1e-12)
    assert got.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "lanes", "ticks", "knobs"),
    [
        (lambda lanes: Catch(lanes, CPU, size=5), 3, 60, {"visit_frames": 7, "visit_sigma": 2.0}),
        (lambda lanes: Catch(lanes, CPU, size=5), 3, 20, {"visit_frames": 1}),
        (lambda lanes: Catch(lanes, CPU, size=5), 100, 6, {"visit_frames": 4, "visit_delta": 0}),  # more than are foretold at once
        (lambda lanes: GridMaze(lanes, CPU, size=7, pixels_per_cell=1), 2, 80, {"visit_frames": 12, "visit_sigma": 1.0}),
        (lambda lanes: GridMaze(lanes, CPU, size=7, pixels_per_cell=24), 2, 25, {}),
        (lambda lanes: GridMaze(lanes, CPU, size=5, pixels_per_cell=1), 4, 150, {"visit_frames": 9, "epsilon_start": 0.4}),
    ],
    ids=["catch", "one-picture", "many-lanes", "colours", "large", "some-lanes"],
)
def test_of_all_actions_one_with_the_least_visited_picture_is_taken(make, lanes, ticks, knobs):
    """Brute force: every action tried in a perfect simulator, its picture compared with the last d that the lane has seen."""
    env, judge = make(lanes), make(1)

    def perfect():
        return PerfectToy(judge, 5**3) if isinstance(judge, Catch) else PerfectMaze(judge)

    learner, oracle = agent(env.spec, perfect(), **knobs), perfect()
    d, delta, sigma = knobs.get("visit_frames", 20), knobs.get("visit_delta", 50), knobs.get("visit_sigma", 100.0)
    seen, differences, chosen, opened = [[] for _ in range(lanes)], 0, 0, 0
    for tick in play(env, learner, ticks * lanes, seed=3):
        for lane in range(lanes):
            if tick.step.last[lane]:
                seen[lane].append(picture(tick.step.obs[lane].numpy()))
            visits = tick.decision.notes.get("visits", torch.full((lanes, 1), math.nan))[lane].tolist()
            if math.isnan(visits[0]):  # greedy
                seen[lane].append(picture(tick.after.next_obs[lane].numpy()))
                continue
            state, counts = oracle.read(tick.step.obs[lane : lane + 1]), []
            for action in range(env.spec.num_actions):
                _, after = oracle.move(state, torch.tensor([action]))
                counts.append(brute_visits(picture(after[0].numpy()), seen[lane][-d:], delta, sigma))
            assert visits == pytest.approx(counts, rel=1e-9)
            assert counts[tick.decision.action[lane]] == pytest.approx(min(counts), rel=1e-9)
            differences, chosen = differences + (max(counts) > min(counts) * 1.001), chosen + 1
            opened += bool(tick.step.last[lane]) and not tick.step.last.all()
            seen[lane].append(picture(tick.after.next_obs[lane].numpy()))
    assert differences > 0.5 * chosen or d == 1
    assert chosen == ticks * lanes or (chosen == pytest.approx(0.4 * ticks * lanes, rel=0.2) and opened > 3)


def test_simulators_are_shown_what_they_are_fitted_to(tmp_path):
    """At every step the last K frames and what led from one to the next are those that clips of a recording have."""
    steps = steps_of(3, ENDS * 3, DISCOUNTS * 3)
    simulator, k = Deaf(MADE_UP, 4), 4
    learner = agent(MADE_UP, simulator)
    carry = learner.initial(3)
    with ClipWriter(tmp_path / "clips", MADE_UP, 3, {}) as writer:
        for step, after in itertools.pairwise(steps):
            decision = learner.act(step, carry, explore=True)
            learner.observe(step, decision, after)
            writer.append(step, decision.action, after)
            carry = decision.carry
        writer.end_part()
    data = ClipData(tmp_path / "clips")
    assert len(simulator.shown) == len(steps) - 1
    for t in range(len(steps) - 1):
        clip, shown = data.clips_at(0, t, k, k - 1), simulator.shown[t]
        assert torch.equal(shown.frames, clip.frames[:, :k])
        for name in ("actions", "rewards", "discounts", "last"):
            assert torch.equal(getattr(shown, name), getattr(clip, name)[:, : k - 1]), name
    assert any((shown.discounts == 0).any() for shown in simulator.shown)  # a lost life


class Fixed(Deaf):
    """Foretells an empty picture of the first action and a full one of the second."""

    def step(self, state, action):
        frames = (255 * action).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *self.obs_shape)
        return state, frames, None, None


def test_ties_are_drawn_also_where_sums_differ_by_rounding():
    """Pictures with m pixels lit and with 16 - m, seen in some order: both actions are as new."""
    spec, lanes, rounded = Ring(1, CPU, length=16).spec, 100, 0
    going_on, no_reward = torch.zeros(lanes, dtype=torch.bool), torch.zeros(lanes)
    for _ in range(10):
        explorer = InformedExploration(Fixed(spec), spec, CPU, 8, 50, 3.0)
        for count in torch.tensor([1, 3, 6, 7, 9, 10, 13, 15])[torch.randperm(8)]:
            lit = ((torch.arange(16) < count).to(torch.uint8) * 255).view(1, 1, 4, 4).expand(lanes, -1, -1, -1)
            step = Step(lit, no_reward, no_reward + 1, going_on, lit)
            explorer.observe(step, None, step)
        past = explorer.initial(lanes, 1).past._replace(frames=step.obs.unsqueeze(1))
        action, visits = explorer.choose(past, step, torch.arange(lanes))
        torch.testing.assert_close(visits[:, 0], visits[:, 1], rtol=1e-12, atol=0)
        assert float(action.float().mean()) == pytest.approx(0.5, abs=0.2)
        rounded += int(visits[0, 0] != visits[0, 1])
    assert rounded > 2


def test_a_simulator_that_is_deaf_to_actions_leaves_it_to_chance():
    many = frame(9, 9000)
    learner = agent(SPEC, Deaf(SPEC))
    action = learner.act(first_step(many), learner.initial(9000), explore=True).action
    assert [float((action == one).float().mean()) for one in range(3)] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_only_lanes_that_explore_are_foretold():
    torch.manual_seed(1)
    env, lanes = Catch(400, CPU), 400
    simulator = PerfectToy(Catch(1, CPU), 7**3)
    learner, plain = agent(env.spec, simulator, epsilon_start=0.3, capacity=8000), agent(env.spec, None)
    plain.online.load_state_dict(learner.online.state_dict())
    step, carry, asked = env.reset(1), learner.initial(lanes), 0
    for _ in range(6):
        decision = learner.act(step, carry, explore=True)
        explored = ~decision.notes["visits"].isnan().any(1)
        asked += int(explored.sum())
        assert simulator.stepped == 3 * asked
        greedy = plain.act(step, plain.initial(lanes), explore=False).action
        assert torch.equal(decision.action[~explored], greedy[~explored])
        assert not torch.equal(decision.action[explored], greedy[explored])
        after = env.step(decision.action)
        learner.observe(step, decision, after)
        step, carry = after, decision.carry
    assert asked / (6 * lanes) == pytest.approx(0.3, abs=0.04)
    metrics = learner.learn()
    assert 0 < float(metrics["visits/least"]) < 7
    assert float(metrics["visits/spread"]) > 0
    assert "visits/least" not in learner.learn()


def test_figures_are_means_over_those_that_explored():
    learner = agent(SPEC, Deaf(SPEC))
    step = first_step(frame(1, 3))
    decision = learner.act(step, learner.initial(3), explore=True)
    visits = torch.tensor([[1.0, 3, 2], [math.nan] * 3, [4, 4, 4]], dtype=torch.float64)
    learner.observe(step, decision._replace(notes={"visits": visits}), step)
    learner.observe(step, decision._replace(notes={}), step)
    metrics = learner.learn()
    assert (float(metrics["visits/least"]), float(metrics["visits/spread"])) == (2.5, 1.0)


@pytest.mark.parametrize("explore", [False, True])
def test_acting_changes_nothing_and_evaluation_asks_nobody(explore):
    env = Catch(4, CPU)
    simulator = PerfectToy(Catch(1, CPU), 7**3, context_frames=3)
    schedule = {"epsilon_end": 0.5, "epsilon_frames": 1, "learning_starts_frames": 20, "update_frames": 8}
    learner = agent(env.spec, simulator, stack_frames=2, **schedule)
    for _ in play(env, learner, 200, seed=0):
        pass
    before, asked = copy.deepcopy(learner.state_dict()), simulator.stepped
    step, carry = env.reset(1), learner.initial(4)
    for _ in range(3):
        kept = copy.deepcopy(carry)
        decision = learner.act(step, carry, explore)
        assert torch.equal(kept.stack, carry.stack)
        assert all(torch.equal(*parts) for parts in zip(kept.past, carry.past))
        assert torch.equal(kept.action, carry.action)
        step, carry = env.step(decision.action), decision.carry
    assert_equal(learner.state_dict(), before)
    assert (simulator.stepped > asked) == explore
    if not explore:
        other = agent(env.spec, None, stack_frames=2)
        other.online.load_state_dict(learner.online.state_dict())
        actions = []
        for player in (learner, other):
            actions.append(torch.stack([tick.decision.action for tick in evaluate(Catch(2, CPU), player, 3, seed=4)]))  # of other lanes
        assert torch.equal(*actions)
        assert simulator.stepped == asked


@pytest.mark.parametrize("knobs", [{}, {"epsilon_start": 0.4, "epsilon_end": 0.2, "epsilon_frames": 300}])
def test_stopped_and_resumed_equals_never_stopped(knobs):
    small = {"learning_starts_frames": 80, "update_frames": 16, "target_frames": 100, "stack_frames": 2, "visit_frames": 9} | knobs

    def build(spec):
        return agent(spec, PerfectToy(Catch(1, CPU), 7**3, context_frames=2), **small)

    _, states = stopped_and_resumed(build, 2)
    assert states[0]["informed"]["written"].tolist() == [70] * 4  # 60 steps, in ten episodes
    assert not torch.equal(states[0]["informed"]["seen"], states[1]["informed"]["seen"])
    other = agent(Catch(1, CPU).spec, PerfectToy(Catch(1, CPU), 7**3), **small | {"visit_frames": 8})
    with pytest.raises(UserError, match=r"the saved memory of visits is \(9, 49\), this one \(8, 49\)"):
        other.load_state_dict(states[0])


def test_the_simulator_is_saved_with_the_agent_and_learns_nothing():
    env = Catch(3, CPU, size=5)
    first, second = (agent(env.spec, FrameSimulator(env.spec.obs_shape, 3, CPU, hidden=8, factors=8)) for _ in range(2))
    before = copy.deepcopy(first.informed.simulator.state_dict())
    first = agent(env.spec, first.informed.simulator, learning_starts_frames=20, update_frames=8, visit_frames=5)
    for _ in play(env, first, 90, seed=0):
        pass
    assert first.optimiser.updates > 0
    assert_equal(dict(first.informed.simulator.state_dict()), dict(before))
    second = agent(env.spec, second.informed.simulator, visit_frames=5)
    state = first.state_dict()
    kept = copy.deepcopy(state["informed"])
    second.load_state_dict(state)
    for _ in play(env, second, 30, seed=1):
        pass
    assert_equal(state["informed"], kept)
    assert_equal(dict(second.informed.simulator.state_dict()), dict(before))
    size = sum(part.nbytes for part in before.values())
    assert first.required_bytes(90) == agent(env.spec, None).required_bytes(90) + size
    seen = first.state_dict()["informed"]
    assert first.lane_bytes(3) == seen["seen"].nbytes + seen["written"].nbytes == 3 * (5 * 25 + 8)
    assert agent(env.spec, None).lane_bytes(3) == 0
    assert isinstance(first, Agent)
    assert isinstance(Deaf(SPEC), Simulator)


def test_a_ring_is_walked_straight_around():
    """Behind is what was seen, ahead is not: after 59 steps all 60 cells, where chance has seen about sqrt(8 * 59 / pi) = 12."""
    found = {}
    for informed, seed in itertools.product((False, True), range(3)):
        torch.manual_seed(seed)
        env = Ring(4, CPU, length=60, max_steps=0)
        learner = agent(env.spec, PerfectToy(env, 60) if informed else None)
        cells = [set(env.reset(seed) and env._position[lane : lane + 1].tolist()) for lane in range(4)]
        for _ in play(env, learner, 59 * 4, seed):
            for lane, cell in enumerate(env._position.tolist()):
                cells[lane].add(cell)
        found[informed, seed] = [len(seen) for seen in cells]
    assert all(found[True, seed] == [60] * 4 for seed in range(3))
    assert np.mean([found[False, seed] for seed in range(3)]) < 20


def test_mazes_are_seen_sooner():
    """Cells of mazes that are entered in 300 steps a lane, a new maze after each goal; all random actions replaced, as before learning."""
    for seed in range(3):
        counts = []
        for informed in (False, True):
            torch.manual_seed(seed)
            env = GridMaze(4, CPU, pixels_per_cell=1)
            learner, cells = agent(env.spec, PerfectMaze(env) if informed else None, visit_frames=50), set()
            for _ in play(env, learner, 300 * 4, seed):
                cells |= {(lane, env.lanes.grid[lane].tobytes(), *env.lanes.agent[lane].tolist()) for lane in range(4)}
            counts.append(len(cells))
        assert counts[1] > 3 * counts[0], counts


@pytest.mark.parametrize(
    ("knob", "bad"),
    [
        ("visit_frames", 0),
        ("visit_delta", -1),
        ("visit_delta", 65_025),
        ("visit_sigma", 0.0),
        ("visit_sigma", math.inf),
        ("visit_sigma", math.nan),
    ],
)
def test_bad_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=f"agent.{knob}") as mistake:
        agent(SPEC, Deaf(SPEC), **{knob: bad})
    assert "\n" not in str(mistake.value)


def test_a_simulator_of_another_world_is_refused():
    with pytest.raises(UserError, match=r"is of pictures of \(1, 6, 5\) and 3 actions, and line has pictures of \(1, 4, 4\) and 3 actions"):
        agent(SPEC, Deaf(MADE_UP))
    with pytest.raises(UserError, match="and 2 actions, and line"):
        agent(SPEC, FrameSimulator(SPEC.obs_shape, 2, CPU, hidden=4, factors=4))


def test_other_lanes_than_those_remembered_are_refused():
    learner = agent(SPEC, Deaf(SPEC))
    step = first_step(frame(1, 2))
    decision = learner.act(step, learner.initial(2), explore=True)
    learner.observe(step, decision, step)
    with pytest.raises(AssertionError, match="2 lanes are remembered, 3 came"):
        learner.act(first_step(frame(1, 3)), learner.initial(3), explore=True)
