import copy

import pytest
import torch
from whole import CPU, SPEC, assert_equal, catch_score, stopped_and_resumed

from agents.loop import play
from agents.neural_episodic_control import NeuralEpisodicControl
from envs.api import Spec, Step, UserError, first_step
from envs.toy import Catch, Ring

TINY = {"capacity": 100, "k": 3, "key_size": 4, "stack_frames": 2, "replay_capacity": 200, "precision": "float32"}
QUICK = {
    "capacity": 5000,
    "k": 11,
    "key_size": 16,
    "stack_frames": 1,
    "epsilon_frames": 2000,
    "replay_capacity": 4000,
    "learning_starts_frames": 500,
    "update_frames": 8,
    "learning_rate": 1e-4,  # a toy has time for few updates
    "optimiser_epsilon": 1e-5,
    "precision": "float32",
}


def agent(spec=SPEC, **knobs) -> NeuralEpisodicControl:
    return NeuralEpisodicControl(spec, CPU, **TINY | knobs)


def quick(spec: Spec, **knobs) -> NeuralEpisodicControl:
    return NeuralEpisodicControl(spec, CPU, **QUICK | knobs)


class Recorder(NeuralEpisodicControl):
    """Notes at which frame it updates."""

    updated: tuple[int, ...] = ()

    def _update(self, batch):
        self.updated = (*self.updated, self._due)
        return {}


@pytest.mark.parametrize("lanes", [1, 3, 8, 40])
def test_updates_fall_due_in_frames_whatever_the_lanes(lanes):
    env = Catch(lanes, CPU)
    learner = Recorder(env.spec, CPU, **QUICK | {"learning_starts_frames": 90, "update_frames": 16, "n_steps": 2})
    for _ in play(env, learner, frames=240, seed=1):
        assert all(due <= learner.frames for due in learner.updated)
    assert [due for due in learner.updated if due > 120] == [122, 138, 154, 170, 186, 202, 218, 234]


def test_the_network_sees_the_same_stacks_at_acting_and_at_learning(monkeypatch):
    torch.manual_seed(5)
    env = Catch(3, CPU, size=4)
    learner = quick(env.spec, stack_frames=3, learning_starts_frames=10_000)
    acted, look = [], learner._look
    monkeypatch.setattr(learner, "_look", lambda frames: acted.append(frames.clone()) or look(frames))
    for _ in play(env, learner, frames=60, seed=2):
        pass
    sampled = learner.replay.sample(4000).frames.flatten(1).unique(dim=0)
    cut = acted.pop()  # of the iteration's end, whose successors are bootstrapped from and never sampled
    assert cut.shape[1:] == acted[0].shape[1:]
    assert torch.equal(sampled, torch.cat(acted).flatten(1).unique(dim=0))
    assert len(sampled) > 10


def live(learner: NeuralEpisodicControl, steps: list[Step], carry: torch.Tensor, seeds: range) -> torch.Tensor:
    """Lives through `steps` in the loop's order: act, learn, observe. Returns the carry."""
    for seed, step, after in zip(seeds, steps, steps[1:]):
        torch.manual_seed(seed)
        decision = learner.act(step, carry, explore=True)
        learner.learn()
        learner.observe(step, decision, after)
        carry = decision.carry
    return carry


def random_steps(count: int, lanes: int) -> list[Step]:
    """A reset and `count` steps between seven pictures, with ends of every kind and one moment at which all lanes end."""
    pictures = torch.randint(0, 256, (7, *SPEC.obs_shape), dtype=torch.uint8)
    steps = [first_step(pictures[torch.randint(7, (lanes,))])]
    for number in range(count):
        last, obs = torch.rand(lanes) < 0.1, pictures[torch.randint(7, (lanes,))]
        if number == count // 2:
            last[:] = True
        next_obs = torch.where(last.view(-1, 1, 1, 1), pictures[torch.randint(7, (lanes,))], obs) if last.any() else obs
        steps.append(Step(obs, torch.randn(lanes), (torch.rand(lanes) < 0.8).float(), last, next_obs))
    return steps


@pytest.mark.parametrize("search", ["torch", "scan"])
def test_a_copy_saved_at_any_moment_goes_on_alike(search):
    torch.manual_seed(7)
    steps, knobs = random_steps(60, 3), {"n_steps": 5, "learning_starts_frames": 30, "update_frames": 8, "capacity": 30, "search": search}
    torch.manual_seed(8)
    whole, saved = agent(**knobs), {}
    carry = whole.initial(3)
    for now in range(60):
        if now in (0, 17, 31, 59):
            saved[now] = copy.deepcopy(whole.state_dict()), carry
        carry = live(whole, steps[now : now + 2], carry, range(now, now + 1))
    whole.learn()
    for stop, (state, carry) in saved.items():
        second = agent(**knobs)
        second.load_state_dict(copy.deepcopy(state))
        assert_equal(second.state_dict(), state)
        live(second, steps[stop:], carry, range(stop, 60))
        second.learn()
        assert_equal(second.state_dict(), whole.state_dict())
    assert whole.optimiser.updates == (60 * 3 * 2 - 30) // 8


def test_stopped_and_resumed_iterations_equal_never_stopped():
    knobs = {"learning_starts_frames": 80, "stack_frames": 2, "n_steps": 4}
    whole, states = stopped_and_resumed(lambda spec: quick(spec, **knobs), 3)
    assert all(state["waiting"] == {} for state in states)  # the cut settles all
    assert whole.optimiser.updates == (3 * 240 - 80) // 8


def test_capacity_holds_and_bytes_are_announced():
    torch.manual_seed(9)
    env = Catch(8, CPU, size=6)
    learner = quick(env.spec, capacity=60, replay_capacity=400)
    for tick in play(env, learner, frames=1200, seed=0):
        assert max(learner.memory.sizes) <= 60
        taken = learner.memory.nbytes + learner.replay.nbytes
        assert taken <= learner.required_bytes(tick.played)
    assert max(learner.memory.sizes) == 60
    assert learner.required_bytes(0) < learner.required_bytes(10) < learner.required_bytes(1000)


@pytest.mark.parametrize(
    ("knob", "bad"),
    [
        ("capacity", 2),
        ("k", 0),
        ("key_size", 0),
        ("delta", 0.0),
        ("delta", float("inf")),
        ("alpha", 0.0),
        ("alpha", 1.1),
        ("gamma", 1.5),
        ("n_steps", 0),
        ("stack_frames", 0),
        ("epsilon_start", 2.0),
        ("epsilon_end", -1.0),
        ("epsilon_frames", -1),
        ("replay_capacity", 3),
        ("replay_capacity", -1),
        ("batch_size", 0),
        ("learning_starts_frames", -1),
        ("update_frames", 0),
        ("learning_rate", 0.0),
        ("decay", 1.0),
        ("optimiser_epsilon", 0.0),
        ("max_gradient_norm", float("inf")),
        ("precision", "float8"),
        ("search", "annoy"),
    ],
)
def test_bad_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=knob.removeprefix("optimiser_")) as mistake:
        agent(**{knob: bad})
    assert "\n" not in str(mistake.value)


def test_a_replay_too_small_for_so_many_lanes_says_how_much_it_needs():
    env = Catch(50, CPU)
    with pytest.raises(UserError, match=r"agent\.replay_capacity must be at least 1000 for 50 environments"):
        list(play(env, agent(env.spec), frames=1000, seed=0))


def test_learns_to_catch():
    assert catch_score(quick, 3200) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("knobs", [{}, {"k": 50, "stack_frames": 4}, {"n_steps": 3}, {"precision": "bfloat16"}], ids=str)
def test_every_kind_learns_to_catch(knobs, seed):
    assert catch_score(lambda spec: quick(spec, **knobs), 8000, seed) > 0.9


def test_a_ring_without_end_is_worth_what_it_is_through_time_limits_and_cuts():
    """Every step gives 1: 1 / (1 - gamma) = 5. Who takes the limit of 4 steps for an end learns at most 1 + 0.8 + 0.64 + 0.512."""
    torch.manual_seed(0)
    env = Ring(4, CPU, length=4, max_steps=4)
    learner = quick(env.spec, gamma=0.8, n_steps=3, alpha=0.5, learning_starts_frames=50)
    for iteration in range(2):
        for _ in play(env, learner, frames=1200, seed=iteration):
            pass
    decision = learner.act(env.reset(5), learner.initial(4), explore=False)
    torch.testing.assert_close(decision.notes["value"], torch.full((4,), env.optimal_value(0.8)), rtol=0, atol=0.6)
