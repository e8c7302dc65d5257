"""Captured updates. A recording on the processor stands in for a CUDA graph: torch's tracer keeps every operation of one call, with the
host's numbers as they were then, and replays these alone. What would be wrong in a graph is wrong there too."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from agents.actor_critic import ActorCritic
from agents.bonus import CountBonus, density_shape
from agents.capture import LARGEST, WARM_UPS, Captured
from agents.dqn import DQN
from agents.loop import play
from envs.api import UserError
from envs.toy import Catch, Deceptive
from generative.hash_counts import HashCounts
from generative.straw import Straw

CPU = torch.device("cpu")
UPDATES = 50


def tape(function, tree):
    """Records as `cuda_graph` does: the function is not seen to run, and later runs follow the operations of this one."""
    leaves, shape = pytree.tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    names = []

    def flat(*tensors):
        given = list(leaves)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        found = function(pytree.tree_unflatten(given, shape))
        names[:] = found
        return tuple(found.values())

    inputs = [leaves[place] for place in places]
    traced = make_fx(flat)(*inputs)

    @torch.no_grad()
    def replay():
        return dict(zip(names, traced(*inputs)))

    return replay


class Unseen:
    """A tape whose recording leaves the agent as it was."""

    def __init__(self, agent):
        self.agent, self.recorded = agent, 0

    def __call__(self, function, tree):
        state = copy.deepcopy(self.agent.optimiser.state_dict())
        replay = tape(function, tree)
        updates = self.agent.optimiser.updates
        self.agent.optimiser.load_state_dict(state)
        self.agent.optimiser.updates = updates
        self.recorded += 1
        return replay


def dqn(**knobs):
    world = Catch(4, CPU)
    quick = {"capacity": 2000, "learning_starts_frames": 40, "update_frames": 8, "target_frames": 80, "stack_frames": 2}
    return world, DQN(world.spec, CPU, **quick | {"precision": "float32"} | knobs)


def actor_critic(**knobs):
    world = Deceptive(4, CPU, height=4)
    return world, ActorCritic(world.spec, CPU, **{"stack_frames": 2, "precision": "float32"} | knobs)


def planned(**knobs):
    world = Deceptive(4, CPU, height=4)
    planner = Straw(world.spec.obs_shape, world.spec.num_actions, CPU, plan_steps=12, filters=4, hidden=16)
    return world, ActorCritic(world.spec, CPU, planner=planner, **{"stack_frames": 2, "precision": "float32"} | knobs)


def on_a_device(agent):
    """The optimiser as it works on a GPU: without a word from the host between updates."""
    agent.optimiser._compiled, agent.optimiser._check_updates = False, 20
    return agent


AGENTS = {
    "dqn": (dqn, {}),
    "dqn, mixed Monte Carlo": (dqn, {"eta": 0.1, "double": False, "dueling": True, "optimiser": "adam", "max_gradient_norm": 1.0}),
    "dqn, bfloat16": (dqn, {"precision": "bfloat16"}),
    "a3c": (actor_critic, {"learning_rate_frames": 4000}),
    "a3c, planner": (planned, {"n_steps": 3, "plan_cost_frames": 2000}),
    "a3c, lstm": (actor_critic, {"recurrent": "lstm", "gae_lambda": 0.9, "optimiser": "adam"}),
}


def trained(make, knobs, record):
    """Fifty updates; the agent, how many shapes were recorded, and the metrics of every update."""
    torch.manual_seed(0)
    world, agent = make(**knobs)
    on_a_device(agent)
    if record:
        agent._descend = Captured(agent._take_step, Unseen(agent))
    metrics, seen = [], 0
    for tick in play(world, agent, 10**6, seed=0):
        if agent.optimiser.updates > seen:
            seen = agent.optimiser.updates
            metrics.append({name: float(value) for name, value in tick.metrics.items()})
        if seen >= UPDATES:
            break
    return agent, len(agent._descend) if record else 0, metrics


@pytest.mark.parametrize("name", AGENTS)
def test_updates_replayed_from_a_recording_equal_those_called(name):
    make, knobs = AGENTS[name]
    called, _, expected = trained(make, knobs, record=False)
    replayed, shapes, found = trained(make, knobs, record=True)
    assert 0 < shapes <= LARGEST
    torch.testing.assert_close(replayed.optimiser.state_dict(), called.optimiser.state_dict(), rtol=0, atol=0)
    assert found == expected


def test_numbers_of_the_host_that_change_would_show():
    """The tape keeps them as they were, as a graph does: the test above can fail."""
    torch.manual_seed(0)
    total, rate = torch.zeros(()), [1.0]

    def add(tree):
        total.add_(rate[0] * tree["x"])
        return {"total": total}

    function = Captured(add, lambda function, tree: tape(function, tree))
    for _ in range(WARM_UPS + 1):
        function({"x": torch.ones(())})
    rate[0] = 100.0
    before = float(total)
    function({"x": torch.tensor(2.0)})
    assert float(total) == before + 2


def test_first_calls_are_for_real_and_each_shape_is_recorded_once():
    called, recorded = [], []

    def function(tree):
        called.append(tree["x"].shape)
        return {"sum": tree["x"].sum()}

    def record(function, tree):
        recorded.append(tree["x"].shape)
        return lambda: function(tree)

    captured_function = Captured(function, record)
    for size in (2, 3, 2):
        for number in range(WARM_UPS + 2):
            found = captured_function({"x": torch.full((size,), float(number)), "flag": True, "none": None})
            assert float(found["sum"]) == size * number
    assert recorded == [(2,), (3,)]
    assert len(captured_function) == 2
    captured_function({"x": torch.zeros(2), "flag": False, "none": None})  # another value of the host: another shape
    assert len(called) == 3 * (WARM_UPS + 2) + 1
    assert len(captured_function) == 2


def test_beyond_the_largest_number_of_shapes_calls_are_for_real():
    function = Captured(lambda tree: {"sum": tree["x"].sum()}, lambda function, tree: lambda: function(tree))
    for size in range(1, LARGEST + 3):
        for _ in range(WARM_UPS + 2):
            assert float(function({"x": torch.ones(size)})["sum"]) == size
    assert len(function) == LARGEST


@pytest.mark.parametrize("make", [dqn, actor_critic])
def test_a_device_without_graphs_is_refused(make):
    with pytest.raises(UserError, match=r"agent\.capture=true records CUDA graphs and needs device=cuda, got cpu"):
        make(capture=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["dqn", "a3c", "a3c_plus"])
def test_captured_updates_on_a_gpu_agree_with_eager_ones(kind):
    device, found = torch.device("cuda"), []
    for capture_it in (False, True):
        torch.manual_seed(0)
        world = Deceptive(16, device, height=10, pixels_per_cell=4)
        if kind == "dqn":
            agent = DQN(world.spec, device, capacity=4000, learning_starts_frames=400, precision="float32", capture=capture_it)
        else:
            shape = world.spec.obs_shape
            density = HashCounts(density_shape(shape), world.spec.num_actions, device)
            bonus = CountBonus(shape, device, density) if kind == "a3c_plus" else None
            agent = ActorCritic(world.spec, device, bonus, precision="float32", capture=capture_it)
        for _ in play(world, agent, 10**6, seed=0):
            if agent.optimiser.updates >= 100:
                break
        assert not capture_it or len(agent._descend) > 0
        found.append({name: value for name, value in agent.optimiser.state_dict().items() if name != "updates"})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
