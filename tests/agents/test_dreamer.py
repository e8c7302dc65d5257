"""The dreamer: it remembers what it plays, fits its simulator, and its inner agent learns in dreams alone."""

import pytest
import torch
from perfect import PerfectCatch

from agents.actor_critic import ActorCritic
from agents.dreamer import Dreamer, wake
from agents.loop import evaluate, play
from agents.stack import push_frame
from envs.api import UserError
from envs.toy import Catch
from generative.simulator import FrameSimulator

SIZE, CPU = 7, torch.device("cpu")
SPEC = Catch(1, CPU, size=SIZE).spec


def dreamer(simulator=None, inner=None, **knobs):
    inner = inner or ActorCritic(SPEC, CPU, n_steps=5, learning_rate=2e-3)
    quick = {"learning_starts_frames": 60, "train_frames": 40, "dreams": 2, "dream_envs": 8, "dream_steps": 10, "capacity": 2_000}
    return Dreamer(SPEC, CPU, simulator or PerfectCatch(SIZE), inner, **{**quick, **knobs})


def learned():
    return dreamer(small(), first_updates=3, updates=2, batch_size=4, warmup_updates=0)


def small():
    return FrameSimulator(SPEC.obs_shape, 3, CPU, architecture="small", hidden=16, factors=16, context_frames=2)


def live(agent, frames, seed=0, lanes=4):
    return list(play(Catch(lanes, CPU, size=SIZE), agent, frames, seed))


def score(agent, episodes=50):
    ends, total = torch.zeros(episodes, dtype=torch.bool), torch.zeros(episodes)
    for tick in evaluate(Catch(episodes, CPU, size=SIZE), agent, 1, seed=1):
        total += torch.where(ends, 0.0, tick.after.reward)
        ends |= tick.after.last
    return float(total.mean())


def test_the_first_round_has_updates_of_its_own():
    agent = learned()
    live(agent, 160)
    assert agent.rounds == 3
    assert agent.fitter.update == 3 + 2 * 2


def test_the_simulators_mean_image_is_that_of_what_was_played():
    agent = learned()
    live(agent, 60)
    frames = agent.trajectories.spread(60)
    assert len(frames) == 60
    torch.testing.assert_close(agent.simulator.mean_image, frames.float().mean(0) / 255)


def test_everything_played_is_remembered():
    agent = dreamer(learning_starts_frames=10_000)
    ticks = live(agent, 200)
    assert len(agent.trajectories) == 200 == agent.frames
    clip = agent.trajectories.clips(torch.arange(50), 1)
    mine = [(tick.step.obs[0], int(tick.decision.action[0]), float(tick.after.reward[0])) for tick in ticks]
    for row, (obs, action, reward) in enumerate(mine[:49]):
        assert torch.equal(clip.frames[row, 0], obs)
        assert (int(clip.actions[row, 0]), float(clip.rewards[row, 0])) == (action, reward)


def test_rounds_fall_due_in_frames_of_true_play():
    agent = dreamer()
    rounds = [agent.rounds for _ in play(Catch(4, CPU, size=SIZE), agent, 200, 0)]
    due = [1 + max(-1, (4 * t - 60) // 40) for t in range(50)]  # of what had been observed before the step
    assert rounds == due
    assert agent.rounds == 1 + (200 - 60) // 40


def test_a_long_tick_makes_up_for_all_rounds_it_owes():
    agent = dreamer(learning_starts_frames=0, train_frames=1)
    live(agent, 8)
    assert agent.rounds == 9


def test_dreams_are_what_the_inner_agent_learns_from():
    agent = dreamer()
    live(agent, 60)
    assert agent.inner.frames == 2 * 8 * 10 * agent.rounds
    assert agent.inner.optimiser.updates == 2 * 2 * agent.rounds
    assert agent.fitter is None, "a perfect simulator is dreamt in as it is"


def test_play_is_random_before_the_first_round_and_then_the_inner_agents():
    class Stays(ActorCritic):
        def act(self, step, carry, explore):
            decision = super().act(step, carry, explore)
            return decision._replace(action=torch.ones_like(decision.action))

    inner = Stays(SPEC, CPU)
    agent = dreamer(inner=inner, learning_starts_frames=400, train_frames=10_000)
    actions = torch.stack([tick.decision.action for tick in live(agent, 800)])
    counts = torch.bincount(actions[:100].flatten(), minlength=3)
    assert counts.min() > 90
    assert (actions[100:] == 1).all()
    step = Catch(4, CPU, size=SIZE).reset(0)
    restless = dreamer(inner=inner, epsilon=1.0, learning_starts_frames=0)
    assert (restless.act(step, restless.initial(4), explore=False).action == 1).all()
    explored = torch.stack([restless.act(step, restless.initial(4), explore=True).action for _ in range(100)])
    assert torch.bincount(explored.flatten(), minlength=3).min() > 90


def test_an_agent_wakes_with_the_memory_of_the_context():
    """Where K pictures are known, the stack is that of true play; where an episode opened, what came before is blank."""
    agent = dreamer(learning_starts_frames=10_000, context_frames=6)
    live(agent, 300)
    agent.learn()
    step, carry = wake(agent.dream, agent.inner, seed=3)
    clip, known = agent.dream.context, agent.dream.known
    assert torch.equal(step.obs, clip.frames[:, -1])
    assert torch.equal(step.last, known == 1)
    assert len(set(known.tolist())) > 2
    frames, _ = push_frame(carry.stack, step.obs, step.last)
    for row, count in enumerate(known.tolist()):
        seen = min(count, 4)
        assert torch.equal(frames[row, -seen:], clip.frames[row, -seen:])
        assert not frames[row, :-seen].any()


def test_the_first_stack_of_a_dream_is_what_the_inner_agent_learns_with():
    agent = dreamer(learning_starts_frames=10_000)
    live(agent, 300)
    agent.learn()
    batches = []
    take = agent.inner._rollout.take
    agent.inner._rollout.take = lambda: batches.append(take()) or batches[-1]
    torch.manual_seed(5)
    agent._learn_in_a_dream()
    torch.manual_seed(5)
    step, carry = wake(agent.dream, agent.inner, seed=int(torch.randint(2**31, ())))
    expected, _ = push_frame(carry.stack, step.obs, step.last)
    assert torch.equal(batches[0].frames, expected)
    assert expected[:, 0].any()


def test_no_dream_outlives_its_end():
    agent = dreamer(dream_steps=7)
    live(agent, 120)
    assert len(agent.inner._rollout) == 0


def test_metrics_tell_of_simulator_inner_agent_and_dreams():
    agent = learned()
    metrics = next(tick.metrics for tick in live(agent, 120) if tick.metrics)
    assert {"simulator/simulator_loss", "simulator/squared_error", "train/entropy", "dream/reward", "dream/end_share"} <= set(metrics)
    assert metrics["simulator/updates"] == 3
    assert metrics["memory/entries"] == 60


def test_a_perfect_dream_is_enough_to_learn_catch():
    agent = dreamer(learning_starts_frames=200, train_frames=10_000, dreams=120, dream_envs=32, dream_steps=10)
    live(agent, 200)
    assert agent.rounds == 1
    assert agent.frames == 200
    assert score(agent) > 0.9


def test_evaluating_changes_nothing():
    agent = learned()
    live(agent, 120)
    before = agent.state_dict()
    kept = {name: value.clone() for name, value in before["simulator"].items()}
    score(agent, episodes=3)
    assert agent.frames == 120
    assert len(agent.trajectories) == 120
    assert all(torch.equal(kept[name], value) for name, value in agent.state_dict()["simulator"].items())


def test_goes_on_from_its_state_as_it_would_have():
    def on(agent):
        torch.manual_seed(9)
        live(agent, 200, seed=7)
        return agent.state_dict()

    torch.manual_seed(1)
    whole = learned()
    live(whole, 160)
    state = copy_of(whole.state_dict())
    torch.manual_seed(2)
    other = learned()
    other.load_state_dict(copy_of(state))
    assert_same(on(whole), on(other))


def copy_of(state):
    if isinstance(state, dict):
        return {name: copy_of(value) for name, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def assert_same(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_required_bytes_bound_what_is_held():
    agent = learned()
    live(agent, 240)
    assert agent.required_bytes(240) >= agent.trajectories.nbytes + 16 * sum(part.numel() for part in agent.simulator.parameters())
    assert agent.rollout_bytes(4) == 0


@pytest.mark.parametrize(
    ("knob", "value"),
    [("dreams", 0), ("dream_envs", 0), ("dream_steps", 0), ("train_frames", 0), ("updates", 0), ("first_updates", 0), ("batch_size", 0),
     ("horizon", 0), ("window_steps", 0), ("context_frames", 0), ("learning_starts_frames", -1), ("warmup_updates", -1),
     ("learning_rate", 0.0), ("epsilon", 1.5), ("capacity", 0)],
)  # fmt: skip
def test_wrong_numbers_are_refused_by_name(knob, value):
    with pytest.raises(UserError, match=f"agent.{knob}"):
        dreamer(**{knob: value})


def test_windows_too_short_for_the_simulator_are_refused():
    with pytest.raises(UserError, match=r"agent.window_steps=3 is too short: 2 known frames and a horizon of 3 need 4"):
        dreamer(small(), window_steps=3, horizon=3)
