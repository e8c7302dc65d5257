"""ViZDoom's My Way Home (Kempka et al. 2016, arXiv 1605.02097) behind the contract of worlds (`env=MyWayHome`, an optional extra)."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.api import Spec, Step, UserError, check_actions, first_step
from envs.area import shrink_planes
from envs.cpus import usable_cpus
from envs.seeds import lane_seed
from envs.transfer import Transfer

FRAMES_PER_STEP = 4
LEAST_SIDE, SCREEN_HEIGHT, SCREEN_WIDTH = 8, 120, 160
FORMATS = {"rgb": (3, "CRCGCB"), "grey": (1, "GRAY8")}  # channels, and ViZDoom's name for them


def _vizdoom() -> Any:
    """The library. UserError where it is not installed or does not load, or cannot have the folder that each of its games looks for."""
    try:
        import vizdoom
    except ImportError as trouble:
        raise UserError(f'env=MyWayHome: ViZDoom cannot be imported ({trouble}); pip install "reverie[vizdoom]"') from trouble
    try:
        Path("_vizdoom").mkdir(exist_ok=True)  # games that make it at the same time fail
    except OSError as trouble:
        raise UserError(f"env=MyWayHome: ViZDoom needs a folder _vizdoom where it runs ({trouble}); run where one can be made") from trouble
    return vizdoom


class MyWayHome:
    """ViZDoom's `my_way_home`: a maze of rooms seen by who walks it, and a green vest, always in the same place, that is home.

    Args:
        num_envs: lanes, at least 1. Each is a process of its own, of 20 MB, which the first `reset` starts in a third of a second.
        device: where the tensors of a Step land, in one copy.
        colours: rgb or grey.
        height, width: of the view, in pixels. ViZDoom draws 120 rows of 160, its smallest screen, which are shrunk by area.
        num_threads: games that go on at the same time; 0 for as many as processors may be used, never more than lanes.

    UserError on a bad knob, or without ViZDoom. The scenario's own are, from ViZDoom's file: the map; the places that an episode opens at,
    17, and any direction, both drawn; the buttons, of which an action holds one down for four of the game's 35 frames a second; the reward,
    raw, -0.0001 a frame and +1 at home; the limit of 2100 frames. What a reader should know:

    - Home ends an episode with discount 0, one frame after it has paid, if the limit leaves that frame: where it is the next step's, the
      reward comes a step before the end. ViZDoom has no picture of an episode that is over, so `next_obs` repeats the one before.
    - The limit is kept here, not by ViZDoom, so at it `next_obs` is the true picture; its discount is 1.
    - All follows from the seed, whatever was played before, and lanes do not depend on one another, nor on the number of threads.
    - Ctrl-C in a terminal and SIGTERM do not end the games, so that a run can save. After SIGKILL they sleep on, and SIGKILL ends them.
    - ViZDoom wants an empty folder `_vizdoom` where it runs, and gets it. A player's settings there (`_vizdoom.ini`) are left alone.
    """

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        colours: str = "rgb",
        height: int = 84,
        width: int = 84,
        num_threads: int = 0,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        if colours not in FORMATS:
            raise UserError(f"colours is one of {', '.join(FORMATS)}, got {colours}")
        if not (LEAST_SIDE <= height <= SCREEN_HEIGHT and LEAST_SIDE <= width <= SCREEN_WIDTH):
            limits = f"{LEAST_SIDE}..{SCREEN_HEIGHT} and width in {LEAST_SIDE}..{SCREEN_WIDTH} pixels"
            raise UserError(f"height must lie in {limits}, got {height} and {width}")
        if num_threads < 0:
            raise UserError(f"num_threads must be 0 (all usable processors) or more, got {num_threads}")
        library, (channels, screen) = _vizdoom(), FORMATS[colours]
        self.num_envs = num_envs
        self.num_threads = min(num_threads or usable_cpus(), num_envs)
        self._lanes = [_Lane(library, screen, height, width) for _ in range(num_envs)]
        names = self._lanes[0].buttons
        self.spec = Spec("MyWayHome", len(names), names, (channels, height, width), FRAMES_PER_STEP)
        self._transfer = Transfer(device)
        games_ignore = {signal.SIGINT, signal.SIGTERM}  # a process inherits what the thread that starts it blocks
        self._pool = ThreadPoolExecutor(self.num_threads, "doom", signal.pthread_sigmask, (signal.SIG_BLOCK, games_ignore))
        self._pending: list[Future[_Moment]] = []
        self._open = self._closed = False

    def reset(self, seed: int) -> Step:
        """Starts every lane anew, each with a seed of its own that hashes (seed, lane). Drains a pending send."""
        if self._closed:
            raise RuntimeError(f"{self.spec.name} is closed")
        self._drain()
        seeds = [lane_seed(seed, lane) for lane in range(self.num_envs)]
        (obs,) = self._transfer(np.stack(list(self._pool.map(_Lane.open, self._lanes, seeds))))
        self._open = True
        return first_step(obs)

    def send(self, action: Tensor) -> None:
        """Takes int64 (N) actions on any device and returns at once. ValueError where one is out of range."""
        if not self._open or self._pending:
            raise RuntimeError("send comes after reset or recv")
        action = action.cpu()
        check_actions(action, self.num_envs, self.spec.num_actions)
        self._pending = [self._pool.submit(lane.step, button) for lane, button in zip(self._lanes, action.tolist())]

    def recv(self) -> Step:
        """Waits for the step that `send` began, and for the openings of the lanes that it ended."""
        if not self._pending:
            raise RuntimeError("recv comes after send")
        moments = [moment.result() for moment in self._drain()]
        obs, reward, home, last, seen = (np.array(field) for field in zip(*moments))
        arrays = obs, reward.astype(np.float32), 1 - home.astype(np.float32), last
        if not last.any():
            pixels, *rest = self._transfer(*arrays)
            return Step(pixels, rest[0], rest[1], rest[2], pixels)
        pixels, *rest, following = self._transfer(*arrays, seen)
        return Step(pixels, rest[0], rest[1], rest[2], following)

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Ends the games and the threads. Twice is harmless."""
        self._drain()
        self._open, self._closed = False, True
        self._pool.shutdown()
        for lane in self._lanes:
            lane.close()

    def _drain(self) -> list[Future[_Moment]]:
        """The lanes' parts of the step that was pending, all done."""
        pending, self._pending = self._pending, []
        wait(pending)
        return pending


class _Moment(NamedTuple):
    """What one lane shows after one step.

    Attributes:
        obs: uint8 (C, H, W), what to act on next.
        reward: raw.
        home: the game is over.
        last: the episode is, by this or by the limit.
        next_obs: uint8 (C, H, W), the successor.
    """

    obs: np.ndarray
    reward: float
    home: bool
    last: bool
    next_obs: np.ndarray


class _Lane:
    """One game."""

    def __init__(self, vizdoom: Any, screen: str, height: int, width: int) -> None:
        self._size, self._game = (height, width), vizdoom.DoomGame()
        self._game.load_config(str(Path(vizdoom.scenarios_path) / "my_way_home.cfg"))
        self._game.set_doom_config_path(os.devnull)
        self._game.set_window_visible(False)
        self._game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        self._game.set_screen_format(getattr(vizdoom.ScreenFormat, screen))
        self._limit_frames = self._game.get_episode_timeout()
        self._game.set_episode_timeout(0)
        self.buttons = tuple(button.name for button in self._game.get_available_buttons())
        self._actions = np.eye(len(self.buttons)).tolist()

    def open(self, seed: int) -> np.ndarray:
        """Opens the first of the episodes that follow from the seed: uint8 (C, H, W)."""
        self._game.set_seed(seed)
        if self._game.is_running():
            self._game.new_episode()
        else:
            self._game.init()
        self._frames, self._obs = 0, self._picture()
        return self._obs

    def step(self, action: int) -> _Moment:
        """Plays four frames, fewer where the game ends, and opens the next episode where this one is over."""
        reward = self._game.make_action(self._actions[action], FRAMES_PER_STEP)
        self._frames += FRAMES_PER_STEP
        home = self._game.is_episode_finished()
        seen = self._obs if home else self._picture()
        last = home or self._frames >= self._limit_frames
        if last:
            self._game.new_episode()
            self._frames = 0
        self._obs = self._picture() if last else seen
        return _Moment(self._obs, reward, home, last, seen)

    def close(self) -> None:
        """Ends the game's process."""
        self._game.close()

    def _picture(self) -> np.ndarray:
        """uint8 (C, H, W) of the moment."""
        screen = self._game.get_state().screen_buffer
        return shrink_planes(screen.reshape(-1, SCREEN_HEIGHT, SCREEN_WIDTH), *self._size)
