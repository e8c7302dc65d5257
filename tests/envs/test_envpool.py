"""EnvPoolAtari on EnvPool itself, lane by lane against single emulators of ale-py: what its docstring says holds to the last bit."""

import dataclasses
import importlib.util
import os

import ale_py
import numpy as np
import pytest
import torch
from ale_py import roms

from envs.api import Step, check_step
from envs.area import shrink
from envs.atari import GAMES, OBS_MODES, AtariEnv
from envs.atari_envpool import EnvPoolAtari, task_id
from envs.protocols import PROTOCOLS, Protocol
from envs.seeds import lane_seed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="the optional extra envpool is not installed")

PLAIN = dataclasses.replace(PROTOCOLS["mfec2016"], noop_max=1)
LIVES = dataclasses.replace(PLAIN, life_loss=True)


def play(env: EnvPoolAtari, steps: int, seed: int = 0) -> tuple[list[Step], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shown, actions = [env.reset(seed)], []
    for _ in range(steps):
        actions.append(torch.randint(env.spec.num_actions, (env.num_envs,), generator=generator))
        shown.append(env.step(actions[-1]))
    for step in shown:
        check_step(step, env.spec)
    return shown, actions


class Lane:
    """One emulator of ale-py, opened by hand with `no_ops` frames."""

    def __init__(self, game: str, protocol: Protocol, seed: int, shape: tuple[int, int, int]) -> None:
        self.shape, self.skip = shape, protocol.frame_skip
        self.ale = ale_py.ALEInterface()
        self.ale.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale.setFloat("repeat_action_probability", protocol.sticky)
        self.ale.setInt("random_seed", seed)
        self.ale.loadROM(roms.get_rom_path(GAMES[game]))
        self.actions = self.ale.getLegalActionSet() if protocol.full_action_set else self.ale.getMinimalActionSet()

    def open(self, no_ops: int, fire: bool = False) -> np.ndarray:
        self.ale.reset_game()
        for _ in range(no_ops):
            self.ale.act(ale_py.Action.NOOP)
        if fire:
            self.ale.act(ale_py.Action.FIRE)
        return self.small(self.seen())

    def step(self, action: int) -> tuple[float, list[np.ndarray]]:
        """Points, and the frames up to the game's end."""
        points, frames = 0.0, []
        for _ in range(self.skip):
            points += self.ale.act(self.actions[action])
            frames.append(self.seen())
            if self.ale.game_over():
                break
        return points, frames

    def seen(self) -> np.ndarray:
        return self.ale.getScreenGrayscale() if self.shape[0] == 1 else self.ale.getScreenRGB()

    def small(self, frame: np.ndarray) -> np.ndarray:
        picture = shrink(frame, *self.shape[1:])
        return picture[None] if self.shape[0] == 1 else picture.transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("game", "sticky", "skip", "obs", "steps", "lives_lost", "ends"),
    [
        ("Breakout", 0.25, 4, "grey84", 500, 8, 4),
        ("Qbert", 0.25, 4, "rgb64", 500, 8, 3),
        ("Qbert", 0.0, 3, "rgb210x160", 120, 1, 0),
        ("Pong", 0.25, 1, "grey84", 60, 0, 0),
    ],
)
def test_lanes_are_ales_own_but_for_one_no_op_more(game, sticky, skip, obs, steps, lives_lost, ends):
    """Pictures, points, lives and ends of several lanes over several episodes, and what is shown at a game's own end."""
    protocol = dataclasses.replace(LIVES, sticky=sticky, frame_skip=skip, max_episode_frames=108_000, evaluation_max_frames=108_000)
    env = EnvPoolAtari(game, 3, "cpu", protocol, obs, num_threads=2)
    assert env.spec.obs_shape == OBS_MODES[obs]
    shown, actions = play(env, steps)
    ended = lost = 0
    for number in range(3):
        lane = Lane(game, protocol, lane_seed(0, number), env.spec.obs_shape)
        assert np.array_equal(shown[0].obs[number].numpy(), lane.open(1))
        lives = lane.ale.lives()
        for t, action in enumerate(actions, 1):
            points, frames = lane.step(int(action[number]))
            over, fell = lane.ale.game_over(), lane.ale.lives() < lives
            assert float(shown[t].reward[number]) == points
            assert bool(shown[t].last[number]) == over
            assert float(shown[t].discount[number]) == (0 if over or fell else 1)
            successor = shown[t].next_obs[number].numpy()
            if not over or len(frames) == skip:
                expected = lane.small(np.maximum(*frames[-2:]) if len(frames) > 1 else frames[-1])
            elif len(frames) == skip - 1:
                expected = lane.small(frames[-1])
            else:
                expected = shown[t - 1].obs[number].numpy()
            assert np.array_equal(successor, expected), (t, number, len(frames))
            if over:
                assert np.array_equal(shown[t].obs[number].numpy(), lane.open(1))
            lives = lane.ale.lives()
            ended, lost = ended + over, lost + (fell and not over)
    assert (lost >= lives_lost, ended >= ends) == (True, True), (lost, ended)


@pytest.mark.parametrize(("noop_max", "fire"), [(4, False), (3, True)])
def test_openings_are_1_to_noop_max_no_ops_with_fire_in_the_place_of_the_last(noop_max, fire):
    protocol = dataclasses.replace(PLAIN, noop_max=noop_max, fire_reset=fire)
    pool = EnvPoolAtari("Breakout", 12, "cpu", protocol)
    pool.reset(0)
    drawn = pool._pool.reset()[1]["ram"]  # of every lane's second opening
    lane = Lane("Breakout", protocol, 0, (1, 84, 84))
    known = {}
    for frames in range(1, noop_max + 1):
        lane.open(frames - fire, fire)
        known[frames] = lane.ale.getRAM()
    found = {frames for ram in drawn for frames, expected in known.items() if np.array_equal(ram, expected)}
    assert all(any(np.array_equal(ram, expected) for expected in known.values()) for ram in drawn)
    assert {1, noop_max} <= found


def test_time_limit_resets_the_late_lanes_and_no_others():
    limit, at = 560, 140
    short, free = (
        EnvPoolAtari("Breakout", 4, "cpu", dataclasses.replace(PLAIN, noop_max=30, max_episode_frames=frames)) for frames in (limit, 4000)
    )
    (cut, _), (whole, _) = play(short, at + 9), play(free, at + 9)
    alive = ~torch.stack([step.last for step in whole[1 : at + 1]]).any(0)
    assert alive.any()
    assert not alive.all()
    assert all(torch.equal(cut[step].obs, whole[step].obs) for step in range(at))
    assert torch.equal(cut[at].last, alive)
    assert (cut[at].discount == 1).all()
    assert torch.equal(cut[at].next_obs, whole[at].obs)
    assert (cut[at].obs[alive] != cut[at].next_obs[alive]).any()
    for step in range(at, at + 9):
        assert torch.equal(cut[step].obs[~alive], whole[step].obs[~alive])
        assert not cut[step + 1].last[alive].any()


def test_lanes_differ_and_follow_from_the_seed_whatever_the_threads():
    protocol = dataclasses.replace(PROTOCOLS["mfec2016"], sticky=0.25, max_episode_frames=160)
    one, two = (EnvPoolAtari("Breakout", 5, "cpu", protocol, num_threads=threads) for threads in (1, 2))

    def trajectory(env: EnvPoolAtari, seed: int) -> torch.Tensor:
        shown = [env.reset(seed)]
        shown += [env.step(torch.full((5,), t % 4)) for t in range(100)]
        return torch.stack([torch.cat([step.obs, step.next_obs], 1).flatten(1).sum(1) + step.reward + step.last.float() for step in shown])

    first = trajectory(one, 3)
    assert len(first.T.unique(dim=0)) == 5
    assert torch.equal(first, trajectory(two, 3))
    assert not torch.equal(first, trajectory(two, 4))
    assert torch.equal(first, trajectory(two, 3))  # a reset is as good as a new environment


def test_all_actions_and_every_game_are_there():
    import envpool

    assert {task_id(game) for game in GAMES} <= set(envpool.list_all_envs())
    env = EnvPoolAtari("Breakout", 1, "cpu", dataclasses.replace(PLAIN, full_action_set=True))
    env.reset(0)
    assert env.spec == AtariEnv("Breakout", 1, "cpu", env.protocol).spec
    assert env.spec.num_actions == 18
    check_step(env.step(torch.tensor([17])), env.spec)


def test_tensors_of_a_step_are_never_written_again_and_actions_may_change_after_send():
    shown = []
    for spoil in (False, True):
        env = EnvPoolAtari("Breakout", 2, "cpu", dataclasses.replace(PLAIN, max_episode_frames=80))
        kept, step = [], env.reset(0)
        for t in range(60):
            kept.append((step, Step(*(tensor.clone() for tensor in step))))
            action = torch.tensor([t % 4, 1])
            env.send(action)
            if spoil:
                action.fill_(2)
            step = env.recv()
        shown.append(step.obs)
        env.send(torch.zeros(2, dtype=torch.int64))  # close finds it pending
        env.close()
        assert all(torch.equal(*pair) for step, copy in kept for pair in zip(step, copy))
    assert torch.equal(*shown)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_a_reset_and_a_close_leave_no_threads_behind():
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    env = EnvPoolAtari("Pong", 2, "cpu", PLAIN, num_threads=2)
    before = threads()
    env.reset(0)
    running = threads()
    assert running > before
    env.send(torch.zeros(2, dtype=torch.int64))
    env.reset(1)
    assert threads() == running
    env.close()
    assert threads() == before
