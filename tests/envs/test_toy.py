"""Every toy: the contract over hundreds of steps, closed-form values, and pictures that are what they say."""

import pytest
import torch
from torch import Tensor

from envs.api import Step, UserError, VectorEnv, check_step
from envs.toy import Catch, Chain, Cue, Deceptive, Ring, Toy

TOYS = [Chain, Ring, Catch, Cue, Deceptive]
GAMMA = 0.9


def play(env: Toy, steps: int, seed: int = 0) -> list[Step]:
    generator = torch.Generator().manual_seed(seed)
    shown = [env.reset(seed)]
    shown += [env.step(torch.randint(env.spec.num_actions, (env.num_envs,), generator=generator)) for _ in range(steps)]
    return shown


def lit(picture: Tensor) -> list[int]:
    """The cells, row by row, that are lit in one picture (1, H, W)."""
    assert set(picture.unique().tolist()) <= {0, 255}
    return picture.flatten().nonzero().flatten().tolist()


def act(env: Toy, *actions: int) -> Step:
    return env.step(torch.tensor(actions))


def discounted_return(env: Toy, policy, seed: int = 0) -> Tensor:
    """float64 (N): sum of gamma^t r of each lane's first episode under `policy(step, t)`."""
    step, total, weight, going = env.reset(seed), torch.zeros(env.num_envs).double(), 1.0, torch.ones(env.num_envs, dtype=torch.bool)
    for t in range(1000):
        step = env.step(policy(step, t))
        total += weight * torch.where(going, step.reward, 0.0)
        weight *= GAMMA
        going &= ~step.last
        if not going.any():
            return total
    raise AssertionError("an episode did not end")


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("pixels_per_cell", [1, 3])
def test_contract(toy, pixels_per_cell):
    env = toy(5, "cpu", pixels_per_cell=pixels_per_cell)
    assert isinstance(env, VectorEnv)
    assert env.spec.name == toy.__name__
    assert env.spec.frames_per_step == 1
    shown = play(env, 300)
    first, *steps = shown
    check_step(first, env.spec)
    assert first.last.all()
    assert (first.reward == 0).all()
    assert (first.discount == 1).all()
    assert first.next_obs is first.obs
    ended = 0
    for step in steps:
        check_step(step, env.spec)
        assert step.obs.is_contiguous()
        assert (step.next_obs is step.obs) == (not step.last.any())
        ended += int(step.last.sum())
    assert ended >= 5


@pytest.mark.parametrize("toy", TOYS)
def test_all_follows_from_the_seed_and_nothing_is_written_again(toy):
    env = toy(6, "cpu")
    shown = play(env, 60)
    kept = [Step(*(tensor.clone() for tensor in step)) for step in shown]
    torch.rand(3)
    again = play(toy(6, "cpu"), 60)
    env.reset(1)
    env.close()
    for one, copy, two in zip(shown, kept, again):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, copy, two))


@pytest.mark.parametrize("toy", [Ring, Catch, Cue])
def test_seeds_differ(toy):
    assert not torch.equal(toy(32, "cpu").reset(0).obs, toy(32, "cpu").reset(1).obs)


@pytest.mark.parametrize("toy", TOYS)
def test_order_of_calls(toy):
    env = toy(2, "cpu")
    with pytest.raises(RuntimeError, match="send comes after"):
        act(env, 0, 0)
    first = env.reset(0)
    with pytest.raises(RuntimeError, match="recv comes after"):
        env.recv()
    for wrong in ((0, env.spec.num_actions), (-1, 0), (0,)):
        with pytest.raises(ValueError, match="actions must"):
            act(env, *wrong)
    env.send(torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match="send comes after"):
        act(env, 0, 0)
    assert torch.equal(env.reset(0).obs, first.obs)  # drains
    act(env, 0, 0)
    env.close()
    env.close()


@pytest.mark.parametrize(
    ("toy", "knobs"),
    [
        *((toy, {"num_envs": 0}) for toy in TOYS),
        *((toy, {"pixels_per_cell": 0}) for toy in TOYS),
        (Chain, {"length": 1}),
        (Chain, {"max_steps": -1}),
        (Ring, {"length": 1}),
        (Catch, {"size": 2}),
        (Cue, {"delay": -1}),
        (Deceptive, {"height": 0}),
        (Deceptive, {"small": 2.0}),
        (Deceptive, {"large": float("inf")}),
    ],
)
def test_bad_knobs(toy, knobs):
    with pytest.raises(UserError):
        toy(**({"num_envs": 1, "device": "cpu"} | knobs))


def test_actions_may_change_after_send():
    env = Chain(1, "cpu", length=3)
    env.reset(0)
    action = torch.tensor([1])
    env.send(action)
    action.fill_(0)
    assert lit(env.recv().obs[0]) == [1]


def test_pixels_per_cell_enlarges_cells():
    small, large = Catch(4, "cpu", size=5).reset(0).obs, Catch(4, "cpu", size=5, pixels_per_cell=3).reset(0).obs
    assert large.shape == (4, 1, 15, 15)
    assert torch.equal(large, small.repeat_interleave(3, 2).repeat_interleave(3, 3))


def test_chain_by_hand():
    env = Chain(2, "cpu", length=3, max_steps=3)
    first = env.reset(0)
    assert [lit(picture) for picture in first.obs] == [[0], [0]]
    one = act(env, 0, 1)  # the wall holds; a step right
    assert [lit(picture) for picture in one.obs] == [[0], [1]]
    two = act(env, 1, 1)
    assert two.reward.tolist() == [0, 1]
    assert two.last.tolist() == [False, True]
    assert two.discount.tolist() == [1, 0]
    assert [lit(picture) for picture in two.next_obs] == [[1], [2]]
    assert [lit(picture) for picture in two.obs] == [[1], [0]]
    three = act(env, 0, 0)  # lane 0 is at its time limit, lane 1 one step into its second episode
    assert three.last.tolist() == [True, False]
    assert three.discount.tolist() == [1, 1]
    assert three.reward.tolist() == [0, 0]
    assert act(env, 1, 1).last.tolist() == [False, False]
    four = act(env, 1, 0)  # an end at the very time limit is an end
    assert four.last.tolist() == [True, True]
    assert four.discount.tolist() == [0, 1]


def test_chain_values():
    env = Chain(3, "cpu", length=6)
    assert env.optimal_values(GAMMA).tolist() == pytest.approx([GAMMA**4, GAMMA**3, GAMMA**2, GAMMA, 1])
    assert env.optimal_value(GAMMA) == pytest.approx(GAMMA**4)
    assert discounted_return(env, lambda step, t: torch.ones(3, dtype=torch.int64)).tolist() == pytest.approx([GAMMA**4] * 3)


def test_ring_never_terminates_and_is_worth_its_closed_form():
    env = Ring(4, "cpu", length=5, max_steps=7)
    shown = play(env, 70)
    for t, step in enumerate(shown[1:], 1):
        assert (step.reward == 1).all()
        assert (step.discount == 1).all()
        assert (step.last == (t % 7 == 0)).all()
    assert env.optimal_value(GAMMA) == pytest.approx(10)
    values = torch.zeros(5).double()
    for _ in range(400):  # policy evaluation: every successor bootstraps, cut or not
        values = 1 + GAMMA * values.roll(-1)
    assert values.tolist() == pytest.approx([env.optimal_value(GAMMA)] * 5)
    start = lit(env.reset(0).obs[0])[0]
    assert lit(act(env, 1, 1, 0, 0).obs[0]) == [(start + 1) % 5]
    endless = Ring(2, "cpu", max_steps=0)
    assert not any(step.last.any() for step in play(endless, 50)[1:])


def test_ring_starts_everywhere():
    assert {lit(picture)[0] for picture in Ring(200, "cpu", length=5).reset(0).obs} == {0, 1, 2, 3, 4}


def test_catch_by_hand():
    env = Catch(60, "cpu", size=4)
    first = env.reset(0)
    balls = [lit(picture)[0] for picture in first.obs]
    assert set(balls) == {0, 1, 2, 3}
    assert all(lit(picture)[1] == 14 for picture in first.obs)  # the paddle stands in the middle, cell 12 + 2
    left = act(env, *[0] * 60)
    assert all(lit(picture) == [4 + ball, 13] for picture, ball in zip(left.obs, balls))
    act(env, *[0] * 60)
    end = act(env, *[0] * 60)
    assert end.last.all()
    assert (end.discount == 0).all()
    assert end.reward.tolist() == [1.0 if ball == 0 else -1.0 for ball in balls]
    caught = [lit(picture) for picture, ball in zip(end.next_obs, balls) if ball == 0]
    assert caught
    assert all(cells == [12] for cells in caught)


@pytest.mark.parametrize("size", [3, 7, 8])
def test_catch_value(size):
    env = Catch(40, "cpu", size=size)

    def chase(step: Step, t: int) -> Tensor:
        rows = step.obs[:, 0]
        ball = rows[:, :-1].amax(1).argmax(1)
        return (ball - rows[:, -1].argmax(1)).sign() + 1

    assert discounted_return(env, chase).tolist() == pytest.approx([env.optimal_value(GAMMA)] * 40)
    assert env.optimal_value(GAMMA) == pytest.approx(GAMMA ** (size - 2))


@pytest.mark.parametrize("delay", [0, 3])
def test_cue_is_worth_one_to_memory_and_nothing_without(delay):
    env = Cue(64, "cpu", delay=delay)
    first = env.reset(0)
    cues = torch.tensor([lit(picture)[0] // 2 for picture in first.obs])
    assert {lit(picture)[0] for picture in first.obs} == {0, 2}
    pictures = []
    for t in range(delay + 1):
        step = act(env, *[t % 2] * 64)
        assert not step.last.any()
        assert (step.reward == 0).all()
        pictures.append(lit(step.obs[0]))
        assert (step.obs == step.obs[0]).all()  # no trace of the cue
    assert pictures == [[4]] * delay + [[7]]
    end = env.step(cues)
    assert end.last.all()
    assert (end.discount == 0).all()
    assert (end.reward == 1).all()
    assert not end.next_obs.any()
    assert discounted_return(env, lambda step, t: cues).tolist() == pytest.approx([env.optimal_value(GAMMA)] * 64)
    assert env.optimal_value(GAMMA) == pytest.approx(GAMMA ** (delay + 1))
    blind = Cue(2000, "cpu", delay=delay)
    assert abs(float(discounted_return(blind, lambda step, t: torch.zeros(2000, dtype=torch.int64)).mean())) < 0.08


def test_deceptive_by_hand():
    env = Deceptive(3, "cpu", height=2, small=0.25, large=4.0)
    env.reset(0)
    one = act(env, 0, 1, 1)
    assert one.reward.tolist() == [0.25, 0, 0]
    assert one.last.tolist() == [True, False, False]
    assert [lit(picture) for picture in one.next_obs] == [[], [1], [1]]
    assert [lit(picture) for picture in one.obs] == [[0], [1], [1]]
    two = act(env, 1, 0, 1)
    assert two.reward.tolist() == [0, 0.25, 4]
    assert two.discount.tolist() == [1, 0, 0]
    assert two.last.tolist() == [False, True, True]
    assert lit(two.next_obs[2]) == [2]


def test_deceptive_of_equal_length_by_hand():
    env = Deceptive(4, "cpu", height=3, small=0.25, large=4.0, equal_length=True)
    env.reset(0)
    one = act(env, 0, 1, 1, 1)
    assert one.reward.tolist() == [0.25, 0, 0, 0]
    assert not one.last.any()
    assert [lit(picture) for picture in one.obs] == [[4], [1], [1], [1]]
    two = act(env, 1, 0, 1, 1)
    assert two.reward.tolist() == [0, 0.25, 0, 0]
    assert not two.last.any()
    assert [lit(picture) for picture in two.obs] == [[5], [5], [2], [2]]
    three = act(env, 0, 1, 0, 1)  # whatever is done at rest, nothing comes of it
    assert three.reward.tolist() == pytest.approx([0, 0, 0.25, 4])
    assert three.last.all()
    assert not three.discount.any()
    assert [lit(picture) for picture in three.next_obs] == [[], [], [], [3]]
    assert [lit(picture) for picture in three.obs] == [[0]] * 4


def test_deceptive_of_equal_length_has_the_same_values():
    generator = torch.Generator().manual_seed(0)
    short, even = (Deceptive(500, "cpu", height=4, equal_length=equal) for equal in (False, True))
    assert even.optimal_value(GAMMA) == short.optimal_value(GAMMA)
    climbed = discounted_return(even, lambda step, t: torch.ones(500, dtype=torch.int64))
    assert climbed.tolist() == pytest.approx([GAMMA**3] * 500)
    assert int(even.reset(0).last.sum()) == 500
    for t in range(1, 13):
        assert even.step(torch.randint(2, (500,), generator=generator)).last.tolist() == [t % 4 == 0] * 500


def test_deceptive_values_and_how_rare_the_large_reward_is():
    env = Deceptive(2, "cpu", height=4, small=0.8)
    by_iteration = torch.zeros(5).double()
    by_iteration[4] = 1 / GAMMA  # the climb past the last rung gives `large` at once
    for rung in (3, 2, 1, 0):
        by_iteration[rung] = max(0.8, GAMMA * float(by_iteration[rung + 1]))
    assert env.optimal_values(GAMMA).tolist() == pytest.approx(by_iteration[:4].tolist())
    assert env.optimal_values(GAMMA).tolist() == pytest.approx([0.8, 0.81, 0.9, 1.0])
    assert env.optimal_value(GAMMA) == pytest.approx(0.8)
    assert Deceptive(1, "cpu", height=4, small=0.1).optimal_value(GAMMA) == pytest.approx(GAMMA**3)
    climbed = discounted_return(Deceptive(2, "cpu", height=4), lambda step, t: torch.ones(2, dtype=torch.int64))
    assert climbed.tolist() == pytest.approx([GAMMA**3] * 2)
    generator = torch.Generator().manual_seed(0)
    many = Deceptive(20_000, "cpu", height=4)
    returns = discounted_return(many, lambda step, t: torch.randint(2, (20_000,), generator=generator))
    assert float((returns > 0.5).double().mean()) == pytest.approx(2**-4, abs=0.006)
