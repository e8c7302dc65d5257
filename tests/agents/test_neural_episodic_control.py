import copy

import pytest
import torch
from whole import CPU, SPEC, assert_equal, frame

from agents.api import Agent
from agents.dictionary import Reading
from agents.neural_episodic_control import NeuralEpisodicControl
from agents.replay import Batch
from envs.api import Step, first_step
from envs.toy import Catch
from generative.fit import NonFiniteLoss

TINY = {"capacity": 100, "k": 3, "key_size": 4, "stack_frames": 2, "replay_capacity": 200, "precision": "float32"}


def agent(spec=SPEC, **knobs) -> NeuralEpisodicControl:
    return NeuralEpisodicControl(spec, CPU, **TINY | knobs)


def opening(number: int, lanes: int = 1) -> Step:
    return first_step(frame(number, lanes))


def script(learner: NeuralEpisodicControl, rewards: list, discounts: list, last: list, actions: list | None = None) -> None:
    """Lets the agent live through frames 1, 2, 3, ...; a true successor is 100 more than the frame would have been.

    Rows are steps of as many lanes as they have numbers; lane n sees frames 20 n above those of the first.
    """
    lanes = len(rewards[0])
    shift = (20 * torch.arange(lanes, dtype=torch.uint8)).view(-1, 1, 1, 1)
    step, carry = first_step(frame(1, lanes) + shift), learner.initial(lanes)
    for t, reward in enumerate(rewards):
        decision = learner.act(step, carry, explore=True)
        decision = decision._replace(action=torch.tensor(actions[t] if actions else [0] * lanes))
        learner.learn()
        obs, ends = frame(t + 2, lanes) + shift, torch.tensor(last[t], dtype=torch.bool)
        next_obs = torch.where(ends.view(-1, 1, 1, 1), obs + 100, obs) if any(last[t]) else obs
        after = Step(obs, torch.tensor(reward, dtype=torch.float32), torch.tensor(discounts[t], dtype=torch.float32), ends, next_obs)
        learner.observe(step, decision, after)
        step, carry = after, decision.carry
    learner.learn()


def value_is_the_frame(learner: NeuralEpisodicControl, monkeypatch) -> None:
    """Every dictionary says that a state is worth the number of its last frame; that number is its key too."""

    def look(frames):
        number = frames[:, -1, 0, 0, 0].float()
        nobody = torch.full((len(number), SPEC.num_actions, learner.memory.k), -1)
        return number[:, None].expand(-1, learner.memory.dims).clone(), Reading(number[:, None] - torch.tensor([5.0, 0.0, 9.0]), nobody)

    monkeypatch.setattr(learner, "_look", look)


def written(learner: NeuralEpisodicControl, action: int = 0) -> dict[int, float]:
    """By the number of the frame (its key): the value in the dictionary of `action`."""
    table = learner.state_dict()["memory"]["tables"][str(action)]
    return {int(key): round(value, 4) for key, value in zip(table["keys"][:, 0].tolist(), table["values"].tolist())}


def remembered(learner: NeuralEpisodicControl) -> dict[int, tuple]:
    """By the last frame of each stack that may be sampled: the frame before, the action, the target, its weight of what follows."""
    batch = learner.replay.sample(2000)
    columns = batch.frames[:, 1, 0, 0, 0], batch.frames[:, 0, 0, 0, 0], batch.action, batch.reward, batch.discount
    return {now: (before, action, round(target, 4), weight) for now, before, action, target, weight in zip(*(c.tolist() for c in columns))}


def test_is_an_agent():
    assert isinstance(agent(), Agent)


# Targets


def test_targets_of_n_steps_bootstrap_from_the_best_action_n_steps_later(monkeypatch):
    learner = agent(gamma=0.5, n_steps=2)
    value_is_the_frame(learner, monkeypatch)
    script(learner, [[1], [2], [4], [8]], [[1]] * 4, [[0]] * 4)
    assert written(learner) == {1: 1 + 0.5 * 2 + 0.25 * 3, 2: 2 + 0.5 * 4 + 0.25 * 4}  # the others wait


def test_lost_life_termination_and_time_limit_in_targets(monkeypatch):
    """gamma 1/2, N = 2; frames 1 2 3 4, a life lost after 2, a time limit after 4; then frames 5 6, a termination after 6."""
    learner = agent(gamma=0.5, n_steps=2)
    value_is_the_frame(learner, monkeypatch)
    script(
        learner, [[1], [2], [4], [8], [16], [32]], [[1], [0], [1], [1], [1], [0]], [[0], [0], [0], [1], [0], [1]], [[0], [1], [0], [1]] * 2
    )
    goals = {
        1: 1 + 0.5 * 2,  # nothing of the next life flows back
        2: 2.0,
        3: 4 + 0.5 * 8 + 0.25 * 105,  # the time limit's true successor
        4: 8 + 0.5 * 105,
        5: 16 + 0.5 * 32,
        6: 32.0,
    }
    assert written(learner, 0) == {number: goals[number] for number in (1, 3, 5)}
    assert written(learner, 1) == {number: goals[number] for number in (2, 4, 6)}
    before = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 5}
    assert remembered(learner) == {number: (before[number], (number + 1) % 2, goal, 0.0) for number, goal in goals.items()}


def test_lanes_that_end_apart_are_written_n_steps_later_with_returns_that_end_where_they_ended(monkeypatch):
    """Lane 0 terminates after its step 2, lane 1 meets a time limit after its step 3."""
    learner = agent(gamma=0.5, n_steps=3)
    value_is_the_frame(learner, monkeypatch)
    rewards, discounts = [[1, 10], [2, 20], [4, 40], [8, 80], [16, 160]], [[1, 1], [0, 1], [1, 1], [1, 1], [1, 1]]
    script(learner, rewards, discounts, [[0, 0], [1, 0], [0, 1], [0, 0], [0, 0]])
    first = {1: 1 + 0.5 * 2, 2: 2.0}
    second = {21: 10 + 0.5 * 20 + 0.25 * 40 + 0.125 * 124, 22: 20 + 0.5 * 40 + 0.25 * 124}
    assert written(learner) == first | second
    script(learner := agent(gamma=0.5, n_steps=3), rewards, discounts, [[0, 0], [1, 0], [0, 1], [0, 0], [1, 1]])
    assert len(learner.replay) == 10  # the end of all lanes writes all that waits
    assert learner.memory.sizes == [10, 0, 0]


def test_a_step_is_written_by_the_key_that_it_was_decided_with():
    torch.manual_seed(0)
    learner = agent(n_steps=1)
    script(learner, [[1], [2], [4]], [[1]] * 3, [[0], [0], [0]])
    keys = learner.state_dict()["memory"]["tables"]["0"]["keys"]
    with torch.no_grad():
        expected = learner.network(torch.stack([torch.stack([frame(t)[0], frame(t + 1)[0]]) for t in range(2)]))
    torch.testing.assert_close(keys, expected)


def test_a_state_met_again_moves_its_value_by_alpha():
    learner = agent(alpha=0.25)
    for reward in (4.0, 8.0):
        script(learner, [[reward]], [[0]], [[1]])
    assert learner.memory.sizes == [1, 0, 0]
    assert float(learner.memory.tables[0].values[0]) == 5.0


# Acting


def fill(learner: NeuralEpisodicControl, values: list[float]) -> None:
    for action, value in enumerate(values):
        script(learner, [[value]], [[0]], [[1]], [[action]])


def actions_at(learner: NeuralEpisodicControl, explore: bool, lanes: int = 6000) -> torch.Tensor:
    """The share of each action at frame 1."""
    decision = learner.act(opening(1, lanes), learner.initial(lanes), explore)
    return torch.bincount(decision.action, minlength=3) / lanes


@pytest.mark.parametrize("explore", [False, True])
def test_actions_are_random_and_values_nothing_while_a_dictionary_is_empty(explore):
    learner = agent(epsilon_start=0.0, epsilon_end=0.0)
    fill(learner, [5.0, 7.0])
    torch.testing.assert_close(actions_at(learner, explore), torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    value = learner.memory.estimate(torch.randn(2, 4)).value
    torch.testing.assert_close(value, torch.tensor([[5.0, 7.0, 0.0]]).expand(2, 3))
    fill(learner, [5.0, 7.0, 3.0])
    assert actions_at(learner, explore).tolist() == [0, 1, 0]


def test_ties_are_broken_at_random():
    learner = agent(epsilon_start=0.0, epsilon_end=0.0)
    fill(learner, [5.0, 3.0, 5.0])
    torch.testing.assert_close(actions_at(learner, True), torch.tensor([0.5, 0, 0.5]), rtol=0, atol=0.03)


def test_epsilon_is_the_share_of_random_actions_while_exploring():
    learner = agent(epsilon_start=0.3, epsilon_end=0.3)
    fill(learner, [5.0, 9.0, 3.0])
    assert actions_at(learner, False).tolist() == [0, 1, 0]
    torch.testing.assert_close(actions_at(learner, True), torch.tensor([0.1, 0.8, 0.1]), rtol=0, atol=0.02)


def test_epsilon_falls_in_a_straight_line():
    learner = agent(epsilon_start=0.9, epsilon_end=0.1, epsilon_frames=200)
    seen = {}
    for frames in (0, 50, 100, 200, 10_000):
        learner.frames = frames
        seen[frames] = round(learner.epsilon(), 6)
    assert seen == {0: 0.9, 50: 0.7, 100: 0.5, 200: 0.1, 10_000: 0.1}


def test_acting_changes_nothing():
    learner = agent()
    script(learner, [[1], [2], [4]], [[1], [1], [0]], [[0], [0], [1]], [[0], [1], [2]])
    before, carry = copy.deepcopy(learner.state_dict()), learner.initial(1)
    for explore in (True, False):
        learner.act(opening(3), carry, explore)
    assert not carry.any()
    assert_equal(learner.state_dict(), before)


def test_what_acting_read_is_marked_as_used():
    learner = agent(capacity=3, k=3)
    script(learner, [[1]], [[0]], [[1]])
    stamp = int(learner.memory.tables[0].stamps[0])
    script(learner, [[1]], [[1]], [[0]], [[1]])
    assert int(learner.memory.tables[0].stamps[0]) > stamp


# Learning


@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_an_update_descends_the_loss_of_network_keys_and_values(max_norm):
    """All entries are neighbours, so the loss is a dense function of parameters and whole tables. The optimiser is plain descent here."""
    torch.manual_seed(1)
    big, rate = 1e6, 0.5  # an epsilon beside which moments are nothing
    knobs = {"k": 40, "decay": 0.0, "optimiser_epsilon": big, "learning_rate": rate * big, "max_gradient_norm": max_norm}
    learner = agent(stack_frames=1, capacity=40, **knobs)
    frames, actions = torch.randint(0, 256, (24, 1, *SPEC.obs_shape), dtype=torch.uint8), torch.arange(24) % 3
    learner.memory.write(actions, torch.randn(24, 4), torch.arange(24), torch.randn(24))
    batch = Batch(frames[:6], actions[:6], 3 * torch.randn(6), torch.zeros(6), frames[:6], torch.empty(0))
    parameters = list(learner.network.parameters())
    tables = [
        (table.keys[: table.size].clone().requires_grad_(), table.values[: table.size].clone().requires_grad_())
        for table in learner.memory.tables
    ]
    read = []
    for key, action in zip(learner.network(batch.frames), batch.action.tolist()):
        keys, values = tables[action]
        kernel = 1 / ((key - keys).square().sum(1) + 1e-3)
        read.append((kernel * values).sum() / kernel.sum())
    loss = 0.5 * (torch.stack(read) - batch.reward).square().mean()
    gradients = torch.autograd.grad(loss, [*parameters, *(leaf for pair in tables for leaf in pair)])
    before = [parameter.detach().clone() for parameter in parameters]
    metrics = learner._update(batch)
    assert float(metrics["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    norm = torch.cat([gradient.flatten() for gradient in gradients[: len(parameters)]]).norm()
    assert float(metrics["train/gradient_norm"]) == pytest.approx(float(norm), rel=1e-4)
    scale = 1.0 if max_norm is None else max_norm / float(norm)
    for old, new, gradient in zip(before, parameters, gradients):
        assert bool(gradient.any())
        torch.testing.assert_close(old - new.detach(), rate * scale * gradient, rtol=1e-3, atol=1e-5)
    for table, pair, moves in zip(learner.memory.tables, tables, (gradients[i : i + 2] for i in range(len(parameters), len(gradients), 2))):
        for column, old, gradient in zip((table.keys, table.values), pair, moves):
            assert bool((gradient != 0).all())
            torch.testing.assert_close(old.detach() - column[: table.size], rate * gradient, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was():
    learner = agent()
    fill(learner, [1.0, 2.0, 3.0])
    batch = learner.replay.sample(4)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(NonFiniteLoss, match="neural_episodic_control"):
        learner._update(batch._replace(reward=torch.full((4,), float("nan"))))
    assert_equal(learner.state_dict(), before)


def test_what_learning_read_is_marked_as_used():
    learner = agent(k=1, capacity=3)
    fill(learner, [1.0, 2.0, 3.0])
    batch = learner.replay.sample(4)
    learner._update(batch._replace(action=torch.ones(4, dtype=torch.int64)))
    stamps = [int(table.stamps[0]) for table in learner.memory.tables]
    assert stamps[1] > max(stamps[0], stamps[2])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_what_is_looked_at_after_an_update_is_what_a_saved_copy_sees(precision):
    torch.manual_seed(6)
    spec = Catch(1, CPU, pixels_per_cell=12).spec
    knobs = TINY | {"precision": precision, "learning_rate": 1e-2}
    learner, other = (NeuralEpisodicControl(spec, CPU, **knobs) for _ in range(2))
    frames = torch.randint(0, 256, (4, 2, *spec.obs_shape), dtype=torch.uint8)
    actions, before = torch.arange(4) % 3, learner._look(frames)[0]
    learner.memory.write(actions.repeat(2), torch.randn(8, 4), torch.arange(8), torch.randn(8))
    learner._update(Batch(frames, actions, torch.randn(4), torch.zeros(4), frames, torch.empty(0)))
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    key, reading = learner._look(frames)
    assert not torch.equal(key, before)
    assert torch.equal(other._look(frames)[0], key)
    assert torch.equal(other._look(frames)[1].value, reading.value)
