"""AtariEnv: every trap of ale-py's vector environment, one by one, against ale-py itself."""

import dataclasses
import os
import subprocess
import sys

import ale_py
import numpy as np
import pytest
import torch
from ale_py import roms

from envs.api import Step, UserError, check_step
from envs.atari import GAMES, OBS_MODES, AtariEnv, rom_id
from envs.cpus import usable_cpus
from envs.protocols import PROTOCOLS, Protocol
from envs.seeds import lane_seed

PLAIN = dataclasses.replace(PROTOCOLS["mfec2016"], noop_max=1)
LIVES = dataclasses.replace(PLAIN, life_loss=True)


def play(env: AtariEnv, steps: int, seed: int = 0) -> tuple[list[Step], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shown, actions = [env.reset(seed)], []
    for _ in range(steps):
        actions.append(torch.randint(env.spec.num_actions, (env.num_envs,), generator=generator))
        shown.append(env.step(actions[-1]))
    return shown, actions


def bare(game: str, seed: int, protocol: Protocol) -> ale_py.ALEVectorInterface:
    """One lane of ale-py in its default autoreset mode, where the step after an episode's end is the reset."""
    ale = ale_py.ALEVectorInterface(
        rom_path=roms.get_rom_path(GAMES[game]),
        num_envs=1,
        num_threads=1,
        stack_num=1,
        frame_skip=protocol.frame_skip,
        noop_max=protocol.noop_max,
        use_fire_reset=False,
        reward_clipping=False,
        repeat_action_probability=protocol.sticky,
    )
    ale.reset(np.zeros(1, np.int64), np.array([seed]))
    return ale


def ale_step(ale: ale_py.ALEVectorInterface, action: int) -> tuple:
    ale.send(np.array([action]), np.ones(1, np.float32))
    return ale.recv()


def test_games_are_the_104_with_one_player():
    assert len(GAMES) == 104
    assert GAMES["Pong"] == "pong"
    assert GAMES["MontezumaRevenge"] == "montezuma_revenge"
    assert GAMES["Qbert"] == "qbert"
    assert GAMES["MsPacman"] == "ms_pacman"
    assert set(roms.get_all_rom_ids()) - set(GAMES.values()) == {"combat", "joust", "maze_craze", "warlords"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pong", "Pong"), ("Pongg", "Pong"), ("montezuma_revenge", "MontezumaRevenge"), ("QBert", "Qbert"), ("MsPackman", "MsPacman")],
)
def test_a_misspelt_game_gets_the_nearest_name(typed, meant):
    with pytest.raises(UserError, match=rf"no Atari game is called {typed}; did you mean .*{meant}") as error:
        rom_id(typed)
    assert "\n" not in str(error.value)


def test_a_name_like_no_other_gets_examples():
    with pytest.raises(UserError, match="the 104 games are named like Adventure"):
        rom_id("xxxxxxxxxxxx")


@pytest.mark.parametrize("game", ["Combat", "joust", "MazeCraze", "maze_craze", "Warlords"])
def test_two_player_cartridges_are_refused_by_name(game):
    with pytest.raises(UserError, match=rf"{game} cannot be played"):
        AtariEnv(game, 1, "cpu", PLAIN)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"num_threads": -1}, "num_threads must be 0"),
        ({"obs": "grey85"}, "obs must be one of grey84, grey42, rgb64, rgb210x160, got grey85"),
    ],
)
def test_bad_knobs_are_one_clear_line(knobs, message):
    with pytest.raises(UserError, match=message):
        AtariEnv(**({"game": "Pong", "num_envs": 1, "device": "cpu", "protocol": PLAIN} | knobs))


def test_spec_and_action_sets():
    minimal = AtariEnv("Breakout", 2, "cpu", PLAIN).spec
    assert (minimal.name, minimal.obs_shape, minimal.frames_per_step) == ("Breakout", (1, 84, 84), 4)
    assert minimal.action_names == ("NOOP", "FIRE", "RIGHT", "LEFT")
    full = AtariEnv("Breakout", 2, "cpu", dataclasses.replace(PLAIN, full_action_set=True, frame_skip=5)).spec
    assert (full.num_actions, full.action_names[-1], full.frames_per_step) == (18, "DOWNLEFTFIRE", 5)


@pytest.mark.parametrize("obs", OBS_MODES)
@pytest.mark.parametrize(("game", "steps"), [("Breakout", 200), ("Qbert", 120)])
def test_contract(game, steps, obs):
    env = AtariEnv(game, 2, "cpu", dataclasses.replace(LIVES, sticky=0.25, max_episode_frames=400), obs, num_threads=1)
    assert env.spec.obs_shape == OBS_MODES[obs]
    shown, _ = play(env, steps)
    for step in shown:
        check_step(step, env.spec)
        assert step.obs.is_contiguous(memory_format=torch.channels_last if step.obs.shape[1] == 3 else torch.contiguous_format)
        assert (step.next_obs is step.obs) == (not step.last.any() or step is shown[0])
    first = shown[0]
    assert first.last.all()
    assert (first.reward == 0).all()
    assert (first.discount == 1).all()
    assert any(step.last.any() for step in shown[1:])


def test_tensors_of_a_step_are_never_written_again():
    env = AtariEnv("Breakout", 2, "cpu", dataclasses.replace(PLAIN, max_episode_frames=80))
    generator = torch.Generator().manual_seed(0)
    kept = []
    step = env.reset(0)
    for _ in range(60):
        kept.append((step, Step(*(tensor.clone() for tensor in step))))
        step = env.step(torch.randint(4, (2,), generator=generator))
    env.reset(1)
    env.close()
    for step, copy in kept:
        assert all(torch.equal(*pair) for pair in zip(step, copy))


def test_an_episode_is_ales_own_with_raw_rewards_and_lost_lives_told_apart_from_ends():
    """Against ale-py in its own mode, which goes on after a lost life and shows rewards, lives and ends plainly."""
    env = AtariEnv("Qbert", 2, "cpu", LIVES)
    shown, actions = play(env, 700)
    lost, ended, biggest = 0, 0, 0.0
    for lane in range(2):  # one after another: ale-py's own mode spends a step on a reset, ours does not
        ale, lives = bare("Qbert", lane_seed(0, lane), LIVES), 4
        for step, action in zip(shown[1:], actions):
            obs, reward, terminated, truncated, info = ale_step(ale, int(action[lane]))
            fell = info["lives"][0] < lives
            assert not truncated[0]
            assert float(step.reward[lane]) == reward[0]
            assert bool(step.last[lane]) == terminated[0]
            assert float(step.discount[lane]) == (0 if terminated[0] or fell else 1)
            assert np.array_equal(step.next_obs[lane].numpy(), obs[0])
            lost += int(fell and not terminated[0])
            ended += int(terminated[0])
            biggest = max(biggest, float(reward[0]))
            if terminated[0]:
                obs, *_, info = ale_step(ale, 0)
            assert np.array_equal(step.obs[lane].numpy(), obs[0])
            lives = info["lives"][0]
    assert lost >= 6
    assert ended >= 2
    assert biggest == 25  # one cube; clipped it would be 1


def test_a_lost_life_is_no_news_where_the_protocol_says_so():
    silent, told = (play(AtariEnv("Breakout", 4, "cpu", protocol), 200)[0] for protocol in (PLAIN, LIVES))
    for quiet, loud in zip(silent[1:], told[1:]):
        assert torch.equal(quiet.obs, loud.obs)
        assert torch.equal(quiet.discount == 0, quiet.last)  # no time limit is near
        assert torch.equal(quiet.last, loud.last)
    assert sum(int(((step.discount == 0) & ~step.last).sum()) for step in told) >= 4


def test_time_limit_is_bootstrapped_from_the_true_picture():
    """Frames count after the no-ops; the last picture is that of the same game without a limit, and only late lanes are reset."""
    limit, at = 560, 140
    short, free = (
        AtariEnv("Breakout", 4, "cpu", dataclasses.replace(PLAIN, noop_max=30, max_episode_frames=frames)) for frames in (limit, 4000)
    )
    (cut, _), (whole, _) = play(short, at + 9), play(free, at + 9)
    alive = ~torch.stack([step.last for step in whole[1 : at + 1]]).any(0)
    assert alive.any()
    assert not alive.all()
    for step in range(at):
        assert torch.equal(cut[step].obs, whole[step].obs)
        assert torch.equal(cut[step].last, whole[step].last)
    check_step(cut[at], short.spec)
    assert torch.equal(cut[at].last, alive)
    assert (cut[at].discount == 1).all()
    assert torch.equal(cut[at].next_obs, whole[at].obs)
    assert (cut[at].obs[alive] != cut[at].next_obs[alive]).any()
    for step in range(at, at + 9):
        assert torch.equal(cut[step].obs[~alive], whole[step].obs[~alive])
        assert not cut[step + 1].last[alive].any()


def test_a_life_lost_on_the_step_of_the_time_limit_is_lost():
    free, _ = play(AtariEnv("Breakout", 1, "cpu", LIVES), 100)
    fall = next(t for t, step in enumerate(free) if step.discount[0] == 0)
    for protocol, discount in ((LIVES, 0), (PLAIN, 1)):
        cut, _ = play(AtariEnv("Breakout", 1, "cpu", dataclasses.replace(protocol, max_episode_frames=4 * fall)), fall)
        assert (bool(cut[fall].last[0]), float(cut[fall].discount[0])) == (True, discount)


def test_at_a_games_own_end_the_last_picture_is_the_one_before():
    """The known blemish of ale-py, as the docstring has it: the picture before, or merged with it by maximum."""
    shown, _ = play(AtariEnv("Qbert", 2, "cpu", PLAIN), 700)
    ends = [(t, lane) for t, step in enumerate(shown[1:], 1) for lane in range(2) if step.last[lane]]
    assert ends
    for t, lane in ends:
        assert (shown[t].next_obs[lane] >= shown[t - 1].obs[lane]).all()


def test_lanes_differ_and_follow_from_the_seed():
    still = torch.zeros(5, dtype=torch.int64)

    def opening(env: AtariEnv, seed: int) -> torch.Tensor:
        return torch.cat([env.reset(seed).obs, *(env.step(still).obs for _ in range(12))], 1)

    one, two = (AtariEnv("Pong", 5, "cpu", PROTOCOLS["mfec2016"], num_threads=threads) for threads in (1, 2))
    pictures = opening(one, 3)
    assert torch.equal(pictures, opening(two, 3))
    assert len(pictures.flatten(1).unique(dim=0)) >= 4
    assert not torch.equal(pictures, opening(two, 4))
    assert torch.equal(pictures, opening(two, 3))  # a reset is as good as a new environment


@pytest.mark.parametrize("wrong", [torch.tensor([0, 6]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_illegal_actions_are_refused_before_they_can_hang(wrong):
    env = AtariEnv("Pong", 2, "cpu", PLAIN)
    env.reset(0)
    with pytest.raises(ValueError, match="actions must"):
        env.send(wrong)
    check_step(env.step(torch.tensor([0, 5])), env.spec)


def test_order_of_calls():
    env = AtariEnv("Pong", 2, "cpu", PLAIN)
    still = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="send comes after"):
        env.send(still)
    first = env.reset(0)
    with pytest.raises(RuntimeError, match="recv comes after"):
        env.recv()
    env.send(still)
    with pytest.raises(RuntimeError, match="send comes after"):
        env.send(still)
    again = env.reset(0)  # drains
    assert torch.equal(first.obs, again.obs)
    env.send(still)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="Pong is closed"):
        env.reset(0)


def test_actions_may_change_after_send():
    action = torch.tensor([2, 2])
    shown = []
    for spoil in (False, True):
        env = AtariEnv("Pong", 2, "cpu", PLAIN)
        env.reset(0)
        for _ in range(40):
            env.send(action)
            if spoil:
                action.fill_(3)
            step = env.recv()
            action.fill_(2)
        shown.append(step.obs)
    assert torch.equal(*shown)


def test_threads_are_those_of_the_process():
    assert AtariEnv("Pong", 5, "cpu", PLAIN).num_threads == min(usable_cpus(), 5)
    assert AtariEnv("Pong", 1, "cpu", PLAIN, num_threads=4).num_threads == 1
    assert AtariEnv("Pong", 3, "cpu", PLAIN, num_threads=2).num_threads == 2


def test_games_are_listed_without_loading_a_rom():
    """Listing costs less than 50 ms beyond importing what it stands on, and needs no cartridge."""
    code = (
        "import time, torch, gymnasium, ale_py\n"
        "from ale_py import roms\n"
        "def refuse(*_): raise AssertionError('a cartridge was read')\n"
        "roms.get_rom_path = refuse\n"
        "start = time.process_time()\n"
        "from envs.atari import GAMES\n"
        "assert len(GAMES) == 104\n"
        "print(time.process_time() - start)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert float(out.stdout) < 0.05
