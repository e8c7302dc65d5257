"""Exploration on a toy with a known trap: who is not drawn to what is new settles for the small reward at hand.

The same agent throughout; only the bonus and its scale differ. `job=bench bench=deceptive` draws it. All episodes last equally long, so a
constant bonus speaks for neither reward: a small one leads nowhere, a large one adds noise, by which a seed may get out.
"""

import pytest
import torch

from agents.actor_critic import ActorCritic
from agents.bonus import Bonus, CountBonus, density_shape
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
SCALES = {"cts": 0.2, "hash_counts": 0.2, "pixelcnn": 10.0, "nade": 6.0, "rnd": 0.2}
TRAPPED = {"none": 0.0, "constant": 0.005, "constant, large": 0.2}
ESCAPES = {"none": 0, "constant": 0, "constant, large": 2}  # at most, of ten
FOUND = (SMALL + LARGE) / 2  # most episodes end at the large reward


class Constant:
    """The same for every frame."""

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(frames))

    def metrics(self) -> dict[str, float]:
        return {}


def make_bonus(name: str, obs_shape: tuple[int, int, int]) -> Bonus | Constant | None:
    if name in TRAPPED:
        return None if name == "none" else Constant()
    if name == "rnd":
        return RandomNetworkDistillation(obs_shape, CPU)
    return CountBonus(obs_shape, CPU, DENSITIES[name](density_shape(obs_shape)))


def score(name: str, seed: int, frames: int = 20_000) -> float:
    """The mean return of 32 episodes after training."""
    torch.manual_seed(seed)
    env = Deceptive(8, CPU, HEIGHT, SMALL, LARGE, equal_length=True)
    agent = ActorCritic(env.spec, CPU, make_bonus(name, env.spec.obs_shape), stack_frames=1, bonus_scale=(SCALES | TRAPPED)[name])
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
@pytest.mark.parametrize("name", TRAPPED)
def test_without_novelty_the_trap_holds(name):
    scores = [score(name, seed) for seed in range(10)]
    assert sum(found > SMALL + 0.01 for found in scores) <= ESCAPES[name], scores


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SCALES)
def test_with_a_bonus_the_large_reward_is_found(name):
    scores = [score(name, seed) for seed in range(10)]
    assert sum(found > FOUND for found in scores) >= 9, scores


@pytest.mark.usefixtures("one_thread")
def test_one_seed_with_and_without():
    assert score("none", 0, 6_000) == pytest.approx(SMALL, abs=0.01)
    assert score("cts", 0, 8_000) > 0.9
