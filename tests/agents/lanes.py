"""Made-up lanes for tests of the actor-critic: random frames, rewards and ends that keep the contract of a Step."""

import itertools

import torch

from agents.actor_critic import ActorCritic
from envs.api import Spec, Step, first_step

CPU = torch.device("cpu")
SPEC = Spec("made up", 3, ("left", "stay", "right"), (1, 6, 5), 2)
ENDS = [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
DISCOUNTS = [[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1]]  # time limits, terminations, a lost life, one on the last row


def steps_of(lanes: int, last: list[list[int]], discount: list[list[int]], spec: Spec = SPEC) -> list[Step]:
    """A reset and one Step for each row of `last` and `discount` (T, N); frames and rewards are random."""
    steps = [first_step(_frames(lanes, spec))]
    for ends, goes_on in zip(last, discount):
        obs, ended = _frames(lanes, spec), torch.tensor(ends, dtype=torch.bool)
        next_obs = torch.where(ended.view(-1, 1, 1, 1), _frames(lanes, spec), obs) if any(ends) else obs
        steps.append(Step(obs, 3 * torch.randn(lanes), torch.tensor(goes_on, dtype=torch.float32), ended, next_obs))
    return steps


def live(agent, steps, carry=None) -> list:
    """Lets the agent live through `steps` as the one loop does, but for learning. Returns the decisions."""
    carry, decisions = agent.initial(steps[0].last.shape[0]) if carry is None else carry, []
    for step, after in itertools.pairwise(steps):
        decision = agent.act(step, carry, explore=True)
        agent.observe(step, decision, after)
        decisions.append(decision)
        carry = decision.carry
    return decisions


def agent(spec: Spec = SPEC, **knobs) -> ActorCritic:
    return ActorCritic(spec, CPU, **{"stack_frames": 2, "precision": "float32"} | knobs)


def warm(learner: ActorCritic) -> None:
    """Larger heads than at the start, so that every term of the loss counts."""
    for layer in (learner.network.policy, learner.network.value):
        layer.weight.data.normal_(0, 0.3)
        layer.bias.data.normal_(0, 0.3)


class Count:
    """A bonus that pays the mean level of a frame and remembers the order in which it was asked."""

    def __init__(self):
        self.asked, self.told = [], 0

    def __call__(self, frames):
        self.asked.append(frames)
        return frames.float().mean((1, 2, 3)) / 255

    def metrics(self):
        self.told += 1
        return {"bonus/mean": 0.5}

    def required_bytes(self, frames):
        return 1000

    def state_dict(self):
        return {"asked": len(self.asked)}

    def load_state_dict(self, state):
        self.asked = [None] * state["asked"]


def _frames(lanes: int, spec: Spec) -> torch.Tensor:
    return torch.randint(0, 256, (lanes, *spec.obs_shape), dtype=torch.uint8)
