"""Exploration on a toy with a known trap: who is not drawn to what is new settles for the small reward at hand.

The same agent throughout; only the bonus and its scale differ. `job=bench bench=deceptive` draws it. Episodes last longer for those who
climb, so a constant bonus of 0.005 leaves the trap too: this tests that bonuses reach what is learned from, not that novelty is what pays.
"""

import pytest
import torch

from agents.actor_critic import ActorCritic
from agents.bonus import CountBonus, density_shape
from agents.distillation import RandomNetworkDistillation
from agents.loop import evaluate, play
from envs.toy import Deceptive
from generative.cts import CTS
from generative.hash_counts import HashCounts
from generative.nade import NADE
from generative.pixelcnn import PixelCNN

CPU = torch.device("cpu")
HEIGHT, SMALL, LARGE = 15, 0.1, 1.0
DENSITIES = {
    "cts": lambda shape: CTS(obs_shape=shape),
    "hash_counts": lambda shape: HashCounts(shape, 2, CPU, bits=64),
    "pixelcnn": lambda shape: PixelCNN(shape, 2, CPU),
    "nade": lambda shape: NADE(shape, 2, CPU),
}
SCALES = {"cts": 0.05, "hash_counts": 0.05, "pixelcnn": 1.0, "nade": 1.0, "rnd": 0.05}


def make_bonus(name: str, obs_shape: tuple[int, int, int]) -> CountBonus | RandomNetworkDistillation:
    if name == "rnd":
        return RandomNetworkDistillation(obs_shape, CPU)
    return CountBonus(obs_shape, CPU, DENSITIES[name](density_shape(obs_shape)))


def score(name: str | None, seed: int, frames: int = 20_000) -> float:
    """The mean return of 32 episodes after training."""
    torch.manual_seed(seed)
    env = Deceptive(8, CPU, HEIGHT, SMALL, LARGE)
    bonus, scale = (make_bonus(name, env.spec.obs_shape), SCALES[name]) if name else (None, 0.0)
    agent = ActorCritic(env.spec, CPU, bonus=bonus, stack_frames=1, bonus_scale=scale)
    for _ in play(env, agent, frames, seed):
        pass
    reward, episodes = 0.0, 0
    for tick in evaluate(env, agent, 4, seed + 100):
        reward += float(tick.after.reward.sum())
        episodes += int(tick.after.last.sum())
    return reward / episodes


@pytest.fixture
def one_thread():
    """Networks this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_without_a_bonus_the_trap_holds():
    assert [score(None, seed) for seed in range(10)] == pytest.approx([SMALL] * 10, abs=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SCALES)
def test_with_a_bonus_the_large_reward_is_found(name):
    scores = [score(name, seed) for seed in range(10)]
    assert sum(found > 0.9 for found in scores) >= 9, scores


@pytest.mark.usefixtures("one_thread")
def test_one_seed_with_and_without():
    assert score(None, 0, 12_000) == pytest.approx(SMALL, abs=0.01)
    assert score("cts", 0, 16_000) > 0.9
    assert score("nade", 0, 6_000) > 0.9
