"""The actor-critic's loss and gradient, beside a second telling of them in plain words."""

import copy
import itertools

import pytest
import torch
from lanes import DISCOUNTS, ENDS, Count, agent, live, steps_of, warm

from agents.actor_critic import ActorCritic
from envs.api import Spec, first_step

RECURRENT = ["none", "lstm", "gru"]


def plain_loss(learner: ActorCritic, steps, decisions, before, gamma, trace, entropy_cost, value_cost, scale=0.0) -> torch.Tensor:
    """The loss lane by lane and step by step, in plain words, for torch to differentiate."""
    network, parts = learner.network, []
    counts = learner._stack_frames

    def view(frames, memory):
        x = torch.cat([frame.float() for frame in frames]).unsqueeze(0) / 255
        for layer in network.torso.convolutions:
            x = torch.relu(layer(x))
        x = torch.relu(network.torso.hidden(x.permute(0, 2, 3, 1).flatten(1)))
        if network.core is not None:
            memory = network.core.cell(x, memory)
            x = memory[0] if isinstance(memory, tuple) else memory
        return network.policy(x)[0], network.value(x)[0, 0], memory

    for lane in range(len(steps[0].last)):
        memory = None
        if network.core is not None and before is not None:
            rows = [row.unsqueeze(0) for row in before.state[lane]]
            memory = tuple(rows) if len(rows) == 2 else rows[0]
        history = [] if before is None else list(before.stack[lane])
        logits, values, rewards, nexts = [], [], [], []
        for t, (step, after) in enumerate(itertools.pairwise(steps)):
            if step.last[lane]:
                history, memory = [], None
            blank = [torch.zeros_like(step.obs[lane])] * counts
            history = [*history, step.obs[lane]]
            row, value, memory = view((blank + history)[-counts:], memory)
            logits.append(row)
            values.append(value)
            bonus = scale * float(after.next_obs[lane].float().mean() / 255)
            rewards.append(float(after.reward[lane].clamp(-1, 1)) + bonus)
            ends = bool(after.last[lane]) or t == len(steps) - 2
            nexts.append(float(view((blank + history + [after.next_obs[lane]])[-counts:], memory)[1].detach()) if ends else None)
        advantage = 0.0
        for t in reversed(range(len(values))):
            after = steps[t + 1]
            through = gamma * float(after.discount[lane])
            following = nexts[t] if nexts[t] is not None else float(values[t + 1].detach())
            trail = 0.0 if nexts[t] is not None else through * trace * advantage
            advantage = rewards[t] + through * following - float(values[t].detach()) + trail
            policy = torch.softmax(logits[t], 0)
            entropy = -(policy * policy.log()).sum()
            policy_loss = -policy[decisions[t].action[lane]].log() * advantage
            target = advantage + float(values[t].detach())
            parts.append(policy_loss + value_cost * (values[t] - target) ** 2 - entropy_cost * entropy)
    return torch.stack(parts).mean()


def assert_same_gradient(learner, batch, expected):
    parameters = list(learner.network.parameters())
    loss, _ = learner.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found, plain = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for mine, theirs in zip(found, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert sum(float(theirs.abs().sum()) for theirs in plain) > 0


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_gradient_equals_that_of_plain_words(recurrent):
    learner = agent(recurrent=recurrent, gamma=0.9, gae_lambda=0.8, entropy_cost=0.3, value_cost=0.7)
    warm(learner)
    steps = steps_of(3, ENDS, DISCOUNTS)
    decisions = live(learner, steps)
    expected = plain_loss(learner, steps, decisions, None, 0.9, 0.8, 0.3, 0.7)
    assert_same_gradient(learner, learner._rollout.take(), expected)


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_gradient_of_a_later_rollout_starts_from_the_memory_of_the_one_before(recurrent):
    learner = agent(recurrent=recurrent, n_steps=5, stack_frames=3)
    warm(learner)
    steps = steps_of(3, ENDS + ENDS[::-1], DISCOUNTS + DISCOUNTS[::-1])
    decisions = live(learner, steps[:6])
    learner._rollout.take()
    later = live(learner, steps[5:], decisions[-1].carry)
    expected = plain_loss(learner, steps[5:], later, decisions[-1].carry, 0.99, 1.0, 0.01, 0.5)
    assert_same_gradient(learner, learner._rollout.take(), expected)


def test_gradient_with_a_bonus():
    learner = agent(bonus=Count(), bonus_scale=0.5)
    warm(learner)
    steps = steps_of(3, ENDS, DISCOUNTS)
    decisions = live(learner, steps)
    for after in steps[1:]:
        learner._rollout.add_bonus(learner.bonus(after.next_obs))
    expected = plain_loss(learner, steps, decisions, None, 0.99, 1.0, 0.01, 0.5, scale=0.5)
    assert_same_gradient(learner, learner._rollout.take(), expected)


def test_first_step_is_learned_from_with_the_present_parameters():
    """It was decided on before the update, but its gradient is that of the network after it."""
    learner = agent(learning_rate=1e-3)
    warm(learner)
    steps = steps_of(3, [[0, 0, 0]] * 10, [[1, 1, 1]] * 10)
    decisions = live(learner, steps[:6])
    first = learner.act(steps[5], decisions[-1].carry, explore=True)
    learner.learn()
    assert learner.optimiser.updates == 1
    learner.observe(steps[5], first, steps[6])
    rest = live(learner, steps[6:], first.carry)
    expected = plain_loss(learner, steps[5:], [first, *rest], decisions[-1].carry, 0.99, 1.0, 0.01, 0.5)
    assert_same_gradient(learner, learner._rollout.take(), expected)


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_value_that_acting_found_spares_a_look_and_changes_nothing(recurrent):
    torch.manual_seed(5)
    learner, looks = agent(recurrent=recurrent), []
    look = learner.network.torso.look
    learner.network.torso.look = lambda frames: looks.append(len(frames)) or look(frames)
    steps = steps_of(3, ENDS, DISCOUNTS)
    decisions = live(learner, steps)
    batch = learner._rollout.take()
    without, _ = learner.loss(batch)
    learner.act(steps[5], decisions[-1].carry, explore=True)
    looks.clear()
    known, _ = learner.loss(batch)
    torch.testing.assert_close(known, without, rtol=1e-5, atol=1e-6)
    assert looks == [3 + 3 * 2]  # the first step, and the two time limits in between
    learner.act(first_step(steps[5].obs), learner.initial(3), explore=False)  # an evaluation in between
    looks.clear()
    torch.testing.assert_close(learner.loss(batch)[0], without, rtol=0, atol=0)
    assert looks == [3 + 3 * 3]


@pytest.mark.parametrize("change", ["update", "load"])
def test_value_that_acting_found_is_forgotten_with_its_parameters(change):
    learner, looks = agent(), []
    steps = steps_of(3, ENDS, DISCOUNTS)
    decisions = live(learner, steps)
    batch, state = learner._rollout.take(), copy.deepcopy(learner.state_dict())
    learner.act(steps[5], decisions[-1].carry, explore=True)
    if change == "update":
        learner._update(batch, 1e-3)
    else:
        learner.load_state_dict(state)
    look = learner.network.torso.look
    learner.network.torso.look = lambda frames: looks.append(len(frames)) or look(frames)
    learner.loss(batch)
    assert looks == [3 + 3 * 3]


def test_a_lost_life_does_not_leak():
    """The loss of the step that lost a life does not depend on what the next life earns; that of the step after it does."""
    gradients = []
    for later in (-1.0, 1.0):
        torch.manual_seed(3)
        learner = agent(entropy_cost=0.0, n_steps=2)
        warm(learner)
        steps = steps_of(1, [[0], [0]], [[0], [1]])
        steps[2] = steps[2]._replace(reward=torch.tensor([later]))
        live(learner, steps)
        batch = learner._rollout.take()
        logits = []
        policy = learner.network.policy.forward
        learner.network.policy.forward = lambda features, policy=policy, logits=logits: logits.append(policy(features)) or logits[-1]
        loss, _ = learner.loss(batch)
        gradients.append(torch.autograd.grad(loss, logits[-1])[0])
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_gradient_in_half_precision_is_that_of_float32_within_rounding():
    spec, gradients = Spec("large", 3, ("left", "stay", "right"), (1, 84, 84), 2), []
    steps, actions = steps_of(3, ENDS, DISCOUNTS, spec), None
    full = agent(spec)
    warm(full)
    half = agent(spec, precision="float16")
    half.load_state_dict(full.state_dict())
    for learner in (full, half):
        decisions = live(learner, steps)
        actions = [decision.action for decision in decisions] if actions is None else actions
        batch = learner._rollout.take()._replace(action=torch.stack(actions))
        parts = torch.autograd.grad(learner.loss(batch)[0], list(learner.network.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.05
