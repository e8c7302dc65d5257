import pytest
import torch

from agents.episodic_control import EpisodicControl
from agents.loop import evaluate, play
from envs.api import Spec, Step, UserError
from envs.toy import Catch
from generative.api import Encoder

CPU = torch.device("cpu")
SPEC = Spec("line", 2, ("left", "right"), (1, 1, 8), 1)


class Pixels:
    """The frame itself as its features."""

    def __init__(self, obs_shape):
        self.obs_shape = obs_shape
        self.features = obs_shape[0] * obs_shape[1] * obs_shape[2]

    def encode(self, frames):
        return frames.flatten(1).float()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def agent(spec=SPEC, **knobs) -> EpisodicControl:
    return EpisodicControl(spec, CPU, encoder=Pixels(spec.obs_shape), **{"capacity": 100, "k": 1, "search": "torch"} | knobs)


def frame(place: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([place]), 8).to(torch.uint8).view(1, 1, 1, 8) * 255


def episode(learner: EpisodicControl, actions: list[int], rewards: list[float], discounts: list[float], last: list[int]) -> None:
    """Lets the agent live through frames 0, 1, 2, ... with the actions given."""
    carry = learner.initial(1)
    for t, action in enumerate(actions):
        step = Step(frame(t), torch.zeros(1), torch.ones(1), torch.tensor([t == 0]), frame(t))
        decision = learner.act(step, carry, explore=True)._replace(action=torch.tensor([action]))
        ends = bool(last[t])
        successor = frame(t + 1)
        obs = frame(0) if ends else successor
        after = Step(obs, torch.tensor([rewards[t]]), torch.tensor([discounts[t]]), torch.tensor([ends]), successor if ends else obs)
        learner.observe(step, decision, after)
        carry = decision.carry
    learner.learn()


def value(learner: EpisodicControl, place: int, action: int) -> float:
    step = Step(frame(place), torch.zeros(1), torch.ones(1), torch.tensor([True]), frame(place))
    decision = learner.act(step, learner.initial(1), explore=False)
    return float(learner.memory.estimate(decision.notes["key"], decision.notes["hash"]).value[0, action])


def test_pixels_are_an_encoder():
    assert isinstance(Pixels((1, 1, 8)), Encoder)


def test_whole_episodes_are_written_backwards_with_discount():
    learner = agent(gamma=0.5)
    episode(learner, [0, 0, 0], [1, 2, 4], [1, 1, 0], [0, 0, 1])
    assert [value(learner, place, 0) for place in range(3)] == [3.0, 4.0, 4.0]
    assert value(learner, 0, 1) == torch.inf


def test_the_better_episode_stays():
    learner = agent()
    episode(learner, [0, 0], [0, 5], [1, 0], [0, 1])
    episode(learner, [0, 0], [0, 3], [1, 0], [0, 1])
    assert value(learner, 0, 0) == 5.0
    episode(learner, [0, 0], [1, 6], [1, 0], [0, 1])
    assert value(learner, 0, 0) == 7.0


def test_nothing_is_written_before_the_episode_ends():
    learner = agent()
    episode(learner, [0, 0], [1, 1], [1, 1], [0, 0])
    assert len(learner.memory) == 0


def test_time_limit_drops_the_episode():
    learner = agent()
    episode(learner, [0, 0], [1, 1], [1, 1], [0, 1])
    assert len(learner.memory) == 0
    episode(learner, [1, 1], [1, 1], [1, 0], [0, 1])
    assert learner.memory.sizes == [0, 2]


def test_lost_life_ends_the_return_but_not_the_episode():
    learner = agent()
    episode(learner, [0, 0, 0], [1, 2, 4], [1, 0, 0], [0, 0, 1])
    assert [value(learner, place, 0) for place in range(3)] == [3.0, 2.0, 4.0]


def test_greedy_choice_and_random_ties():
    torch.manual_seed(0)
    learner = agent()
    episode(learner, [0, 0], [5, 0], [1, 0], [0, 1])
    episode(learner, [1, 1], [5, 0], [1, 0], [0, 1])
    step = Step(frame(0), torch.zeros(1), torch.ones(1), torch.tensor([True]), frame(0))
    chosen = [int(learner.act(step, learner.initial(1), explore=False).action) for _ in range(200)]
    assert 60 < sum(chosen) < 140
    episode(learner, [1, 1], [9, 0], [1, 0], [0, 1])
    assert {int(learner.act(step, learner.initial(1), explore=False).action) for _ in range(50)} == {1}


def test_epsilon_is_the_share_of_random_actions_while_exploring():
    torch.manual_seed(0)
    learner = agent(epsilon=0.3)
    episode(learner, [0], [5], [0], [1])
    episode(learner, [1], [1], [0], [1])
    many = frame(0).expand(10_000, 1, 1, 8)
    step = Step(many, torch.zeros(10_000), torch.ones(10_000), torch.ones(10_000, dtype=torch.bool), many)
    assert float(learner.act(step, learner.initial(10_000), explore=True).action.float().mean()) == pytest.approx(0.15, abs=0.015)
    assert int(learner.act(step, learner.initial(10_000), explore=False).action.sum()) == 0


def test_acting_changes_nothing():
    learner = agent()
    episode(learner, [0, 1], [5, 0], [1, 0], [0, 1])
    before = torch.cat([table["stamps"] for table in learner.state_dict()["memory"]["tables"].values()]).tolist()
    value(learner, 0, 0)
    after = torch.cat([table["stamps"] for table in learner.state_dict()["memory"]["tables"].values()]).tolist()
    assert before == after


def test_key_frames_tell_apart_what_one_frame_cannot():
    learner = agent(key_frames=2)
    carry = learner.initial(1)
    keys = []
    for places in ([0, 3], [1, 3]):
        carry = learner.initial(1)
        for t, place in enumerate(places):
            step = Step(frame(place), torch.zeros(1), torch.ones(1), torch.tensor([t == 0]), frame(place))
            decision = learner.act(step, carry, explore=False)
            carry = decision.carry
        keys.append(decision.notes["key"])
        assert decision.notes["key"].shape == (1, 16)
    assert not torch.equal(keys[0], keys[1])
    assert torch.equal(keys[0][:, 8:], keys[1][:, 8:])


def test_a_key_sees_nothing_of_the_episode_before():
    learner = agent(key_frames=3)
    opening = Step(frame(4), torch.zeros(1), torch.ones(1), torch.tensor([True]), frame(4))
    first = learner.act(opening, learner.initial(1), explore=False)
    later = learner.act(opening._replace(last=torch.tensor([False])), first.carry, explore=False)
    again = learner.act(opening, later.carry, explore=False)
    assert torch.equal(again.notes["key"], first.notes["key"])
    assert torch.equal(again.notes["hash"], first.notes["hash"])
    assert not torch.equal(later.notes["key"], first.notes["key"])


@pytest.mark.parametrize(("knob", "bad"), [("gamma", 1.5), ("epsilon", -0.1), ("key_frames", 0), ("k", 0), ("capacity", 0)])
def test_bad_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=knob):
        agent(**{knob: bad})


def test_learns_to_catch_and_a_saved_copy_plays_alike():
    torch.manual_seed(3)
    env = Catch(8, CPU)
    learner = EpisodicControl(env.spec, CPU, encoder=Pixels(env.spec.obs_shape), capacity=2000, k=3, search="torch")
    for _ in play(env, learner, frames=16_000, seed=1):
        pass

    def score(player: EpisodicControl) -> float:
        torch.manual_seed(9)
        ticks = list(evaluate(env, player, episodes_per_lane=6, seed=2))
        ended = torch.stack([tick.after.last for tick in ticks])
        return float(torch.stack([tick.after.reward for tick in ticks])[ended].mean())

    copy = EpisodicControl(env.spec, CPU, encoder=Pixels(env.spec.obs_shape), capacity=2000, k=3, search="torch")
    copy.load_state_dict(learner.state_dict())
    assert score(learner) > 0.9
    assert score(copy) == score(learner)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_qbert_rises_well_above_random_play_in_300_000_frames(seed):
    """Random play earns 163.9 points (the table of random and human scores in lab/protocols.py)."""
    from envs.atari import AtariEnv
    from envs.protocols import PROTOCOLS
    from envs.stats import EpisodeStats
    from generative.projection import RandomProjection

    torch.manual_seed(seed)
    env = AtariEnv("Qbert", 16, CPU, PROTOCOLS["mfec2016"])
    encoder = RandomProjection(env.spec.obs_shape, env.spec.num_actions, CPU)
    learner, stats, returns = EpisodicControl(env.spec, CPU, encoder=encoder), EpisodeStats(16, 4, CPU), []
    for tick in play(env, learner, frames=300_000, seed=seed):
        stats.update(tick.after)
        finished = stats.drain()
        if tick.played > 200_000:
            returns += [episode.episode_return for episode in finished]
    assert sum(returns) / len(returns) > 2.5 * 163.9
