"""A stand-in for the module `vizdoom` where it is not installed: corridors that are walked with MOVE_FORWARD, by the calls of DoomGame."""

import random
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

BUTTONS = ("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_LEFT", "MOVE_RIGHT")
PLANES = {"CRCGCB": 3, "GRAY8": 1}


class FakeGame:
    """A game. Home lies `distance` frames of walking ahead, drawn for each episode, or the `distances` that a test wants, in turn.

    A frame pays the living reward, the one that reaches home 1 as well, and the next frame ends the game, as in My Way Home. A picture is
    four bands: the episode's mark, drawn; frames walked; frames played, and how many times 250 of them.
    """

    distances: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.during: Callable[[], object] = lambda: None  # called while an action is played
        self.settings: dict[str, Any] = {}
        self.running = False
        self.starts = self.episodes = 0
        self.played: list[tuple[int, int]] = []
        self._busy = threading.Lock()
        self._dice = random.Random()

    def load_config(self, path: str) -> bool:
        assert path == "/scenarios/my_way_home.cfg"
        self.settings |= {"timeout": 2100, "living_reward": -0.0001}
        return True

    def set_doom_config_path(self, path: str) -> None:
        self.settings["ini"] = path

    def set_window_visible(self, visible: bool) -> None:
        self.settings["window"] = visible

    def set_screen_resolution(self, resolution: str) -> None:
        self.settings["resolution"] = resolution

    def set_screen_format(self, screen: str) -> None:
        self.settings["format"] = screen

    def get_episode_timeout(self) -> int:
        return self.settings["timeout"]

    def set_episode_timeout(self, frames: int) -> None:
        self.settings["timeout"] = frames

    def get_available_buttons(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in BUTTONS]

    def set_seed(self, seed: int) -> None:
        assert 0 <= seed < 2**32
        assert not self._busy.locked(), "a game that plays is seeded"
        self.seed, self._dice = seed, random.Random(seed)

    def is_running(self) -> bool:
        return self.running

    def init(self) -> None:
        assert not self.running
        self.running, self.blocked = True, signal.pthread_sigmask(signal.SIG_BLOCK, [])
        self.starts += 1
        self._begin()

    def new_episode(self) -> None:
        assert self.running, "ViZDoomIsNotRunningException"
        self._begin()

    def _begin(self) -> None:
        self.mark, drawn = self._dice.randrange(256), self._dice.choice((30, 1000))
        self.distance = self.distances[self.episodes % len(self.distances)] if self.distances else drawn
        self.episodes += 1
        self.frames = self.walked = 0
        self._over = False

    def is_episode_finished(self) -> bool:
        return self._over or 0 < self.settings["timeout"] <= self.frames

    def make_action(self, action: list[float], tics: int) -> float:
        assert self.running, "ViZDoomIsNotRunningException"
        assert sorted(action) == [0] * (len(BUTTONS) - 1) + [1]
        assert self._busy.acquire(blocking=False), "two threads play one game"
        assert not self.is_episode_finished(), "an action without effect"
        self.played.append((action.index(1), tics))
        self.during()
        reward = 0.0
        for _ in range(tics):
            if not self.is_episode_finished():
                self._over = self.walked == self.distance
                self.frames += 1
                reward += self.settings["living_reward"]
                if action[BUTTONS.index("MOVE_FORWARD")] and not self._over:
                    self.walked += 1
                    reward += self.walked == self.distance
        self._busy.release()
        return reward

    def get_state(self) -> SimpleNamespace | None:
        if self.is_episode_finished():
            return None
        screen = np.zeros((PLANES[self.settings["format"]], 120, 160), np.uint8)
        screen[:, :] = np.repeat([self.mark, self.walked % 256, self.frames % 250, self.frames // 250], 30)[:, None]
        return SimpleNamespace(screen_buffer=screen[0] if len(screen) == 1 else screen)

    def close(self) -> None:
        assert not self._busy.locked(), "a game that plays is closed"
        self.running = False


class FakeViZDoom:
    """The module. `games` are those that were made, in order."""

    scenarios_path = "/scenarios"
    ScreenResolution = SimpleNamespace(RES_160X120="160x120")
    ScreenFormat = SimpleNamespace(**{name: name for name in PLANES})

    def __init__(self, distances: tuple[int, ...] = ()) -> None:
        self.games: list[FakeGame] = []
        self.distances = distances

    def DoomGame(self) -> FakeGame:
        self.games.append(FakeGame())
        self.games[-1].distances = self.distances
        return self.games[-1]
