"""Atari 2600 games by EnvPool, the second backend behind the contract of worlds (`env.backend=envpool`, an optional extra)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.api import Step, UserError, check_actions, first_step
from envs.atari import Emulator, rom_id
from envs.cpus import usable_cpus
from envs.protocols import Protocol
from envs.seeds import lane_seed
from envs.transfer import Transfer

_UNLIMITED = 2**30  # EnvPool adds one to its limit, so not the largest int


def _envpool() -> Any:
    """The library, imported when it is first needed: that takes seconds. UserError where it is not installed or does not load."""
    try:
        import envpool
    except ImportError as trouble:
        advice = 'pip install "reverie[envpool]", or use env.backend=ale'
        raise UserError(f"env.backend=envpool: EnvPool cannot be imported ({trouble}); {advice}") from trouble
    return envpool


def task_id(game: str) -> str:
    """EnvPool's name of `game`, a key of `envs.atari.GAMES`. UserError with the nearest names where there is none."""
    return "".join(word.capitalize() for word in rom_id(game).split("_")) + "-v5"


class EnvPoolAtari:
    """N games of one kind behind `envs.api.VectorEnv`, as `envs.atari.AtariEnv`, by EnvPool (Weng et al. 2022, arXiv 2206.10558).

    Args:
        game: a key of `envs.atari.GAMES`, such as "MsPacman".
        num_envs: lanes, at least 1.
        device: where the tensors of a Step land, in one copy.
        protocol: all knobs of the environment are kept: sticky actions, no-ops, lives, action set, frame skip, time limit. Its evaluation_*
            fields are not read here. A life lost on the very step of the time limit counts as lost: discount 0.
        obs: "grey84" (1, 84, 84), "grey42" (1, 42, 42), "rgb64" (3, 64, 64) or "rgb210x160" (3, 210, 160).
        num_threads: emulator threads; 0 for as many as the process may use (affinity and container quota), never more than lanes.

    UserError on a bad knob, or without EnvPool. Lane seeds are those of AtariEnv (`envs.seeds.lane_seed`); a run is a function of the seed
    alone, not of the number of threads. Cartridges, pictures (shrunk by area), raw rewards, lives and sticky actions are those of ale-py
    to the last bit. What differs from AtariEnv:

    - Openings: EnvPool plays one no-op frame more, 1 .. noop_max instead of 0 .. noop_max - 1. With `fire_reset`, FIRE comes after the
      no-ops, in the place of the last, and not before them. So the same seed gives another game than AtariEnv's.
    - At a game's own end `next_obs` is the true picture where the game ended on a step's last frame, the last frame alone where it ended on
      the one before, and the observation before where it ended earlier. Nothing is bootstrapped there.
    - EnvPool resets a lane on the step after its end (NEXT_STEP). `recv` resets the lanes that ended, at their end or their time limit, and
      no others, and waits for them: the extra step is not seen, but these lanes' no-ops are played while nothing else is.
    - Seeds are given to EnvPool when it is built, so every `reset` builds the lanes anew: about a tenth of a second of one core a lane.
    - There is no `lane_seed` to replay a lane by: `envs.atari.Emulator` knows ale-py's openings only.
    - Colour is contiguous, not channels_last.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        device: torch.device | str,
        protocol: Protocol,
        obs: str = "grey84",
        num_threads: int = 0,
    ) -> None:
        task = task_id(game)
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        if num_threads < 0:
            raise UserError(f"num_threads must be 0 (all usable processors) or more, got {num_threads}")
        self.num_envs = num_envs
        self.protocol = protocol
        self.num_threads = min(num_threads or usable_cpus(), num_envs)
        self._make, self._task = _envpool().make_gymnasium, task
        self.spec = Emulator(game, protocol, obs).spec  # EnvPool counts its actions but does not name them
        channels, height, width = self.spec.obs_shape
        self._knobs: dict[str, Any] = {
            "num_envs": num_envs,
            "batch_size": 0,  # all lanes step together
            "num_threads": self.num_threads,
            "thread_affinity_offset": -1,
            "max_episode_steps": _UNLIMITED,  # the time limit is kept here
            "stack_num": 1,
            "frame_skip": protocol.frame_skip,
            "noop_max": protocol.noop_max,
            "use_fire_reset": protocol.fire_reset,
            "episodic_life": False,
            "zero_discount_on_life_loss": False,
            "reward_clip": False,
            "img_height": height,
            "img_width": width,
            "gray_scale": channels == 1,
            "use_inter_area_resize": True,
            "full_action_space": protocol.full_action_set,
            "repeat_action_probability": protocol.sticky,
        }
        self._transfer = Transfer(device)
        self._limit_steps = protocol.max_episode_frames // protocol.frame_skip
        self._pool: Any = None
        self._pending = self._closed = False
        self._lives = self._steps = np.zeros(0, np.int64)  # empty until the first reset

    def reset(self, seed: int) -> Step:
        """Builds every lane anew, each with a seed of its own that hashes (seed, lane). Drops a pending send."""
        self._open()
        self._pool, self._pending = None, False  # the old threads end before new ones start
        seeds = [lane_seed(seed, lane) for lane in range(self.num_envs)]
        self._pool = self._make(self._task, seed=seeds, **self._knobs)
        assert self._pool.action_space.n == self.spec.num_actions, f"EnvPool has {self._pool.action_space.n} actions in {self.spec.name}"
        obs, info = self._pool.reset()
        self._lives, self._steps = info["lives"], np.zeros(self.num_envs, np.int64)
        (shown,) = self._transfer(obs)
        return first_step(shown)

    def send(self, action: Tensor) -> None:
        """Takes int64 (num_envs) actions on any device and returns at once. ValueError where one is out of range."""
        self._open()
        if self._pending or self._pool is None:
            raise RuntimeError("send comes after reset or recv")
        action = action.cpu()
        check_actions(action, self.num_envs, self.spec.num_actions)
        self._pool.send(action.numpy().astype(np.int32))
        self._pending = True

    def recv(self) -> Step:
        """Waits for the step that `send` began, and for the openings of the lanes that it ended."""
        self._open()
        if not self._pending:
            raise RuntimeError("recv comes after send")
        self._pending = False
        obs, points, terminated, _, info = self._pool.recv()
        lives = info["lives"]
        self._steps += 1
        last = terminated | (self._steps >= self._limit_steps)
        discount = 1 - terminated.astype(np.float32)
        if self.protocol.life_loss:
            discount[lives < self._lives] = 0
        reward = points.astype(np.float32)
        self._lives = lives
        if not last.any():
            pixels, *rest = self._transfer(obs, reward, discount, last)
            return Step(pixels, rest[0], rest[1], rest[2], pixels)
        ended = np.flatnonzero(last).astype(np.int32)
        opening, info = self._pool.reset(ended)
        successor, obs = obs, obs.copy()
        obs[ended] = opening
        self._lives[ended] = info["lives"]
        self._steps[ended] = 0
        pixels, *rest, following = self._transfer(obs, reward, discount, last, successor)
        return Step(pixels, rest[0], rest[1], rest[2], following)

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Ends the emulators and their threads. Twice is harmless."""
        self._pool, self._pending, self._closed = None, False, True

    def _open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.spec.name} is closed")
