"""An actor-critic with a planner: STRAW, and a second telling of its loss in plain words."""

import copy
import itertools

import pytest
import torch
from lanes import CPU, DISCOUNTS, ENDS, SPEC, Count, live, steps_of

from agents.actor_critic import ActorCritic
from agents.api import Agent
from agents.loop import evaluate, play
from agents.planned import Planned, course_metrics
from envs.api import UserError, first_step
from envs.toy import Catch
from generative.straw import Straw

NEVER_ENDS, ALL_GO_ON = [[0, 0, 0]] * 10, [[1, 1, 1]] * 10


def planner_of(spec=SPEC, **knobs) -> Straw:
    return Straw(spec.obs_shape, spec.num_actions, CPU, **{"plan_steps": 6, "filters": 3, "hidden": 8} | knobs)


def agent(spec=SPEC, planner=None, **knobs) -> ActorCritic:
    return ActorCritic(spec, CPU, planner=planner or planner_of(spec), **{"stack_frames": 2, "precision": "float32"} | knobs)


def lively(learner: ActorCritic) -> ActorCritic:
    """A larger value head and larger plans, and commitments that are made and end, so that every term of the loss counts."""
    learner.network.value.weight.data.normal_(0, 0.3)
    planner = learner.network.policy.planner
    planner.write.weight.data.normal_(0, 0.5)
    planner.commit.bias.data[:1] = 2
    planner.bias.data.fill_(-1)
    return learner


def test_is_an_agent_whose_optimiser_has_the_planner():
    planner = planner_of()
    learner = agent(planner=planner)
    assert isinstance(learner, Agent)
    own = {id(parameter) for parameter in learner.network.parameters()}
    assert {id(parameter) for parameter in planner.parameters()} < own
    assert learner.optimiser.master.numel() == sum(parameter.numel() for parameter in learner.network.parameters())


def test_acting_carries_the_plan_and_empties_it_where_an_episode_opens():
    learner = lively(agent())
    steps = steps_of(3, NEVER_ENDS, ALL_GO_ON)
    carry = live(learner, steps[:3])[-1].carry
    planner, goes_on = learner.network.policy.planner, torch.tensor([False, True, False])
    assert carry.state.shape == (3, SPEC.num_actions + 1, 6)
    assert not carry.state.requires_grad
    before = copy.deepcopy(learner.state_dict())
    decision = learner.act(steps[3]._replace(last=goes_on), carry, explore=True)
    plan = torch.where(goes_on.view(3, 1, 1), planner.start(3), carry.state)
    with torch.no_grad():
        step = planner.advance(decision.notes["features"], plan, decision.notes["plan_noise"])
    assert torch.equal(decision.carry.state, step.plan)
    assert bool(step.replanned[1])
    assert torch.equal(learner.state_dict()["optimiser"]["master"], before["optimiser"]["master"])
    assert learner.act(steps[3], carry, explore=False).notes == {}


def test_actions_are_samples_of_the_plans_first_column():
    learner = agent(stack_frames=1, planner=planner_of(noise=False))
    script = torch.zeros(4, 6)
    script[:3, 1] = torch.tensor([0.2, 0.5, 0.3]).log()
    obs = torch.zeros(20_000, *SPEC.obs_shape, dtype=torch.uint8)
    carry = learner.initial(20_000)._replace(state=script.repeat(20_000, 1, 1))
    step = first_step(obs)._replace(last=torch.zeros(20_000, dtype=torch.bool))
    action = learner.act(step, carry, explore=False).action
    torch.testing.assert_close(torch.bincount(action, minlength=3) / 20_000, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.015)


def test_course_is_the_planner_step_by_step():
    torch.manual_seed(0)
    planner = planner_of()
    policy, opens = Planned(planner, 5), torch.tensor([[1, 1], [0, 0], [0, 1], [0, 0]], dtype=torch.bool)
    features = torch.randn(4, 2, 5)
    course = policy(features, opens, torch.full((2, 4, 6), 7.0))  # what lanes that open remember does not count
    again = policy(features, opens, planner.start(2), course.noise)
    for one, other in zip(course, again):
        assert torch.equal(one, other)
    for lane in range(2):
        plan, steps = planner.start(1), []
        for t in range(4):
            plan = planner.start(1) if opens[t, lane] else plan
            steps.append(planner.advance(features[t, lane : lane + 1], plan, course.noise[t, lane : lane + 1]))
            plan = steps[-1].plan
        torch.testing.assert_close(course.logits[:, lane], torch.cat([step.logits for step in steps]))
        torch.testing.assert_close(course.cost[:, lane], torch.cat([step.cost for step in steps]))
        assert torch.equal(course.replanned[:, lane], torch.cat([step.replanned for step in steps]))
        torch.testing.assert_close(course.plan[lane], plan[0])
    assert bool(course.replanned[opens].all())


def test_metrics_count_plans():
    planner = planner_of()
    course = Planned(planner, 5)(torch.randn(4, 2, 5), torch.ones(4, 2, dtype=torch.bool), planner.start(2))
    course = course._replace(replanned=torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.bool), cost=torch.full((4, 2), 0.5))
    assert {name: float(value) for name, value in course_metrics(course).items()} == {
        "train/replan_share": 0.25,
        "train/commitment_steps": 4,
        "train/plan_cost": 0.5,
    }
    none = course._replace(replanned=torch.zeros(4, 2, dtype=torch.bool))
    assert float(course_metrics(none)["train/commitment_steps"]) == 8


def plain_loss(learner: ActorCritic, steps, decisions, before, scale=0.0) -> torch.Tensor:
    """The loss lane by lane and step by step, in plain words, for torch to differentiate: gamma 0.9, lambda 0.8, costs 0.3 and 0.7."""
    network, parts, counts = learner.network, [], learner._stack_frames
    planner = network.policy.planner

    def view(frames):
        x = torch.cat([frame.float() for frame in frames]).unsqueeze(0) / 255
        for layer in network.torso.convolutions:
            x = torch.relu(layer(x))
        x = torch.relu(network.torso.hidden(x.permute(0, 2, 3, 1).flatten(1)))
        return x, network.value(x)[0, 0]

    for lane in range(len(steps[0].last)):
        history, plan = ([], None) if before is None else (list(before.stack[lane]), before.state[lane : lane + 1])
        logits, values, rewards, nexts, costs = [], [], [], [], []
        for t, (step, after) in enumerate(itertools.pairwise(steps)):
            if step.last[lane]:
                history, plan = [], None
            blank = [torch.zeros_like(step.obs[lane])] * counts
            history = [*history, step.obs[lane]]
            features, value = view((blank + history)[-counts:])
            if plan is None:
                plan = planner.start(1)
            planned = planner.advance(features, plan, decisions[t].notes["plan_noise"][lane : lane + 1])
            plan = planned.plan
            logits.append(planned.logits[0])
            costs.append(planned.cost[0])
            values.append(value)
            bonus = scale * float(after.next_obs[lane].float().mean() / 255)
            rewards.append(float(after.reward[lane].clamp(-1, 1)) + bonus)
            ends = bool(after.last[lane]) or t == len(steps) - 2
            nexts.append(float(view((blank + history + [after.next_obs[lane]])[-counts:])[1].detach()) if ends else None)
        advantage = 0.0
        for t in reversed(range(len(values))):
            through = 0.9 * float(steps[t + 1].discount[lane])
            following = nexts[t] if nexts[t] is not None else float(values[t + 1].detach())
            trail = 0.0 if nexts[t] is not None else through * 0.8 * advantage
            advantage = rewards[t] + through * following - float(values[t].detach()) + trail
            policy = torch.softmax(logits[t], 0)
            entropy = -(policy * policy.log()).sum()
            policy_loss = -policy[decisions[t].action[lane]].log() * advantage
            error = values[t] - (advantage + float(values[t].detach()))
            parts.append(policy_loss + 0.7 * error**2 - 0.3 * entropy + costs[t])
    return torch.stack(parts).mean()


KNOBS = {"gamma": 0.9, "gae_lambda": 0.8, "entropy_cost": 0.3, "value_cost": 0.7}


def assert_same_gradient(learner, batch, expected):
    parameters = list(learner.network.parameters())
    loss, _ = learner.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found, plain = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for mine, theirs in zip(found, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
    names = {name: float(theirs.abs().sum()) for (name, _), theirs in zip(learner.network.named_parameters(), plain)}
    assert all(size > 0 for size in names.values()), names


@pytest.mark.parametrize("noisy", [True, False])
def test_gradient_equals_that_of_plain_words(noisy):
    torch.manual_seed(0)
    learner = lively(agent(planner=planner_of(noise=noisy, kl_cost=0.1, replan_cost=0.4), **KNOBS))
    steps = steps_of(3, ENDS, DISCOUNTS)
    decisions = live(learner, steps)
    expected = plain_loss(learner, steps, decisions, None)
    assert_same_gradient(learner, learner._rollout.take(), expected)


def test_gradient_of_a_later_rollout_starts_from_the_plan_of_the_one_before():
    torch.manual_seed(0)
    learner = lively(agent(bonus=Count(), bonus_scale=0.5, n_steps=5, stack_frames=3, **KNOBS))
    steps = steps_of(3, ENDS + ENDS[::-1], DISCOUNTS + DISCOUNTS[::-1])
    decisions = live(learner, steps[:6])
    learner._rollout.take()
    later = live(learner, steps[5:], decisions[-1].carry)
    for after in steps[6:]:
        learner._rollout.add_bonus(learner.bonus(after.next_obs))
    batch = learner._rollout.take()
    assert torch.equal(batch.state, decisions[-1].carry.state)
    assert_same_gradient(learner, batch, plain_loss(learner, steps[5:], later, decisions[-1].carry, scale=0.5))


def test_first_step_is_planned_again_with_the_present_parameters_and_the_draws_of_then():
    torch.manual_seed(0)
    learner = lively(agent(learning_rate=1e-3, **KNOBS))
    steps = steps_of(3, NEVER_ENDS, ALL_GO_ON)
    decisions = live(learner, steps[:6])
    first = learner.act(steps[5], decisions[-1].carry, explore=True)
    learner.learn()
    assert learner.optimiser.updates == 1
    learner.observe(steps[5], first, steps[6])
    rest = live(learner, steps[6:], first.carry)
    expected = plain_loss(learner, steps[5:], [first, *rest], decisions[-1].carry)
    assert_same_gradient(learner, learner._rollout.take(), expected)


@pytest.mark.parametrize(("frames", "weight"), [(None, 1.0), (120, 0.25), (30, 1.0), (20, 1.0)])
def test_what_plans_cost_weighs_more_from_update_to_update(frames, weight):
    """30 frames were played."""
    learner = lively(agent(planner=planner_of(replan_cost=0.7), plan_cost_frames=frames))
    live(learner, steps_of(3, ENDS, DISCOUNTS))
    batch = learner._rollout.take()
    learner._update(batch, learning_rate=0.0)
    loss, parts = learner.loss(batch)
    rest = parts["train/policy_loss"] + 0.5 * parts["train/value_loss"] - 0.01 * parts["train/entropy"]
    assert float(parts["train/plan_cost"]) > 0.01
    torch.testing.assert_close(loss.detach() - rest, weight * parts["train/plan_cost"])


def test_a_time_for_costs_without_a_planner_is_refused():
    with pytest.raises(UserError, match=r"^agent\.plan_cost_frames=60 .* planner=$"):
        ActorCritic(SPEC, CPU, plan_cost_frames=60)


def test_learning_draws_nothing():
    learner = agent()
    live(learner, steps_of(3, ENDS, DISCOUNTS))
    state = torch.random.get_rng_state()
    assert {"train/replan_share", "train/commitment_steps", "train/plan_cost"} <= set(learner.learn())
    assert torch.equal(torch.random.get_rng_state(), state)


def train(env, learner, iterations) -> None:
    for iteration in iterations:
        torch.manual_seed(iteration)
        for _ in play(env, learner, frames=3 * 17, seed=iteration):
            pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(precision):
    env = Catch(3, CPU)
    whole, half, resumed = (agent(env.spec, precision=precision) for _ in range(3))
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(env, whole, range(4))
    train(env, half, range(2))
    train(env, resumed, range(1))  # what it has learned by itself is forgotten
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(env, resumed, range(2, 4))
    for name in ("master", "square", "mean"):
        assert torch.equal(whole.state_dict()["optimiser"][name], resumed.state_dict()["optimiser"][name])
    assert bool(torch.isfinite(whole.optimiser.master).all())


@pytest.mark.parametrize("recurrent", ["lstm", "gru"])
def test_a_recurrent_core_beside_a_planner_is_refused(recurrent):
    with pytest.raises(UserError, match=rf"^agent\.recurrent={recurrent}: with planner= .*$"):
        agent(recurrent=recurrent)


def test_a_checkpoint_of_another_plan_is_refused():
    with pytest.raises(UserError, match="network"):
        agent(planner=planner_of(hidden=9)).load_state_dict(agent().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planned_play_catches_nearly_every_ball(seed):
    torch.manual_seed(seed)
    env = Catch(16, CPU)
    planner = Straw(env.spec.obs_shape, env.spec.num_actions, CPU, plan_steps=20, noise=False)
    learner = agent(env.spec, planner, stack_frames=1, n_steps=6, learning_rate_frames=90_000)
    for part in range(6):
        torch.manual_seed(1 + part)
        for _ in play(env, learner, frames=15_000, seed=part):
            pass
    torch.manual_seed(9)
    ended = [tick.after.reward[tick.after.last] for tick in evaluate(env, learner, episodes_per_lane=10, seed=7)]
    assert float(torch.cat(ended).mean()) > 0.9
