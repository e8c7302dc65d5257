"""Exploration on a toy with a known trap: who is not drawn to what is new settles for the small reward at hand."""

import pytest
import torch

from agents.actor_critic import ActorCritic
from agents.bonus import CountBonus, density_shape
from agents.loop import evaluate, play
from envs.toy import Deceptive
from generative.cts import CTS
from generative.hash_counts import HashCounts
from generative.pixelcnn import PixelCNN

CPU = torch.device("cpu")
HEIGHT, SMALL, LARGE = 15, 0.1, 1.0
DENSITIES = {
    "cts": (lambda shape: CTS(obs_shape=shape), 0.05),
    "hash_counts": (lambda shape: HashCounts(shape, 2, CPU, bits=64), 0.05),
    "pixelcnn": (lambda shape: PixelCNN(shape, 2, CPU), 0.3),
}


def score(density: str | None, seed: int, frames: int = 20_000) -> float:
    """The mean return of 32 episodes after training."""
    torch.manual_seed(seed)
    env, bonus, scale = Deceptive(8, CPU, HEIGHT, SMALL, LARGE), None, 0.0
    if density:
        make, scale = DENSITIES[density]
        bonus = CountBonus(env.spec.obs_shape, CPU, make(density_shape(env.spec.obs_shape)))
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
@pytest.mark.parametrize("density", DENSITIES)
def test_with_a_density_the_large_reward_is_found(density):
    scores = [score(density, seed) for seed in range(10)]
    assert sum(found > 0.9 for found in scores) >= 9, scores


@pytest.mark.usefixtures("one_thread")
def test_one_seed_with_and_without():
    assert score(None, 0, 12_000) == pytest.approx(SMALL, abs=0.01)
    assert score("cts", 0, 16_000) > 0.9
