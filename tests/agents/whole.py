"""What tests of whole agents share: states compared, runs that are stopped and resumed, a score at Catch."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from agents.api import Agent
from agents.loop import evaluate, play
from envs.api import Spec
from envs.toy import Catch

CPU = torch.device("cpu")
SPEC = Spec("line", 3, ("left", "stay", "right"), (1, 4, 4), 2)


def frame(number: int, lanes: int = 1) -> torch.Tensor:
    """uint8 (lanes, 1, 4, 4), each pixel `number`."""
    return torch.full((lanes, *SPEC.obs_shape), number, dtype=torch.uint8)


def assert_equal(left, right, path="") -> None:
    """That two states are the same to the last bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def stopped_and_resumed(build: Callable[[Spec], Agent], iterations: int, pixels_per_cell: int = 1) -> tuple[Any, list[dict]]:
    """Asserts that iterations of Catch (4 lanes, 240 frames each) give the same states whether or not another agent takes over after each.

    Returns:
        The agent that never stopped, and copies of the state after each iteration.
    """

    def iterate(learner: Agent, iteration: int) -> None:
        torch.manual_seed(100 + iteration)
        for _ in play(Catch(4, CPU, pixels_per_cell=pixels_per_cell), learner, frames=240, seed=iteration):
            pass

    spec = Catch(1, CPU, pixels_per_cell=pixels_per_cell).spec
    whole, first, second = (build(spec) for _ in range(3))
    for other in (first, second):
        other.load_state_dict(copy.deepcopy(whole.state_dict()))
    states = []
    for iteration in range(iterations):
        iterate(whole, iteration)
        iterate(first, iteration)
        states.append(copy.deepcopy(first.state_dict()))
        assert_equal(states[-1], whole.state_dict())
        first, second = second, first
        first.load_state_dict(copy.deepcopy(states[-1]))
    return whole, states


def catch_score(build: Callable[[Spec], Agent], frames: int, seed: int = 0) -> float:
    """What is caught of 48 balls, less what is missed, by an agent that has played `frames` frames of Catch in 8 lanes, a ball."""
    torch.manual_seed(seed)
    env = Catch(8, CPU)
    learner = build(env.spec)
    for _ in play(env, learner, frames=frames, seed=seed):
        pass
    ticks = list(evaluate(env, learner, episodes_per_lane=6, seed=99))
    ended = torch.stack([tick.after.last for tick in ticks])
    return float(torch.stack([tick.after.reward for tick in ticks])[ended].mean())
