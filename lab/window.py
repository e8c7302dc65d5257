"""What happened between two rows of metrics."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from agents.loop import Seconds, Tick
from envs.stats import EpisodeStats


class Window:
    """Listens to the ticks of one iteration and makes a row of metrics of what came since the row before.

    A row holds the raw returns of training episodes that ended, frames per second, the shares of wall time that each part
    took (0..1, `time/log` is what the listeners took), the process's memory, and what the agent reported last.
    """

    def __init__(self, num_envs: int, frames_per_step: int, device: torch.device) -> None:
        self._stats = EpisodeStats(num_envs, frames_per_step, device)
        self._frames_per_tick = num_envs * frames_per_step
        self._agent: dict[str, Any] = {}
        self._process = psutil.Process()
        self._ticks = 0
        self._lanes_done: set[int] = set()
        self._num_envs = num_envs
        self._seconds = [0.0] * len(Seconds._fields)
        self._began = time.perf_counter()

    def add(self, tick: Tick) -> None:
        """Takes in one tick."""
        self._stats.update(tick.after)
        self._ticks += 1
        self._seconds = [total + part for total, part in zip(self._seconds, tick.seconds)]
        if tick.metrics:
            self._agent = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in tick.metrics.items()}

    def row(self) -> tuple[dict[str, Any], list[float]]:
        """The row since the last call, and the returns in it; the next window begins."""
        finished = self._stats.drain()
        returns = [episode.episode_return for episode in finished]
        self._lanes_done |= {episode.lane for episode in finished}
        wall = time.perf_counter() - self._began
        row: dict[str, Any] = {"train/episodes": len(finished)}
        if finished:
            row["train/return_mean"] = sum(returns) / len(returns)
            row["train/return_min"], row["train/return_max"] = min(returns), max(returns)
            row["train/length_frames_mean"] = sum(episode.length_frames for episode in finished) / len(finished)
        row |= self._agent
        row["speed/frames_per_second"] = self._ticks * self._frames_per_tick / wall
        row |= {f"time/{name}": seconds / wall for name, seconds in zip(Seconds._fields, self._seconds)}
        row["time/log"] = max(0.0, 1 - sum(self._seconds) / wall)
        row["memory/process_bytes"] = self._process.memory_info().rss
        self._restart()
        return row, returns

    def lanes_without_episode(self) -> int:
        """How many lanes have finished no episode in any row so far."""
        return self._num_envs - len(self._lanes_done)

    def _restart(self) -> None:
        self._began = time.perf_counter()
        self._seconds = [0.0] * len(Seconds._fields)
        self._ticks = 0
