import copy

import pytest
import torch
from whole import CPU, SPEC, assert_equal, frame

from agents.api import Agent
from agents.dqn import DQN, QNetwork, targets
from agents.loop import play
from agents.replay import Batch
from envs.api import Step
from envs.toy import Catch
from generative.fit import NonFiniteLoss


def agent(spec=SPEC, **knobs) -> DQN:
    return DQN(spec, CPU, **{"capacity": 200, "stack_frames": 2, "precision": "float32"} | knobs)


def script(learner: DQN, rewards: list[float], discounts: list[float], last: list[int], first_frame: int = 1) -> None:
    """Lets the agent live through frames first_frame, first_frame + 1, ...; a successor is 100 more than the frame would have been."""
    carry, opens = learner.initial(1), True
    for t, reward in enumerate(rewards):
        number = first_frame + t
        step = Step(frame(number), torch.zeros(1), torch.ones(1), torch.tensor([opens]), frame(number))
        decision = learner.act(step, carry, explore=True)
        learner.learn()
        obs, ends = frame(number + 1), bool(last[t])
        next_obs = frame(number + 101) if ends else obs
        facts = torch.tensor([float(reward)]), torch.tensor([float(discounts[t])]), torch.tensor([ends])
        learner.observe(step, decision, Step(obs, *facts, next_obs))
        carry, opens = decision.carry, ends
    learner.learn()


def held(learner: DQN) -> dict[int, tuple]:
    """By the last frame of each stack that may be sampled: the frame before, n-step reward, weight, the next stack, whole return."""
    replay = learner.replay
    batch = replay.sample(2000)
    rows = {}
    for row in range(2000):
        before, now = (int(picture[0, 0, 0]) for picture in batch.frames[row])
        after = [int(picture[0, 0, 0]) for picture in batch.next_frames[row]]
        whole = round(float(batch.whole_return[row]), 4) if batch.whole_return.numel() else None
        rows[now] = (before, round(float(batch.reward[row]), 4), round(float(batch.discount[row]), 4), after, whole)
    assert len(rows) == len(replay)
    return rows


def unlike(learner: DQN) -> DQN:
    """With a target network of its own."""
    for parameter in learner.target.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    return learner


def test_is_an_agent():
    assert isinstance(agent(), Agent)


# Targets


def test_target_takes_the_best_action_of_the_target_network():
    next_q = torch.tensor([[1.0, 5.0, 2.0], [3.0, -1.0, 0.0]])
    got = targets(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), next_q, None, None, 0.0)
    assert got.tolist() == [3.5, 2.0]


def test_double_target_lets_the_online_network_choose():
    next_q = torch.tensor([[1.0, 5.0, 2.0], [3.0, -1.0, 7.0]])
    online = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    got = targets(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), next_q, online, None, 0.0)
    assert got.tolist() == [1.5, 1.0]


@pytest.mark.parametrize(("eta", "expected"), [(0.0, 3.0), (0.25, 4.25), (1.0, 8.0)])
def test_mixed_monte_carlo_weighs_both(eta, expected):
    got = targets(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([[4.0, 0.0]]), None, torch.tensor([8.0]), eta)
    assert got.tolist() == [expected]


def test_loss_is_square_within_the_clip_and_straight_beyond():
    learner = agent(error_clip=2.0)
    q = torch.tensor([0.0, 1.0, 6.0], requires_grad=True)
    loss = learner.loss(q, torch.zeros(3))
    loss.backward()
    assert loss.item() == pytest.approx((0 + 0.5 + (2 * 6 - 2)) / 3)
    torch.testing.assert_close(q.grad, torch.tensor([0.0, 1.0, 2.0]) / 3)
    assert float(agent(error_clip=None).loss(torch.tensor([3.0, 1.0]), torch.zeros(2))) == pytest.approx(2.5)


def test_dueling_streams_have_advantages_of_mean_zero():
    torch.manual_seed(1)
    network = QNetwork(SPEC, 2, dueling=True, precision="float32", device=CPU)
    frames = torch.randint(0, 256, (5, 2, *SPEC.obs_shape), dtype=torch.uint8)
    q, value = network(frames), network.value(network.torso(frames))
    assert q.shape == (5, 3)
    torch.testing.assert_close(q.mean(1, keepdim=True), value)
    torch.testing.assert_close(q - value, (lambda a: a - a.mean(1, keepdim=True))(network.advantage(network.torso(frames))))


def test_update_draws_q_towards_the_target_of_both_networks():
    torch.manual_seed(2)
    learner = unlike(agent(stack_frames=1, double=True, optimiser="adam", learning_rate=1e-2, eta=0.5, error_clip=None))
    frames = torch.randint(0, 256, (6, 1, *SPEC.obs_shape), dtype=torch.uint8)
    batch = Batch(frames, torch.arange(6) % 3, torch.ones(6), torch.full((6,), 0.9), frames.flip(0), torch.full((6,), 4.0))
    with torch.no_grad():
        best = learner.online(batch.next_frames).argmax(1)
        assert not torch.equal(best, learner.target(batch.next_frames).argmax(1))
        value = learner.target(batch.next_frames)[torch.arange(6), best]
        goal = 0.5 * (1 + 0.9 * value) + 0.5 * 4
        before = learner.online(frames)[torch.arange(6), batch.action]
    kept = {name: parameter.clone() for name, parameter in learner.target.named_parameters()}
    assert float(learner._update(batch)["train/loss"]) == pytest.approx(float(0.5 * (before - goal).square().mean()), rel=1e-4)
    for _ in range(200):
        learner._update(batch._replace(discount=torch.zeros(6)))
    after = learner.online(frames)[torch.arange(6), batch.action]
    torch.testing.assert_close(after, torch.full((6,), 2.5), rtol=0, atol=0.1)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in learner.target.named_parameters())


# What is remembered


def test_lost_life_termination_and_time_limit_in_n_step_targets():
    """gamma 1/2, n = 2; frames 1 2 3 4, a life lost after 2, a time limit after 4; then frames 5 6, a termination after 6."""
    learner = agent(gamma=0.5, n_steps=2, reward_clip=None)
    script(learner, [1, 2, 4, 8, 16, 32], [1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1])
    assert held(learner) == {
        1: (0, 1 + 0.5 * 2, 0.0, [2, 3], None),  # nothing of the next life flows back
        2: (1, 2.0, 0.0, [3, 4], None),
        3: (2, 4 + 0.5 * 8, 0.25, [4, 105], None),  # bootstraps from the true successor of the time limit
        4: (3, 8.0, 0.5, [4, 105], None),
        5: (0, 16 + 0.5 * 32, 0.0, [6, 107], None),
        6: (5, 32.0, 0.0, [6, 107], None),
    }


def test_whole_returns_are_known_when_the_episode_ends():
    learner = agent(gamma=0.5, eta=0.1, reward_clip=None)
    script(learner, [1, 2, 4], [1, 1, 1], [0, 0, 0])
    assert len(learner.replay) == 0
    learner = agent(gamma=0.5, eta=0.1, reward_clip=None)
    script(learner, [1, 2, 4, 8], [1, 0, 1, 0], [0, 0, 0, 1])
    rows = held(learner)
    assert {now: row[4] for now, row in rows.items()} == {1: 2.0, 2: 2.0, 3: 8.0, 4: 8.0}
    assert {now: row[1:3] for now, row in rows.items()} == {1: (1.0, 0.5), 2: (2.0, 0.0), 3: (4.0, 0.5), 4: (8.0, 0.0)}


def test_whole_return_of_a_cut_trace_is_closed_by_the_target_network():
    learner = unlike(agent(gamma=0.5, eta=0.1, reward_clip=None))
    script(learner, [1, 2], [1, 1], [0, 1])
    with torch.no_grad():
        value = float(learner.target(torch.stack([frame(2), frame(103)], 1)).amax())
    rows = held(learner)
    assert rows[2][4] == pytest.approx(2 + 0.5 * value, abs=1e-3)
    assert rows[1][4] == pytest.approx(1 + 0.5 * (2 + 0.5 * value), abs=1e-3)


def test_rewards_are_clipped_before_the_bonus_comes_on_top():
    bonus = FrameBonus()
    learner = agent(bonus=bonus, bonus_scale=0.5, gamma=1.0)
    script(learner, [7, -3, 0.25], [1, 1, 0], [0, 0, 1])
    assert {now: row[1] for now, row in held(learner).items()} == {1: 1 + 0.5 * 2, 2: -1 + 0.5 * 3, 3: 0.25 + 0.5 * 104}
    assert bonus.seen == [2, 3, 104]


class FrameBonus:
    """A frame is worth its grey level."""

    def __init__(self):
        self.seen = []

    def __call__(self, frames):
        self.seen += frames[:, 0, 0, 0].tolist()
        return frames[:, 0, 0, 0].float()

    def metrics(self):
        return {"bonus/mean": float(len(self.seen))}

    def required_bytes(self, frames):
        return 1000

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def test_bonus_is_computed_in_learn_and_saved_with_the_agent():
    bonus = FrameBonus()
    learner = agent(bonus=bonus)
    step = Step(frame(1), torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool), frame(1))
    decision = learner.act(step, learner.initial(1), explore=True)
    after = frame(2)
    learner.observe(step, decision, Step(after, torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.bool), after))
    assert bonus.seen == []
    metrics = learner.learn()
    assert bonus.seen == [2]
    assert metrics["bonus/mean"] == 1
    assert learner.learn() == {}
    other = agent(bonus=FrameBonus())
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert other.bonus.seen == [2]
    assert learner.required_bytes(100) == agent().required_bytes(100) + 1000


# When things happen


def test_epsilon_falls_in_a_straight_line_once_learning_starts():
    learner = agent(learning_starts_frames=100, epsilon_start=0.9, epsilon_end=0.1, epsilon_frames=200)
    seen = {}
    for frames in (0, 50, 100, 150, 200, 300, 10_000):
        learner.frames = frames
        seen[frames] = round(learner.epsilon(), 6)
    assert seen == {0: 0.9, 50: 0.9, 100: 0.9, 150: 0.7, 200: 0.5, 300: 0.1, 10_000: 0.1}


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_epsilon_is_the_share_of_random_actions_while_exploring(epsilon):
    learner = agent(epsilon_start=epsilon)
    many = frame(9, 12_000)
    step = Step(many, torch.zeros(12_000), torch.ones(12_000), torch.ones(12_000, dtype=torch.bool), many)
    greedy = learner.act(step, learner.initial(12_000), explore=False).action
    assert len(greedy.unique()) == 1
    explored = learner.act(step, learner.initial(12_000), explore=True).action
    assert float((explored != greedy).float().mean()) == pytest.approx(epsilon * 2 / 3, abs=0.02)
    assert len(explored.unique()) == 3


class Recorder(DQN):
    """Notes at which frame it updates and copies its network."""

    def __init__(self, *args, **knobs):
        super().__init__(*args, **knobs)
        self.updated, self.synced = [], []

    def _update(self, batch):
        self.updated.append(self._due)
        return {"train/loss": 0.0}

    def sync(self):
        self.synced.append(self._due)


def test_updates_and_copies_fall_due_in_frames_whatever_the_lanes():
    schedules = []
    for lanes in (1, 3, 8, 40):
        env = Catch(lanes, CPU)
        knobs = {"learning_starts_frames": 100, "update_frames": 12, "target_frames": 50, "precision": "float32"}
        learner = Recorder(env.spec, CPU, capacity=4000, stack_frames=1, **knobs)
        for _ in play(env, learner, frames=240, seed=1):
            assert all(due <= learner.frames for due in learner.updated)
        schedules.append((learner.updated, learner.synced))
    for updated, synced in schedules:
        assert updated == [112, 124, 136, 148, 160, 172, 184, 196, 208, 220, 232]
        assert synced == [160, 208]


def test_gradients_longer_than_the_norm_are_scaled_down():
    torch.manual_seed(6)
    learner = agent(stack_frames=1, optimiser="rmsprop", optimiser_epsilon=1e3, learning_rate=1e3, decay=0.0, max_gradient_norm=1e-3)
    frames = torch.randint(0, 256, (6, 1, *SPEC.obs_shape), dtype=torch.uint8)
    batch = Batch(frames, torch.zeros(6, dtype=torch.int64), torch.full((6,), 50.0), torch.zeros(6), frames, torch.empty(0))
    before = learner.optimiser.master.clone()
    assert float(learner._update(batch)["train/gradient_norm"]) > 0.1
    assert float((learner.optimiser.master - before).norm()) == pytest.approx(1e-3, rel=0.01)


def test_nothing_is_learned_before_there_is_something_to_sample():
    learner = Recorder(SPEC, CPU, capacity=200, eta=0.5, learning_starts_frames=0, update_frames=2, precision="float32")
    script(learner, [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0])
    assert learner.updated == []
    script(learner, [0, 0], [1, 0], [0, 1], first_frame=50)
    assert learner.updated == [12]


def test_acting_changes_nothing():
    learner = agent()
    script(learner, [1, 2, 4], [1, 1, 0], [0, 0, 1])
    before = copy.deepcopy(learner.state_dict())
    step = Step(frame(3), torch.zeros(1), torch.ones(1), torch.tensor([False]), frame(3))
    carry = learner.initial(1)
    kept = carry.clone()
    learner.act(step, carry, explore=True)
    learner.act(step, carry, explore=False)
    assert torch.equal(carry, kept)
    assert_equal(learner.state_dict(), before)


def test_saving_in_the_middle_loses_nothing_that_was_observed():
    learner = agent()
    step = Step(frame(1), torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool), frame(1))
    decision = learner.act(step, learner.initial(1), explore=True)
    after = Step(frame(2), torch.ones(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), frame(102))
    learner.observe(step, decision, after)
    other = agent()
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert held(other) == {1: (0, 1.0, 0.0, [1, 102], None)}


def test_a_loss_that_is_not_finite_leaves_the_parameters_as_they_were():
    learner = agent(reward_clip=None, learning_starts_frames=0, update_frames=2)
    script(learner, [1, 1], [1, 0], [0, 1])
    before = copy.deepcopy(learner.optimiser.state_dict())
    with pytest.raises(NonFiniteLoss, match="dqn"):
        script(learner, [float("nan")] * 20, [0] * 20, [1] * 20)
    assert torch.isfinite(learner.optimiser.state_dict()["master"]).all()
    assert learner.optimiser.state_dict()["updates"] >= before["updates"]
