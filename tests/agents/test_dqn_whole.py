import pytest
import torch
from whole import CPU, SPEC, catch_score, stopped_and_resumed

from agents.dqn import DQN
from agents.loop import play
from envs.api import Spec, UserError
from envs.toy import Catch, Ring

QUICK = {
    "capacity": 4000,
    "stack_frames": 1,
    "learning_starts_frames": 200,
    "update_frames": 8,
    "target_frames": 400,
    "precision": "float32",
}
HALF = {"precision": "float16", "stack_frames": 2}  # of large frames
ADAM = {"optimiser": "adam", "learning_rate": 1e-3, "optimiser_epsilon": 1e-5, "epsilon_end": 0.05, "epsilon_frames": 2000}


def quick(spec: Spec, **knobs) -> DQN:
    return DQN(spec, CPU, **QUICK | knobs)


@pytest.mark.parametrize("half", [{}, HALF])
def test_target_network_stays_until_it_is_copied(half):
    torch.manual_seed(3)
    env = Catch(4, CPU, pixels_per_cell=12 if half else 1)
    learner = quick(env.spec, **{"target_frames": 10_000, "learning_starts_frames": 40} | half)
    frames = torch.randint(0, 256, (3, learner.replay.stack_frames, *env.spec.obs_shape), dtype=torch.uint8)
    before = learner.target(frames)
    for _ in play(env, learner, frames=200, seed=1):
        pass
    assert torch.equal(learner.target(frames), before)
    assert not torch.equal(learner.online(frames), before)
    learner.sync()
    assert torch.equal(learner.target(frames), learner.online(frames))


def test_the_network_sees_the_same_stacks_at_acting_and_at_learning(monkeypatch):
    torch.manual_seed(5)
    env = Catch(3, CPU, size=4)
    learner = quick(env.spec, stack_frames=3, learning_starts_frames=10_000, epsilon_start=0.5)
    acted, forward = [], learner.online.forward
    monkeypatch.setattr(learner.online, "forward", lambda frames: acted.append(frames.clone()) or forward(frames))
    for _ in play(env, learner, frames=60, seed=2):
        pass
    sampled = learner.replay.sample(4000).frames.flatten(1).unique(dim=0)
    assert torch.equal(sampled, torch.cat(acted).flatten(1).unique(dim=0))
    assert len(sampled) > 10


@pytest.mark.parametrize("knobs", [{}, {"eta": 0.2, "n_steps": 3, "dueling": True, "capacity": 400}, HALF])
def test_stopped_and_resumed_equals_never_stopped(knobs):
    knobs = {"learning_starts_frames": 80, "target_frames": 100, "stack_frames": 3} | knobs
    iterations, pixels_per_cell = (2, 12) if "precision" in knobs else (3, 1)
    whole, _ = stopped_and_resumed(lambda spec: quick(spec, **knobs), iterations, pixels_per_cell)
    assert whole.optimiser.updates == (iterations * 240 - 80) // 8


@pytest.mark.parametrize(
    ("knob", "bad"),
    [
        ("gamma", 1.5),
        ("gamma", -0.1),
        ("eta", 1.1),
        ("epsilon_start", 2.0),
        ("epsilon_end", -1.0),
        ("bonus_scale", -0.1),
        ("bonus_scale", float("nan")),
        ("batch_size", 0),
        ("update_frames", 0),
        ("target_frames", 0),
        ("learning_starts_frames", -1),
        ("epsilon_frames", -1),
        ("reward_clip", 0.0),
        ("error_clip", -1.0),
        ("max_gradient_norm", float("inf")),
        ("n_steps", 0),
        ("n_steps", 256),
        ("stack_frames", 0),
        ("capacity", 3),
        ("capacity", -1),
        ("optimiser", "sgd"),
        ("learning_rate", 0.0),
        ("precision", "float8"),
    ],
)
def test_bad_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=knob) as mistake:
        quick(SPEC, **{knob: bad})
    assert "\n" not in str(mistake.value)


def test_a_replay_too_small_for_so_many_lanes_says_how_much_it_needs():
    env = Catch(50, CPU)
    learner = quick(env.spec, capacity=200, stack_frames=2)
    with pytest.raises(UserError, match=r"agent\.capacity must be at least 1000 for 50 environments"):
        list(play(env, learner, frames=100, seed=0))


def test_learns_to_catch():
    assert catch_score(lambda spec: quick(spec, **ADAM), 3600) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "knobs",
    [
        {"double": False},
        {"n_steps": 3},
        {"eta": 0.1},
        {"dueling": True},
        {"stack_frames": 4},
        {"optimiser": "rmsprop_centred", "learning_rate": 5e-4},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_every_kind_learns_to_catch(knobs, seed):
    assert catch_score(lambda spec: quick(spec, **ADAM | knobs), 16_000, seed) > 0.9


@pytest.mark.parametrize("knobs", [{}, {"n_steps": 3}, {"eta": 0.5, "capacity": 400}], ids=str)
def test_a_ring_without_end_is_worth_what_it_is_through_time_limits_and_cuts(knobs):
    """Every step gives 1: 1 / (1 - gamma) = 5. Who takes the limit of 4 steps for an end learns at most 1 + 0.8 + 0.64 + 0.512."""
    torch.manual_seed(0)
    env = Ring(4, CPU, length=4, max_steps=4)
    learner = quick(env.spec, gamma=0.8, **ADAM | {"update_frames": 4, "target_frames": 60, "batch_size": 16} | knobs)
    for iteration in range(2):
        for _ in play(env, learner, frames=1200, seed=iteration):
            pass
    step = env.reset(5)
    with torch.no_grad():
        q = learner.online(step.obs.unsqueeze(1))
    assert float(q.mean()) == pytest.approx(env.optimal_value(0.8), abs=0.6)
    assert float((q - env.optimal_value(0.8)).abs().max()) < 1
