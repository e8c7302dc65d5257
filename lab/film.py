"""Films one lane's first episode: Atari in colour by replaying the lane's actions in one emulator, where its backend is ale-py; all else as
the agent sees it, beside a map where the world has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from agents.loop import Tick
from envs.api import VectorEnv
from envs.stats import write_mp4

ATARI_FPS = 30
OTHER_FPS = 8
MOST_STEPS = 2700  # three minutes of Atari play at action repeat 4
SMALL_SIDE = 420


class Film:
    """Watches ticks from a reset on, and writes what lane 0 did until its first episode ended.

    Args:
        env: the environment that is watched.
        seed: that it was reset with.
    """

    def __init__(self, env: VectorEnv, seed: int) -> None:
        self._env, self._seed = env, seed
        self._actions: list[torch.Tensor] = []
        self._pictures: list[torch.Tensor] = []
        self._maps: list[np.ndarray] = []
        self._ended = False
        self._replays = hasattr(env, "lane_seed")
        self._fps = ATARI_FPS if hasattr(env, "protocol") else getattr(env, "steps_per_second", OTHER_FPS)

    def watch(self, tick: Tick) -> None:
        """Takes in one tick; cheap."""
        if self._ended or len(self._actions) >= MOST_STEPS:
            return
        self._actions.append(tick.decision.action[0])
        if not self._replays:
            if not self._pictures:
                self._pictures.append(tick.step.obs[0].clone())
            self._pictures.append(tick.after.next_obs[0].clone())  # a view would keep all lanes
        if tick.after.next_obs is not tick.after.obs:
            self._ended = bool(tick.after.last[0])
        if hasattr(self._env, "overview") and not self._ended:
            self._maps.append(self._env.overview(0))

    def write(self, path: Path) -> None:
        """Writes an mp4 that browsers play; Atari, with a picture every fourth of 60 frames a second, runs twice as fast as life."""
        if not self._actions:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = self._replayed() if self._replays else self._seen()
        side = max(pictures[0].shape[:2])
        write_mp4(path, pictures, fps=self._fps, scale=max(1, SMALL_SIDE // side))

    def _seen(self) -> list[np.ndarray]:
        """What the agent saw, beside the map of that moment; the first and the last picture, which have none, beside their neighbour's."""
        views = [as_rgb(picture) for picture in self._pictures]
        if not self._maps:
            return views
        maps = [self._maps[0], *self._maps, *self._maps[-1:]]
        return [np.concatenate(pair, 1) for pair in zip(views, maps)]

    def _replayed(self) -> list[np.ndarray]:
        from envs.atari import Emulator

        env = self._env
        emulator = Emulator(env.spec.name, env.protocol)  # type: ignore[attr-defined]
        actions = torch.stack(self._actions).tolist()
        return [moment.rgb for moment in emulator.replay(env.lane_seed(self._seed, 0), actions)]  # type: ignore[attr-defined]


def as_rgb(picture: torch.Tensor) -> np.ndarray:
    """uint8 (C, H, W), C of 1 or 3 -> uint8 (H, W, 3) on the host."""
    channels_last = picture.permute(1, 2, 0).expand(-1, -1, 3) if picture.shape[0] == 1 else picture.permute(1, 2, 0)
    return channels_last.contiguous().cpu().numpy()
