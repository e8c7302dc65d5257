"""Steps a second of another first-person maze, as a process of its own environment; imports nothing of ours.

    python benchmarks/maze_rivals.py vizdoom|miniworld SECONDS

ViZDoom plays My Way Home in 160x120 RGB, its smallest, four tics a step; MiniWorld its Maze in 84x84 RGB, drawn by OpenGL.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def vizdoom_step() -> Callable[[], object]:
    import random

    import vizdoom

    game = vizdoom.DoomGame()
    game.load_config(str(Path(vizdoom.scenarios_path) / "my_way_home.cfg"))
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.init()
    count = game.get_available_buttons_size()
    actions = [[int(at == chosen) for at in range(count)] for chosen in range(count)]

    def step() -> object:
        if game.is_episode_finished():
            game.new_episode()
        picture = game.get_state().screen_buffer
        game.make_action(random.choice(actions), 4)
        return picture

    return step


def miniworld_step() -> Callable[[], object]:
    os.environ.setdefault("PYGLET_HEADLESS", "1")  # no display, EGL
    import gymnasium
    import miniworld  # noqa: F401  registers its worlds

    env = gymnasium.make("MiniWorld-Maze-v0", obs_width=84, obs_height=84)
    env.reset(seed=0)

    def step() -> object:
        picture, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
        return picture

    return step


def main() -> None:
    """Prints a line of JSON."""
    name, seconds = sys.argv[1], float(sys.argv[2])
    step = {"vizdoom": vizdoom_step, "miniworld": miniworld_step}[name]()
    for _ in range(50):
        step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    print(json.dumps({"steps_per_second": steps / (time.perf_counter() - began), "version": version(name)}))


if __name__ == "__main__":
    main()
