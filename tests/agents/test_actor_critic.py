import copy
import inspect
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lanes import CPU, DISCOUNTS, ENDS, SPEC, Count, agent, live, steps_of, warm

from agents.actor_critic import ActorCritic
from agents.api import Agent
from agents.bonus import Bonus
from agents.loop import evaluate, play
from agents.nets import patches
from agents.stack import push_frame
from envs.api import UserError, first_step
from envs.toy import Catch, Cue, Ring
from generative.fit import NonFiniteLoss

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "agent"
RECURRENT = ["none", "lstm", "gru"]


def test_stack_of_learning_equals_that_of_acting_across_ends():
    torch.manual_seed(4)
    ends = (torch.rand(30, 3) < 0.3).int()
    ends[ends.all(1)] = 0
    steps = steps_of(3, ends.tolist(), torch.ones(30, 3).int().tolist())
    learner, carry, stack = agent(stack_frames=3, n_steps=5), None, None
    for start in range(0, 30, 5):
        carry = learner.initial(3) if carry is None else carry
        stack = carry.stack if stack is None else stack
        decisions = live(learner, steps[start : start + 6], carry)
        batch = learner._rollout.take()
        assert torch.equal(patches(batch.frames, 1), decisions[0].notes["pixels"])
        for step, decision in zip(steps[start:], decisions):
            frames, stack = push_frame(stack, step.obs, step.last)
            assert torch.equal(patches(frames, 1), decision.notes["pixels"])
        carry = decisions[-1].carry


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_acting_changes_nothing_and_forgets_where_an_episode_opens(recurrent):
    learner = agent(recurrent=recurrent, stack_frames=3)
    before = copy.deepcopy(learner.state_dict())
    steps = steps_of(3, ENDS, DISCOUNTS)
    carry = live(learner, steps)[-1].carry
    opening = first_step(steps[2].obs)
    fresh, used = learner.act(opening, learner.initial(3), explore=False), learner.act(opening, carry, explore=False)
    for one, other in zip(fresh.carry, used.carry):
        assert torch.equal(one, other)
    going_on = learner.act(opening._replace(last=torch.zeros(3, dtype=torch.bool)), carry, explore=False)
    assert not torch.equal(going_on.carry.stack, used.carry.stack)
    if recurrent != "none":
        assert not torch.allclose(going_on.carry.state, used.carry.state)
    after = learner.state_dict()
    assert after["optimiser"]["updates"] == before["optimiser"]["updates"] == 0
    assert torch.equal(after["optimiser"]["master"], before["optimiser"]["master"])


@pytest.mark.parametrize("explore", [True, False])
def test_actions_are_samples_of_the_policy(explore):
    learner = agent(stack_frames=1)
    learner.network.policy.weight.data.zero_()
    learner.network.policy.bias.data = torch.tensor([0.2, 0.5, 0.3]).log()
    obs = torch.zeros(20_000, *SPEC.obs_shape, dtype=torch.uint8)
    action = learner.act(first_step(obs), learner.initial(20_000), explore).action
    shares = torch.bincount(action, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.015)


def test_play_starts_uniform():
    learner = agent()
    live(learner, steps_of(3, ENDS, DISCOUNTS))
    assert float(learner.learn()["train/entropy"]) == pytest.approx(math.log(3), abs=1e-3)


def test_updates_come_every_n_steps_and_at_an_iterations_end():
    env = Catch(4, CPU)
    learner = agent(env.spec, n_steps=4)
    ticks = list(play(env, learner, frames=4 * 11, seed=0))
    learned = [index for index, tick in enumerate(ticks) if tick.metrics]
    assert learned == [4, 6, 10]  # after 4 steps; all episodes end together after 6; after 4 more
    assert learner.optimiser.updates == 4  # and the last step, which was cut
    assert len(learner._rollout) == 0
    assert learner.frames == 4 * 11
    assert all(math.isfinite(float(value)) for value in ticks[10].metrics.values())


def test_nothing_outlives_an_iteration():
    env = Ring(3, CPU, max_steps=0)
    learner = agent(env.spec, n_steps=5)
    for seed in range(3):
        for _ in play(env, learner, frames=3 * 7, seed=seed):
            pass
        assert len(learner._rollout) == 0


def test_learning_rate_falls_in_frames():
    env = Catch(4, CPU)
    learner = agent(env.spec, n_steps=2, learning_rate=1e-3, learning_rate_frames=80)
    rates = [tick.metrics["train/learning_rate"] for tick in play(env, learner, frames=100, seed=0) if tick.metrics]
    assert rates[0] == pytest.approx(1e-3 * (1 - 8 / 80))
    assert rates[1] == pytest.approx(1e-3 * (1 - 16 / 80))
    assert rates[-1] == 0.0
    assert agent(env.spec, learning_rate=1e-3).learning_rate() == 1e-3


def test_time_is_counted_in_frames_of_all_lanes():
    learner = agent(n_steps=9)
    live(learner, steps_of(3, ENDS, DISCOUNTS))
    assert learner.frames == 5 * 3 * SPEC.frames_per_step == 30


def test_long_gradients_are_shortened():
    """With an epsilon this large a step of RMSProp is the gradient times the learning rate, at most."""
    learner = agent(optimiser_epsilon=1.0, learning_rate=1.0, max_gradient_norm=0.01)
    warm(learner)
    live(learner, steps_of(3, ENDS, DISCOUNTS))
    before = learner.optimiser.master.clone()
    assert float(learner.learn()["train/gradient_norm"]) > 0.1
    assert 0.005 < float((learner.optimiser.master - before).norm()) < 0.01


def test_only_training_keeps_what_was_seen():
    learner = agent()
    step = first_step(torch.zeros(2, *SPEC.obs_shape, dtype=torch.uint8))
    assert set(learner.act(step, learner.initial(2), explore=True).notes) == {"pixels", "map1", "map2", "features", "stack", "state"}
    assert learner.act(step, learner.initial(2), explore=False).notes == {}


def test_rewards_are_clipped_only_where_it_is_said():
    losses = []
    for clip in (None, 1.0, 1000.0):
        torch.manual_seed(0)
        learner = agent(reward_clip=clip)
        live(learner, [step._replace(reward=step.reward * 20) for step in steps_of(3, ENDS, DISCOUNTS)])
        losses.append(float(learner.loss(learner._rollout.take())[0].detach()))
    assert losses[0] == losses[2] != losses[1]


def test_bonus_is_asked_once_for_each_successor_while_the_emulators_play():
    env = Catch(4, CPU)
    bonus = Count()
    assert isinstance(bonus, Bonus)
    learner = agent(env.spec, bonus=bonus, bonus_scale=0.5, n_steps=3)
    asked, metrics = [], []
    ticks = []
    for tick in play(env, learner, frames=4 * 10, seed=0):
        asked.append(len(bonus.asked))
        ticks.append(tick)
        metrics += [tick.metrics] if tick.metrics else []
    assert asked == list(range(10))  # a tick later
    assert len(bonus.asked) == 10
    for frames, tick in zip(bonus.asked, ticks):
        assert torch.equal(frames, tick.after.next_obs)
    assert {"bonus/mean", "train/bonus"} <= set(metrics[0])
    assert float(metrics[0]["train/bonus"]) == pytest.approx(0.5 * sum(float(f.float().mean()) for f in bonus.asked[:3]) / 3 / 255)


def test_memory_is_told_with_the_bonus():
    learner = agent(bonus=Count())
    assert learner.required_bytes(0) == 1000
    assert learner.required_bytes(10**6) == 1000 + 16 * learner.optimiser.master.numel()


def train(env, learner, iterations) -> None:
    for iteration in iterations:
        torch.manual_seed(iteration)
        for _ in play(env, learner, frames=3 * 17, seed=iteration):
            pass


def assert_same_state(one: ActorCritic, other: ActorCritic) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine["frames"] == theirs["frames"]
    assert mine["bonus"] == theirs["bonus"]
    assert mine["optimiser"]["updates"] == theirs["optimiser"]["updates"]
    for name in ("master", "square", "mean"):
        assert torch.equal(mine["optimiser"][name], theirs["optimiser"][name])
    for left, right in zip(one.network.parameters(), other.network.parameters()):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("precision", "recurrent", "pixels_per_cell"),
    [*((precision, recurrent, 1) for precision in ("float32", "bfloat16") for recurrent in RECURRENT), ("float16", "none", 12)],
)
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(precision, recurrent, pixels_per_cell):
    env = Catch(3, CPU, pixels_per_cell=pixels_per_cell)
    knobs = {"recurrent": recurrent, "precision": precision, "learning_rate_frames": 1000}
    whole, half, resumed = (agent(env.spec, bonus=Count(), **knobs) for _ in range(3))
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(env, whole, range(4))
    train(env, half, range(2))
    train(env, resumed, range(1))  # what it has learned by itself is forgotten
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(env, resumed, range(2, 4))
    assert_same_state(whole, resumed)


def test_half_precision_follows_its_parameters():
    """After an update and after loading, what it sees is what float32 sees with the same parameters, within rounding."""
    env = Catch(3, CPU, pixels_per_cell=12)
    half, full = agent(env.spec, precision="float16", learning_rate=3e-3), agent(env.spec)
    step = env.reset(3)
    for trained in (False, True):
        if trained:
            train(env, half, range(1))
        full.load_state_dict({**copy.deepcopy(half.state_dict())})
        seen = [learner.network.torso.look(step.obs.unsqueeze(1).repeat(1, 2, 1, 1, 1))["features"].float() for learner in (half, full)]
        assert float((seen[0] - seen[1]).norm() / seen[1].norm()) < 0.01
    before = seen[1]
    half.load_state_dict(copy.deepcopy(agent(env.spec).state_dict()))
    full.load_state_dict(copy.deepcopy(half.state_dict()))
    seen = [learner.network.torso.look(step.obs.unsqueeze(1).repeat(1, 2, 1, 1, 1))["features"].float() for learner in (half, full)]
    assert float((seen[0] - seen[1]).norm() / seen[1].norm()) < 0.01
    assert float((seen[1] - before).norm() / before.norm()) > 0.1


def test_half_precision_is_refused_where_there_are_no_kernels():
    with pytest.raises(UserError, match="float16"):
        agent(precision="float16")


def test_a_loss_that_is_not_finite_is_refused_and_the_last_good_state_stays():
    learner = agent()
    steps = steps_of(3, ENDS, DISCOUNTS)
    steps[3].reward[0] = math.nan
    live(learner, steps)
    before = learner.optimiser.master.clone()
    with pytest.raises(NonFiniteLoss, match="agent=a3c"):
        learner.learn()
    assert torch.equal(learner.optimiser.master, before)
    assert bool(torch.isfinite(learner.state_dict()["optimiser"]["square"]).all())


@pytest.mark.parametrize(
    ("knob", "bad"),
    [
        ("stack_frames", 0),
        ("recurrent", "rnn"),
        ("gamma", 1.5),
        ("n_steps", 0),
        ("gae_lambda", -0.1),
        ("entropy_cost", -1.0),
        ("value_cost", math.inf),
        ("reward_clip", 0.0),
        ("bonus_scale", -1.0),
        ("optimiser", "sgd"),
        ("learning_rate", -1.0),
        ("learning_rate_frames", 0),
        ("plan_cost_frames", 0),
        ("decay", 1.0),
        ("optimiser_epsilon", 0.0),
        ("max_gradient_norm", 0.0),
        ("precision", "half"),
    ],
)
def test_wrong_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=knob.removeprefix("optimiser_")):
        agent(**{knob: bad})


def test_a_checkpoint_of_another_network_is_refused():
    with pytest.raises(UserError, match="network"):
        agent(recurrent="gru").load_state_dict(agent().state_dict())


@pytest.mark.parametrize("name", ["a3c", "a3c_plus"])
def test_configurations_hold_every_knob_and_its_default(name):
    node = yaml.load((CONFIGS / f"{name}.yaml").read_text().replace("e-", ".0e-"), yaml.SafeLoader)
    node.pop("defaults", None)
    assert node.pop("_target_") == "agents.actor_critic.ActorCritic"
    knobs = {key: value.default for key, value in inspect.signature(ActorCritic).parameters.items()}
    knobs = {key: value for key, value in knobs.items() if value is not inspect.Parameter.empty and key not in ("bonus", "planner")}
    assert node == ({key: value for key, value in knobs.items() if key != "bonus_scale"} if name == "a3c" else knobs)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_updates_live_in_memory_that_is_kept():
    """In a process of its own, whose allocator has seen nothing else: fresh memory would cost some 6,000 page faults an update."""
    script = """
import resource, torch
from agents.actor_critic import ActorCritic
from envs.api import Spec, Step
torch.set_num_threads(1)
agent = ActorCritic(Spec("noise", 2, ("a", "b"), (1, 84, 84), 4), torch.device("cpu"))
carry, lanes = agent.initial(16), torch.zeros(16)
for tick in range(60):
    if tick == 40:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    obs = torch.randint(0, 256, (16, 1, 84, 84), dtype=torch.uint8)
    step = Step(obs, lanes, lanes + 1, lanes > 0, obs)
    decision = agent.act(step, carry, True)
    agent.learn()
    agent.observe(step, decision, step)
    carry = decision.carry
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=CONFIGS.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1000


def score(env, learner) -> float:
    torch.manual_seed(9)
    ended = [tick.after.reward[tick.after.last] for tick in evaluate(env, learner, episodes_per_lane=10, seed=7)]
    return float(torch.cat(ended).mean())


def learn(env, learner, frames: int) -> None:
    torch.manual_seed(1)
    for seed in range(2):
        for _ in play(env, learner, frames=frames // 2, seed=seed):
            pass


def test_is_an_agent():
    assert isinstance(agent(), Agent)


def test_ring_is_worth_one_over_one_minus_gamma_through_time_limits():
    env = Ring(8, CPU, length=4, max_steps=3)
    learner = agent(env.spec, stack_frames=1, gamma=0.8, learning_rate=2e-3, learning_rate_frames=8 * 1200)
    learn(env, learner, 8 * 1200)
    step = env.reset(5)
    value = learner.network(learner.network.torso(step.obs.unsqueeze(1)), step.last.unsqueeze(0), learner.initial(8).state)[1]
    assert value.detach().numpy() == pytest.approx(env.optimal_value(0.8), rel=0.05)


def test_learns_to_catch():
    env = Catch(16, CPU)
    learner = agent(env.spec, stack_frames=1)
    assert score(env, learner) < 0.5
    learn(env, learner, 16_000)
    assert score(env, learner) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_catches_nearly_every_ball(seed, precision):
    torch.manual_seed(seed)
    env = Catch(16, CPU)
    learner = agent(env.spec, stack_frames=1, precision=precision, learning_rate_frames=60_000)
    learn(env, learner, 60_000)
    assert score(env, learner) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", ["lstm", "gru"])
def test_recurrent_memory_answers_the_cue(recurrent):
    env = Cue(16, CPU, delay=3)
    learner = agent(env.spec, stack_frames=1, recurrent=recurrent, learning_rate_frames=40_000)
    learn(env, learner, 40_000)
    assert score(env, learner) > 0.95
