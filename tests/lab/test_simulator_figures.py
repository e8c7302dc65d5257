"""Figures of simulators: a perfect one, a frozen one and one deaf to actions get what they deserve, in closed form where there is one."""

import math

import pytest
import torch
from perfect import PerfectCatch

import launch
from agents.api import Decision
from agents.loop import evaluate
from envs.api import Step
from envs.stats import EpisodeStats
from envs.toy import Catch
from generative.clips import ClipData
from generative.last_frame import LastFrame
from lab.simulator_figures import HELD_STEPS, control_score, counterfactuals, event_figures, picture_errors, steps_per_second

SIZE = 7


class Optimal:
    """Moves under the ball that it sees."""

    def initial(self, num_envs):
        return None

    def act(self, step, carry, explore):
        _, column, paddle = PerfectCatch(SIZE).start(type("Clip", (), {"frames": step.obs[:, None]})())
        return Decision((column - paddle).sign() + 1, None, {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "clips"
    words = ["job=collect", "env=Catch", f"env.size={SIZE}", "frames=2_400", "frames_per_iteration=600", "num_envs=6", f"data={folder}"]
    assert launch.main(words) == 0
    return ClipData(folder)


def test_a_perfect_simulator_makes_no_error_and_a_frozen_one_what_can_be_counted(data):
    perfect = picture_errors(PerfectCatch(SIZE), data, 2, 4, 200)
    assert perfect["mse"] == [0.0] * 4
    assert picture_errors(PerfectCatch(SIZE), data, 2, 9, 200)["mse"] == [0.0] * (SIZE - 1) + [None] * (
        10 - SIZE
    )  # episodes last six steps
    assert perfect["psnr"] == [100.0] * 4
    assert perfect["ssim"] == pytest.approx([1.0] * 4)
    assert perfect["moving_mse"] == [0.0] * 4
    frozen = picture_errors(LastFrame((1, SIZE, SIZE), 3, "cpu"), data, 2, 1, 10_000)
    by_hand, moving, moved = [], 0.0, 0
    for before, after in data.clips(torch.arange(data.starts(1)), 1).frames / 255:
        by_hand.append((after - before).square().mean().item())
        moving += (after - before).square().sum().item()
        moved += int((after != before).sum())
    assert frozen["mse"][0] == pytest.approx(sum(by_hand) / len(by_hand))
    assert frozen["psnr"][0] == pytest.approx(-10 * math.log10(frozen["mse"][0]))
    assert frozen["moving_mse"][0] == pytest.approx(moving / moved) == 1.0


def test_events_are_counted(data):
    found = event_figures(PerfectCatch(SIZE), data, 2, 10_000)
    assert found["reward"]["precision"] == found["reward"]["recall"] == found["end"]["precision"] == found["end"]["recall"] == 1.0
    assert found["reward"]["happened"] == found["end"]["happened"] == found["end"]["foretold"] > 50
    assert found["reward_absolute_error"] == 0.0
    frozen = event_figures(LastFrame((1, SIZE, SIZE), 3, "cpu"), data, 2, 10_000)
    assert frozen["end"] == {"happened": found["end"]["happened"], "foretold": 0, "precision": None, "recall": 0.0}
    share = found["reward"]["happened"] / found["transitions"]
    assert frozen["reward_absolute_error"] == pytest.approx(share)
    deaf = event_figures(PerfectCatch(SIZE, deaf=True), data, 2, 10_000)  # knows when, and not always what
    assert deaf["reward"]["precision"] == deaf["reward"]["recall"] == 1.0
    assert 0 < deaf["reward_absolute_error"] < 2 * share


def test_actions_are_told_apart_where_the_live_world_does(data):
    env = Catch(6, "cpu", SIZE)
    assert counterfactuals(PerfectCatch(SIZE), data, env, 1, 12)["overlap"] == 1.0  # where episodes open
    found = counterfactuals(PerfectCatch(SIZE), data, env, 1, 13)
    assert found["recall"] == found["overlap"] == 1.0
    assert found["specificity"] in (1.0, None)  # None: no two actions lead to the same
    assert found["correlation"] == pytest.approx(1.0)
    assert 3 <= found["pairs"] <= 3 * 6 * HELD_STEPS  # three pairs of actions in up to six lanes, at four steps
    for blind in (PerfectCatch(SIZE, deaf=True), LastFrame((1, SIZE, SIZE), 3, "cpu")):
        seen = counterfactuals(blind, data, env, 1, 13)
        assert (seen["pairs"], seen["recall"], seen["overlap"], seen["correlation"]) == (found["pairs"], 0.0, 0.0, 0.0)


def test_a_world_that_is_not_the_recorded_one_is_noticed(data):
    with pytest.raises(AssertionError, match="not the recorded one"):
        counterfactuals(PerfectCatch(SIZE), ClipDataOfAnotherSeed(data), Catch(6, "cpu", SIZE), 1, 13)


class ClipDataOfAnotherSeed:
    def __init__(self, data):
        self.parts = [{**part, "env_seed": 1} for part in data.parts]
        self.actions, self.clips_at, self.lanes = data.actions, data.clips_at, data.lanes


def test_every_lane_that_ends_too_near_leaves_nothing(data):
    env = Catch(6, "cpu", SIZE)
    assert counterfactuals(PerfectCatch(SIZE), data, env, 1, 3) is None  # episodes last six steps, and four are tried
    assert counterfactuals(PerfectCatch(SIZE), data, env, 1, 2) is not None


def test_playing_on_foretold_frames(data):
    """With the truth at every step it is the live world; a perfect simulator is as good as that; a frozen one shows the start for ever."""
    agent, env = Optimal(), Catch(64, "cpu", SIZE)
    stats, first = EpisodeStats(64, 1, "cpu"), {}
    for tick in evaluate(env, agent, 1, 5):
        stats.update(tick.after)
        for episode in stats.drain():
            first.setdefault(episode.lane, episode.episode_return)
    live = [first[lane] for lane in range(64)]
    assert live == [1.0] * 64
    frozen = LastFrame((1, SIZE, SIZE), 3, "cpu")
    for simulator, every in ((frozen, 1), (PerfectCatch(SIZE), 3), (PerfectCatch(SIZE), 100)):
        assert control_score(simulator, env, agent, every, 5, 50) == live
    blind = control_score(frozen, env, agent, 100, 5, 50)  # sees the ball and itself at the start for ever, and goes on to the wall
    columns = env.reset(5).obs[:, 0, 0].argmax(1)
    walls = torch.tensor([0, SIZE // 2, SIZE - 1])
    expected = [1.0 if int(column) in walls.tolist() else -1.0 for column in columns]
    assert blind == expected
    assert control_score(PerfectCatch(SIZE), env, agent, 100, 5, SIZE - 2) == [0.0] * 64  # stopped before the ball has landed


class Clock:
    """Two lanes whose episodes last two and five steps; each picture shows the step of its episode, each step gives 1."""

    num_envs, lengths = 2, torch.tensor([2, 5])

    def reset(self, seed):
        self.time = torch.zeros(2, dtype=torch.int64)
        return self._step(torch.ones(2, dtype=torch.bool))

    def step(self, action):
        self.time = (self.time + 1) % self.lengths
        return self._step(self.time == 0)

    def _step(self, last):
        obs = self.time.to(torch.uint8)[:, None, None, None].expand(2, 1, 3, 3)
        return Step(obs, torch.ones(2), 1 - last.float(), last, obs)


class Witness:
    """Notes what it is shown; remembers the sum of the pictures of its episode."""

    def __init__(self):
        self.shown = []

    def initial(self, num_envs):
        return torch.zeros(num_envs, dtype=torch.int64)

    def act(self, step, carry, explore):
        carry = torch.where(step.last, 0, carry)
        seen = step.obs[:, 0, 0, 0].long()
        self.shown.append((seen.tolist(), carry.tolist()))
        return Decision(torch.zeros(len(carry), dtype=torch.int64), carry + seen, {})


def test_lanes_are_told_the_truth_where_they_open_and_count_their_first_episode_alone():
    agent = Witness()
    assert control_score(LastFrame((1, 3, 3), 1, "cpu"), Clock(), agent, 3, 0, 50) == [2.0, 5.0]
    acted_on = [agent.shown[call] for call in (0, 2, 4, 5, 7)]  # calls 1, 3 and 6 are of one who is told the truth at every step
    assert [frames for frames, _ in acted_on] == [[0, 0], [0, 0], [0, 0], [1, 3], [0, 3]]
    assert [memory for _, memory in acted_on] == [[0, 0], [0, 0], [0, 0], [0, 3], [0, 6]]
    assert [agent.shown[call][0] for call in (1, 3, 6)] == [[1, 1], [0, 2], [0, 4]]
    assert len(agent.shown) == 8


def test_speed_counts_lanes(data):
    rate = steps_per_second(LastFrame((1, SIZE, SIZE), 3, "cpu"), data.spread_clips(4, 1))
    assert rate > 1000
