"""Labyrinths as Gymnasium's own: its checker finds nothing, and both forms play what the world plays."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs.api import UserError
from envs.labyrinth.gym import LabyrinthEnv
from envs.labyrinth.level import level_names
from envs.labyrinth.registration import register_levels

register_levels()


@pytest.mark.parametrize("level", level_names())
def test_gymnasiums_checker_finds_nothing(level):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(f"reverie/{level}-v0", render_mode="rgb_array", height=16, width=16).unwrapped)


def test_knobs_pass_and_pictures_come_back():
    env = gymnasium.make("reverie/NavMaze-v0", render_mode="rgb_array", size=7, colours="grey", height=20, width=24)
    view, _ = env.reset(seed=3)
    assert view.shape == (20, 24, 1)
    assert view in env.observation_space
    assert env.render().shape == (20, 24 + 20, 3)
    assert np.array_equal(env.render()[:, :24], np.repeat(view, 3, 2))
    again, _ = env.reset(seed=3)
    assert np.array_equal(view, again)
    other, _ = env.reset()
    assert not np.array_equal(view, other)
    env.close()


def test_an_episode_ends_as_the_task_does_and_one_lane_is_the_first_of_many():
    single = gymnasium.make("reverie/ShortDoubleTMaze-v0", height=8, width=8)
    many = gymnasium.make_vec("reverie/ShortDoubleTMaze-v0", num_envs=3, height=8, width=8)
    view, _ = single.reset(seed=5)
    views, _ = many.reset(seed=5)
    assert np.array_equal(view, views[0])
    torch.manual_seed(0)
    for t in range(1, 901):
        actions = torch.randint(8, (3,)).numpy()
        view, reward, terminated, truncated, _ = single.step(actions[0])
        views, rewards, ended, cut, infos = many.step(actions)
        assert (reward, terminated, truncated) == (rewards[0], ended[0], cut[0])
        assert ended.tolist() == [t == 900] * 3
        assert not cut.any()
        assert np.array_equal(view, infos["final_obs"][0] if t == 900 else views[0])
    assert infos["_final_obs"].all()
    assert not np.array_equal(infos["final_obs"][0], views[0])
    many.close()


def test_what_is_no_action_or_mode_is_refused():
    single = gymnasium.make("reverie/Forage-v0", height=8, width=8).unwrapped
    many = gymnasium.make_vec("reverie/Forage-v0", num_envs=2, height=8, width=8)
    single.reset(seed=0)
    many.reset(seed=0)
    for action in (8, -1, 1.7, "2", None):
        with pytest.raises(ValueError, match="a whole number from 0 to 7"):
            single.step(action)
    for actions in ([0.5, 1.5], [0, 8], [0], ["0", "1"], [0, None]):
        with pytest.raises(ValueError, match="actions"):
            many.step(actions)
    with pytest.raises(UserError, match="render_mode is rgb_array or None, got ansi"):
        LabyrinthEnv("ansi")
    many.close()


def test_installing_tells_gymnasium_of_the_levels():
    from importlib.metadata import entry_points

    found = [entry.value for entry in entry_points(group="gymnasium.envs")]
    assert "envs.labyrinth.registration:register_levels" in found
