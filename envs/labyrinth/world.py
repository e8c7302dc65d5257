"""Labyrinths behind the contract of worlds: all lanes advance together, on threads of the processor or on CUDA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.api import Spec, Step, UserError, check_actions, first_step
from envs.cpus import usable_cpus
from envs.labyrinth import textures
from envs.labyrinth.lanes import Engine, Threads
from envs.labyrinth.level import load_level
from envs.labyrinth.overview import overview
from envs.labyrinth.physics import ACTIONS, FRAMES_PER_SECOND, FRAMES_PER_STEP, Lanes
from envs.seeds import lane_seed

LEAST_SIDE, MOST_SIDE = 8, 1024
CHANNELS = {"rgb": 3, "grey": 1}


class Labyrinth:
    """First-person views of a level, 84x84 unless said otherwise; 60 frames a second, four a step.

    The clock is part of the task: an episode ends with discount 0 when its time is up. All that is random follows from the seed, and lanes
    do not depend on one another, nor on the number of threads. On CUDA lanes live on the card, and pictures are never copied.

    Args:
        num_envs: lanes.
        device: where tensors lie.
        level: a name in envs/labyrinth/levels, or the path of a .toml file (`envs.labyrinth.level`).
        colours: rgb or grey.
        height, width: of the view, in pixels.
        field_of_view: from the left edge to the right, in degrees.
        size: rows and columns of a maze, odd; None for the level's own.
        num_threads: 0 for as many as the process may use.

    UserError on a bad knob.
    """

    steps_per_second = FRAMES_PER_SECOND // FRAMES_PER_STEP

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        level: str = "Forage",
        colours: str = "rgb",
        height: int = 84,
        width: int = 84,
        field_of_view: float = 90.0,
        size: int | None = None,
        num_threads: int = 0,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        if colours not in CHANNELS:
            raise UserError(f"colours is one of {', '.join(CHANNELS)}, got {colours}")
        if not (LEAST_SIDE <= height <= MOST_SIDE and LEAST_SIDE <= width <= MOST_SIDE):
            raise UserError(f"height and width must lie in {LEAST_SIDE}..{MOST_SIDE} pixels, got {height} and {width}")
        if not 10 <= field_of_view <= 150:
            raise UserError(f"field_of_view must lie in 10..150 degrees, got {field_of_view}")
        if num_threads < 0:
            raise UserError(f"num_threads must be 0 (all usable processors) or more, got {num_threads}")
        self.level, self.num_envs = load_level(level, size), num_envs
        self.num_threads = min(num_threads or usable_cpus(), num_envs)
        grey, channels = colours == "grey", CHANNELS[colours]
        self.spec = Spec(self.level.name, len(ACTIONS), ACTIONS, (channels, height, width), FRAMES_PER_STEP)
        focal = 0.5 * width / math.tan(math.radians(field_of_view) / 2)
        pictures = textures.walls(grey), textures.floor(grey), textures.sky(grey), textures.things(grey)
        given: tuple[Any, ...] = self.level.rules, num_envs, (height, width, channels), focal, pictures
        if torch.device(device).type == "cuda":
            from envs.labyrinth.card import Card

            self._engine: Engine = Card(torch.device(device), *given)
        else:
            self._engine = Threads(self.num_threads, *given)
        self._open = self._pending = False

    @property
    def lanes(self) -> Lanes:
        """The lanes' state, on the host; to be looked at between steps."""
        return self._engine.lanes()

    def overview(self, lane: int) -> np.ndarray:
        """uint8 (H, H, 3): a lane's map from above, as high as the view, for videos and people."""
        return overview(self.lanes, lane, self.spec.obs_shape[1])

    def reset(self, seed: int) -> Step:
        """Starts every lane anew. Drains a pending send."""
        if self._pending:
            self._engine.result()
        obs = self._engine.start([lane_seed(seed, lane) for lane in range(self.num_envs)])
        self._open, self._pending = True, False
        return first_step(_channels_first(obs))

    def send(self, action: Tensor) -> None:
        """Takes int64 (N) actions on any device; the lanes move while nobody waits. ValueError where one is out of range."""
        if not self._open or self._pending:
            raise RuntimeError("send comes after reset or recv")
        check_actions(action, self.num_envs, self.spec.num_actions)
        self._engine.play(action)
        self._pending = True

    def recv(self) -> Step:
        """Waits for the step that `send` began."""
        if not self._pending:
            raise RuntimeError("recv comes after send")
        self._pending = False
        obs, reward, last, seen = self._engine.result()
        discount, obs = 1 - last.float(), _channels_first(obs)
        return Step(obs, reward, discount, last, obs if seen is None else _channels_first(seen))

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Ends the threads. Twice is harmless."""
        if self._pending:
            self._engine.result()
        self._open = self._pending = False
        self._engine.close()


def _channels_first(pictures: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view."""
    return pictures.permute(0, 3, 1, 2)
