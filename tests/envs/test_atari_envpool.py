"""EnvPoolAtari on a stand-in for EnvPool that counts, so that every step of the contract has a known answer. No EnvPool needed."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from fake_envpool import STEPS_TO_THE_END, FakeEnvPool

from envs.api import Step, UserError, VectorEnv, check_step
from envs.atari import GAMES, AtariEnv
from envs.atari_envpool import EnvPoolAtari, task_id
from envs.cpus import usable_cpus
from envs.protocols import PROTOCOLS
from envs.seeds import lane_seed

PLAIN = dataclasses.replace(PROTOCOLS["mfec2016"], noop_max=1)
LIVES = dataclasses.replace(PLAIN, life_loss=True)
STILL = torch.zeros(2, dtype=torch.int64)


@pytest.fixture
def envpool(monkeypatch) -> FakeEnvPool:
    fake = FakeEnvPool()
    monkeypatch.setitem(sys.modules, "envpool", fake)
    return fake


def told(picture: torch.Tensor) -> tuple[int, int, int]:
    """(lane seed, episode, step) of a picture of the stand-in."""
    seed, episode, step = picture[0, 0, :3].tolist()
    return seed, episode, step


def play(env: EnvPoolAtari, steps: int, seed: int = 0) -> list[Step]:
    shown = [env.reset(seed)]
    shown += [env.step(torch.zeros(env.num_envs, dtype=torch.int64)) for _ in range(steps)]
    for step in shown:
        check_step(step, env.spec)
    return shown


def test_every_knob_is_set_by_hand(envpool):
    protocol = dataclasses.replace(PROTOCOLS["machado2018"], noop_max=7, fire_reset=True, frame_skip=5, max_episode_frames=100)
    protocol = dataclasses.replace(protocol, evaluation_max_frames=100)
    env = EnvPoolAtari("MsPacman", 2, "cpu", protocol, "rgb64", num_threads=1)
    assert not envpool.pools
    env.reset(5)
    (pool,) = envpool.pools
    assert pool.task == "MsPacman-v5"
    assert pool.knobs == {
        "num_envs": 2,
        "batch_size": 0,
        "num_threads": 1,
        "thread_affinity_offset": -1,
        "seed": [lane_seed(5, 0), lane_seed(5, 1)],
        "max_episode_steps": 2**30,
        "stack_num": 1,
        "frame_skip": 5,
        "noop_max": 7,
        "use_fire_reset": True,
        "episodic_life": False,
        "zero_discount_on_life_loss": False,
        "reward_clip": False,
        "img_height": 64,
        "img_width": 64,
        "gray_scale": False,
        "use_inter_area_resize": True,
        "full_action_space": True,
        "repeat_action_probability": 0.25,
    }


def test_the_face_is_that_of_the_other_backend(envpool):
    ours, theirs = EnvPoolAtari("Pong", 2, "cpu", PLAIN), AtariEnv("Pong", 2, "cpu", PLAIN)
    assert isinstance(ours, VectorEnv)
    assert ours.spec == theirs.spec
    assert EnvPoolAtari("Pong", 2, "cpu", PLAIN, "rgb210x160").spec.obs_shape == (3, 210, 160)
    assert not hasattr(ours, "lane_seed")  # what asks for it would replay another game


def test_every_game_has_a_name_there():
    assert task_id("MontezumaRevenge") == "MontezumaRevenge-v5"
    assert task_id("TicTacToe3D") == "TicTacToe3d-v5"
    assert len({task_id(game) for game in GAMES}) == 104
    with pytest.raises(UserError, match="no Atari game is called Pongg; did you mean Pong"):
        task_id("Pongg")


def test_lanes_that_end_open_their_next_episode_within_the_step(envpool):
    """The one truth: each lane's pictures are 0, 1, 2 .. T of each episode, T as next_obs only, and no action is lost on a reset."""
    env = EnvPoolAtari("Pong", 2, "cpu", PLAIN)
    shown = play(env, 30)
    first = shown[0]
    assert first.next_obs is first.obs
    assert first.last.all()
    assert torch.equal(first.reward, torch.zeros(2))
    assert torch.equal(first.discount, torch.ones(2))
    for lane in range(2):
        length, name = STEPS_TO_THE_END[lane], lane_seed(0, lane) % 251
        for t, step in enumerate(shown):
            episode, at = divmod(t, length)
            assert told(step.obs[lane]) == (name, episode, at)
            if t == 0:
                continue
            ends = at == 0
            assert bool(step.last[lane]) == ends
            assert told(step.next_obs[lane]) == ((name, episode - 1, length) if ends else (name, episode, at))
            assert float(step.reward[lane]) == 10 * (length if ends else at)
            assert float(step.discount[lane]) == (0 if ends else 1)
    assert envpool.pools[0].openings == [1 + 30 // 7, 1 + 30 // 4]
    assert all((step.next_obs is step.obs) == (not step.last.any()) for step in shown[1:])


def test_a_lost_life_is_discount_0_and_not_last_where_the_protocol_says_so(envpool):
    quiet, loud = (play(EnvPoolAtari("Pong", 2, "cpu", protocol), 7) for protocol in (PLAIN, LIVES))
    assert [float(step.discount[0]) for step in quiet[1:]] == [1, 1, 1, 1, 1, 1, 0]
    assert [float(step.discount[0]) for step in loud[1:]] == [1, 1, 0, 1, 1, 0, 0]
    assert [bool(step.last[0]) for step in loud[1:]] == [False] * 6 + [True]
    assert [float(step.discount[1]) for step in loud[1:]] == [1, 1, 0, 0, 1, 1, 0]  # the second game opens with all its lives


def test_time_limit_counts_our_frames_and_is_bootstrapped_from_the_true_picture(envpool):
    env = EnvPoolAtari("Pong", 2, "cpu", dataclasses.replace(PLAIN, max_episode_frames=20))
    shown = play(env, 10)
    name = lane_seed(0, 0) % 251
    assert [bool(step.last[0]) for step in shown[1:]] == [False, False, False, False, True] * 2
    for episode, t in enumerate((5, 10)):
        assert float(shown[t].discount[0]) == 1
        assert told(shown[t].next_obs[0]) == (name, episode, 5)
        assert told(shown[t].obs[0]) == (name, episode + 1, 0)
    assert [t for t, step in enumerate(shown) if t and step.last[1]] == [4, 8]  # the game's own ends, and the limit counts anew
    assert all(float(shown[t].discount[1]) == 0 for t in (4, 8))


def test_lives_that_a_cut_game_had_left_are_not_missed_by_the_next(envpool):
    """The game before was cut with four lives, two of them gifts; the next opens with three, and loses none in its first step."""
    shown = play(EnvPoolAtari("Pong", 1, "cpu", dataclasses.replace(LIVES, max_episode_frames=20)), 8)
    assert [float(step.discount[0]) for step in shown[1:]] == [1, 1, 0, 1, 1, 1, 1, 0]


def test_a_life_lost_on_the_step_of_the_time_limit_is_lost(envpool):
    for protocol, discount in ((LIVES, 0), (PLAIN, 1)):
        step = play(EnvPoolAtari("Pong", 1, "cpu", dataclasses.replace(protocol, max_episode_frames=12)), 3)[-1]
        assert (bool(step.last[0]), float(step.discount[0])) == (True, discount)


def test_tensors_of_a_step_are_never_written_again(envpool):
    env = EnvPoolAtari("Pong", 2, "cpu", PLAIN)
    kept, step = [], env.reset(0)
    for _ in range(20):
        kept.append((step, Step(*(tensor.clone() for tensor in step))))
        step = env.step(STILL)
    env.reset(1)
    for step, copy in kept:
        assert all(torch.equal(*pair) for pair in zip(step, copy))


@pytest.mark.parametrize("wrong", [torch.tensor([0, 6]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_illegal_actions_are_refused(envpool, wrong):
    env = EnvPoolAtari("Pong", 2, "cpu", PLAIN)
    env.reset(0)
    with pytest.raises(ValueError, match="actions must"):
        env.send(wrong)
    check_step(env.step(torch.tensor([0, 5])), env.spec)


def test_order_of_calls(envpool):
    env = EnvPoolAtari("Pong", 2, "cpu", PLAIN)
    with pytest.raises(RuntimeError, match="send comes after"):
        env.send(STILL)
    first = env.reset(0)
    with pytest.raises(RuntimeError, match="recv comes after"):
        env.recv()
    env.send(STILL)
    with pytest.raises(RuntimeError, match="send comes after"):
        env.send(STILL)
    again = env.reset(0)  # drops what is pending
    assert torch.equal(first.obs, again.obs)
    assert told(env.step(STILL).obs[0])[1:] == (0, 1)
    env.send(STILL)
    env.close()
    env.close()
    for call in (lambda: env.reset(0), lambda: env.send(STILL), env.recv):
        with pytest.raises(RuntimeError, match="Pong is closed"):
            call()


def test_a_library_that_plays_another_action_set_is_noticed(envpool):
    env = EnvPoolAtari("Breakout", 2, "cpu", PLAIN)  # four actions; the stand-in has six
    with pytest.raises(AssertionError, match="EnvPool has 6 actions in Breakout"):
        env.reset(0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"num_threads": -1}, "num_threads must be 0"),
        ({"obs": "grey85"}, "obs must be one of grey84, grey42, rgb64, rgb210x160, got grey85"),
        ({"game": "Combat"}, "Combat cannot be played"),
    ],
)
def test_bad_knobs_are_one_clear_line(envpool, knobs, message):
    with pytest.raises(UserError, match=message):
        EnvPoolAtari(**({"game": "Pong", "num_envs": 1, "device": "cpu", "protocol": PLAIN} | knobs))


def test_threads_are_those_of_the_process(envpool):
    assert EnvPoolAtari("Pong", 5, "cpu", PLAIN).num_threads == min(usable_cpus(), 5)
    assert EnvPoolAtari("Pong", 1, "cpu", PLAIN, num_threads=4).num_threads == 1


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(UserError, match=r'EnvPool cannot be imported .*pip install "reverie\[envpool\]"') as error:
        EnvPoolAtari("Pong", 1, "cpu", PLAIN)
    assert "\n" not in str(error.value)


def test_the_stand_in_resets_a_lane_on_the_step_after_its_end():
    """What makes the tests above mean something: without a reset by hand an action would be lost, as with EnvPool itself."""
    pool = FakeEnvPool().make_gymnasium(
        "Pong-v5", num_envs=2, gray_scale=True, img_height=84, img_width=84, full_action_space=False, seed=[3, 4]
    )
    pool.reset()
    steps = []
    for _ in range(6):
        pool.send(np.zeros(2, np.int32))
        obs, reward, done, *_ = pool.recv()
        steps.append((int(obs[1, 0, 0, 2]), float(reward[1]), bool(done[1])))
    assert steps == [(1, 10, False), (2, 20, False), (3, 30, False), (4, 40, True), (0, 0, False), (1, 10, False)]
