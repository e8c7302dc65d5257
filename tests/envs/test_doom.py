"""My Way Home: the contract on a stand-in for ViZDoom and, where it is installed, on ViZDoom itself, lane by lane against bare games."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_vizdoom import BUTTONS, FakeViZDoom

import launch
from envs.api import Step, UserError, VectorEnv, check_step
from envs.area import shrink
from envs.cpus import usable_cpus
from envs.doom import FORMATS, MyWayHome
from envs.seeds import lane_seed

TURN_LEFT, _, FORWARD, _, _ = range(5)
LIMIT_STEPS = 525
SEED = 45  # brings one of two lanes home within 80 random steps, and the other not before the limit
ACTIONS = torch.randint(5, (60, 8), generator=torch.Generator().manual_seed(0)).repeat(20, 1)


@pytest.fixture
def stand_in(monkeypatch, tmp_path) -> FakeViZDoom:
    fake = FakeViZDoom()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vizdoom", fake)
    return fake


@pytest.fixture(params=["stand-in", "itself"])
def library(request, monkeypatch, tmp_path):
    """The module, for tests that hold on both."""
    monkeypatch.chdir(tmp_path)
    if request.param == "itself":
        return pytest.importorskip("vizdoom")
    monkeypatch.setitem(sys.modules, "vizdoom", FakeViZDoom())
    return sys.modules["vizdoom"]


def play(env: MyWayHome, steps: int, seed: int = SEED) -> list[Step]:
    return [env.reset(seed), *(env.step(action[: env.num_envs]) for action in ACTIONS[:steps])]


def same(one: list[Step], two: list[Step], lanes: int) -> bool:
    return all(torch.equal(a[:lanes], b[:lanes]) for x, y in zip(one, two, strict=True) for a, b in zip(x, y))


def told(picture: torch.Tensor) -> tuple[int, int, int]:
    """(mark, frames walked, frames played) of a picture of the stand-in."""
    bands = picture.unflatten(1, (4, -1)).float()
    assert torch.equal(bands.amin((0, 2, 3)), bands.amax((0, 2, 3)))
    mark, walked, rest, times = bands[0, :, 0, 0].int().tolist()
    return mark, walked, 250 * times + rest


# On both


@pytest.mark.parametrize(("knobs", "shape"), [({}, (3, 84, 84)), ({"colours": "grey", "height": 8, "width": 16}, (1, 8, 16))])
def test_contract(library, knobs, shape):
    env = MyWayHome(2, "cpu", **knobs)
    assert isinstance(env, VectorEnv)
    assert (env.spec.name, env.spec.obs_shape, env.spec.frames_per_step) == ("MyWayHome", shape, 4)
    assert env.spec.action_names == BUTTONS
    shown = play(env, LIMIT_STEPS + 5)
    kept = [Step(*(tensor.clone() for tensor in step)) for step in shown]
    first = shown[0]
    assert first.next_obs is first.obs
    assert (first.last.all(), first.reward.any(), first.discount.all()) == (True, False, True)
    for step in shown:
        check_step(step, env.spec)
        assert step.obs.is_contiguous()
    assert all((step.next_obs is step.obs) == (not step.last.any()) for step in shown[1:])
    ended = [step for step in shown[1:] if step.last.any()]
    assert {float(step.discount[lane]) for step in ended for lane in range(2) if step.last[lane]} == {0, 1}
    play(env, 3, seed=0)
    env.close()
    assert same(shown, kept, 2)  # nothing was written again


def test_all_follows_from_the_seed(library):
    env = MyWayHome(2, "cpu", "grey", num_threads=1)
    shown = play(env, 80)
    assert any(step.last.any() for step in shown[1:])
    other = play(env, 7, seed=14)
    again = play(env, 80)
    env.close()
    assert same(shown, again, 2)
    assert not torch.equal(shown[0].obs, other[0].obs)
    more = MyWayHome(4, "cpu", "grey", num_threads=4)
    assert same(shown, play(more, 80), 2)
    opening = more.reset(SEED).obs
    more.close()
    assert len(opening.flatten(1).unique(dim=0)) == 4


def test_the_limit_cuts_at_the_true_picture_and_opens_the_next_episode(library):
    env = MyWayHome(1, "cpu", "grey", num_threads=1)
    still = torch.tensor([TURN_LEFT])
    env.reset(0)
    env.step(still)  # does not count
    opening = env.reset(3)
    steps = [env.step(still) for _ in range(2 * LIMIT_STEPS)]
    env.close()
    assert [t for t, step in enumerate(steps, 1) if step.last] == [LIMIT_STEPS, 2 * LIMIT_STEPS]
    assert all(float(step.discount) == 1 for step in steps)
    cut = steps[LIMIT_STEPS - 1]
    assert len({picture.numpy().tobytes() for picture in (opening.obs, steps[-LIMIT_STEPS - 2].obs, cut.next_obs, cut.obs)}) == 4
    assert float(sum(step.reward for step in steps)) == pytest.approx(-0.0001 * 4200, abs=1e-5)


def test_order_of_calls(library):
    env, still = MyWayHome(2, "cpu", "grey"), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="send comes after"):
        env.send(still)
    first = env.reset(0)
    with pytest.raises(RuntimeError, match="recv comes after"):
        env.recv()
    for wrong in (torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="actions must"):
            env.send(wrong)
    action = still.clone()
    env.send(action)
    action.fill_(9)  # it was taken over
    with pytest.raises(RuntimeError, match="send comes after"):
        env.send(still)
    after = env.recv()
    with pytest.raises(RuntimeError, match="recv comes after"):
        env.recv()
    env.send(still)
    assert torch.equal(env.reset(0).obs, first.obs)  # drains
    assert torch.equal(env.step(still).obs, after.obs)
    env.send(still)
    env.close()
    env.close()
    for call, words in ((lambda: env.reset(0), "MyWayHome is closed"), (lambda: env.send(still), "send comes"), (env.recv, "recv comes")):
        with pytest.raises(RuntimeError, match=words):
            call()


# On the stand-in


@pytest.mark.parametrize(
    ("distance", "rewards"),
    [(3, [0.9996]), (4, [0.9996, -0.0001]), (5, [-0.0004, 0.9998]), (7, [-0.0004, 0.9996]), (8, [-0.0004, 0.9996, -0.0001])],
)
def test_home_pays_and_a_frame_later_the_episode_ends(stand_in, distance, rewards):
    stand_in.distances = (distance, 1000)
    env = MyWayHome(1, "cpu", num_threads=1)
    shown = [env.reset(0), *(env.step(torch.tensor([FORWARD])) for _ in rewards)]
    assert [float(step.reward) for step in shown[1:]] == pytest.approx(rewards)
    assert [bool(step.last) for step in shown[1:]] == [False] * (len(rewards) - 1) + [True]
    assert [float(step.discount) for step in shown[1:]] == [1] * (len(rewards) - 1) + [0]
    mark, _, frames = told(shown[-1].next_obs[0])
    assert torch.equal(shown[-1].next_obs, shown[-2].obs)  # there is no picture of the end
    assert frames == 4 * (len(rewards) - 1)
    assert told(shown[-1].obs[0])[0] != mark
    assert told(shown[-1].obs[0])[1:] == (0, 0)
    assert told(env.step(torch.tensor([FORWARD])).obs[0])[1:] == (4, 4)


@pytest.mark.parametrize(("distance", "discount"), [(2099, 0), (2100, 1)])
def test_home_at_the_limit(stand_in, distance, discount):
    stand_in.distances = (distance,)
    env = MyWayHome(1, "cpu", "grey", num_threads=1)
    shown = [env.reset(0), *(env.step(torch.tensor([FORWARD])) for _ in range(LIMIT_STEPS))]
    assert float(shown[-1].reward) == pytest.approx(1 - 0.0004)
    assert (bool(shown[-1].last), float(shown[-1].discount)) == (True, discount)
    assert told(shown[-1].next_obs[0])[2] == (2100 if discount else 2096)
    assert not any(step.last for step in shown[1:-1])


def test_lanes_that_end_leave_the_others_as_they_are(stand_in):
    env = MyWayHome(3, "cpu", "grey", num_threads=2)
    stand_in.games[1].distances = (6,)
    stand_in.games[0].distances = stand_in.games[2].distances = (100,)
    shown = [env.reset(0), *(env.step(torch.full((3,), FORWARD)) for _ in range(9))]
    for t, step in enumerate(shown):
        assert [told(picture)[1] for picture in step.obs] == [4 * t, 4 * (t % 2), 4 * t]
        assert [told(picture)[1] for picture in step.next_obs] == [4 * t, 4 * bool(t), 4 * t]
        assert step.last.tolist() == ([True] * 3 if t == 0 else [False, t % 2 == 0, False])


def test_each_action_holds_its_button_for_four_frames(stand_in):
    env = MyWayHome(1, "cpu")
    env.reset(0)
    for action in range(5):
        env.step(torch.tensor([action]))
    assert stand_in.games[0].played == [(action, 4) for action in range(5)]


def test_every_setting_of_a_game(stand_in):
    for colours, screen in (("rgb", "CRCGCB"), ("grey", "GRAY8")):
        MyWayHome(1, "cpu", colours)
        assert stand_in.games[-1].settings == {
            "timeout": 0,
            "living_reward": -0.0001,
            "ini": os.devnull,
            "window": False,
            "resolution": "160x120",
            "format": screen,
        }


def test_games_start_once_close_and_are_spared_the_runs_signals(stand_in):
    env = MyWayHome(3, "cpu", num_threads=2)
    assert not any(game.running for game in stand_in.games)
    env.reset(0)
    env.reset(1)
    assert [(game.starts, game.episodes) for game in stand_in.games] == [(1, 2)] * 3
    assert [game.seed for game in stand_in.games] == [lane_seed(1, lane) for lane in range(3)]
    assert all({signal.SIGINT, signal.SIGTERM} <= game.blocked for game in stand_in.games)
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    env.close()
    assert not any(game.running for game in stand_in.games)


def test_games_go_on_together_while_nobody_waits(stand_in):
    env, meeting = MyWayHome(2, "cpu", num_threads=2), threading.Barrier(3)
    env.reset(0)
    for game in stand_in.games:
        game.during = lambda: meeting.wait(10)
    env.send(torch.tensor([0, 0]))
    meeting.wait(10)
    env.recv()


def test_one_thread_plays_one_game_after_another(stand_in):
    env = MyWayHome(3, "cpu", num_threads=1)
    env.reset(0)
    names: set[str] = set()

    def work() -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.05)

    for game in stand_in.games:
        game.during = work
    env.step(torch.tensor([0, 0, 0]))
    assert len(names) == 1


def test_reset_and_close_wait_for_every_game(stand_in):
    """The first is done at once, and its thread is free, while the second plays on."""
    others = set(threading.enumerate())
    env = MyWayHome(2, "cpu", num_threads=2)
    env.reset(0)
    stand_in.games[1].during = lambda: time.sleep(0.3)
    for end in (lambda: env.reset(0), env.close):
        env.send(torch.tensor([0, 0]))
        end()
    assert [len(game.played) for game in stand_in.games] == [2, 2]
    assert set(threading.enumerate()) <= others


def test_a_game_that_failed_is_told_and_the_next_reset_is_whole(stand_in):
    env = MyWayHome(2, "cpu", num_threads=2)
    first = env.reset(0)
    stand_in.games[0].running = False
    with pytest.raises(AssertionError, match="NotRunning"):
        env.step(torch.tensor([0, 0]))
    assert torch.equal(env.reset(0).obs, first.obs)


def test_threads_are_those_of_the_process(stand_in):
    assert MyWayHome(5, "cpu").num_threads == min(usable_cpus(), 5)
    assert MyWayHome(1, "cpu", num_threads=4).num_threads == 1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"colours": "blue"}, "colours is one of rgb, grey, got blue"),
        ({"height": 7}, r"height must lie in 8\.\.120"),
        ({"height": 121}, "got 121 and 84"),
        ({"width": 7}, r"width in 8\.\.160"),
        ({"width": 161}, "got 84 and 161"),
        ({"num_threads": -1}, "num_threads must be 0"),
    ],
)
def test_bad_knobs_are_refused_in_one_line(stand_in, knobs, words):
    with pytest.raises(UserError, match=words) as caught:
        MyWayHome(**{"num_envs": 2, "device": "cpu"} | knobs)
    assert "\n" not in str(caught.value)
    assert not stand_in.games


@pytest.mark.parametrize("job", ["train", "collect"])
def test_without_vizdoom_one_line_says_what_to_install(job, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    words = ["env=MyWayHome", "agent=random", *(["wandb=off", "runs_dir=runs"] if job == "train" else ["data=frames"])]
    assert launch.main([f"job={job}", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: env=MyWayHome: ViZDoom cannot be imported")
    assert 'pip install "reverie[vizdoom]"' in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_where_vizdoom_cannot_have_its_folder_one_line_says_so(stand_in):
    MyWayHome(1, "cpu")
    assert Path("_vizdoom").is_dir()  # games that start together do not meet at making it
    Path("_vizdoom").rmdir()
    Path("_vizdoom").touch()
    with pytest.raises(UserError, match="ViZDoom needs a folder _vizdoom where it runs"):
        MyWayHome(1, "cpu")


# On ViZDoom itself


@pytest.mark.parametrize("colours", ["rgb", "grey"])
def test_lanes_are_bare_games_with_the_scenarios_own_limit(colours, monkeypatch, tmp_path):
    """Pictures, rewards and ends of two lanes, through home and the limit, against games played by hand."""
    vizdoom = pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)
    env = MyWayHome(2, "cpu", colours, 60, 84)
    shown = play(env, LIMIT_STEPS + 10)
    env.close()
    assert not Path("_vizdoom.ini").exists()
    homes = limits = 0
    for lane in range(2):
        game = vizdoom.DoomGame()
        game.load_config("my_way_home.cfg")
        game.set_window_visible(False)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24 if colours == "rgb" else vizdoom.ScreenFormat.GRAY8)
        game.set_seed(lane_seed(SEED, lane))
        game.init()

        def picture(game=game) -> torch.Tensor:
            small = shrink(game.get_state().screen_buffer, 60, 84)
            return torch.from_numpy(small.reshape(60, 84, FORMATS[colours][0]).transpose(2, 0, 1).copy())

        assert torch.equal(shown[0].obs[lane], picture())
        for before, step, action in zip(shown, shown[1:], ACTIONS):
            reward = game.make_action(np.eye(5)[action[lane]].tolist(), 4)
            over, late = game.is_episode_finished(), game.is_episode_timeout_reached()
            homes, limits = homes + (over and not late), limits + late
            assert float(step.reward[lane]) == pytest.approx(reward, abs=1e-6)
            assert bool(step.last[lane]) == over
            assert float(step.discount[lane]) == (0 if over and not late else 1)
            if over and not late:
                assert torch.equal(step.next_obs[lane], before.obs[lane])
            if over:
                game.new_episode()
            assert torch.equal(step.obs[lane], picture())
        game.close()
    assert homes >= 1
    assert limits >= 1
