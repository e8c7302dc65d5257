"""A stand-in for the module `envpool` where it is not installed: small scripted games with its calls, its autoreset and its rows."""

from types import SimpleNamespace
from typing import Any

import numpy as np

STEPS_TO_A_LIFE = 3
STEPS_TO_A_GIFT = 5
"""After which a game gives two lives, once."""
STEPS_TO_THE_END = {0: 7, 1: 4}
"""Of a lane, by its index modulo 2: how many steps its games last."""


class FakePool:
    """Lanes that count. A picture holds (lane seed, episode, step of the episode) in its first three pixels; step t pays 10 * t."""

    def __init__(self, task: str, **knobs: Any) -> None:
        self.task, self.knobs = task, knobs
        lanes = knobs["num_envs"]
        self.action_space = SimpleNamespace(n=18 if knobs["full_action_space"] else 6)
        self.shape = (1 if knobs["gray_scale"] else 3, knobs["img_height"], knobs["img_width"])
        self.episode, self.steps, self.done = np.full(lanes, -1), np.zeros(lanes, int), np.ones(lanes, bool)
        self.queue: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.openings = [0] * lanes

    def send(self, action: np.ndarray) -> None:
        assert not self.queue, "the batch is asked for twice"
        assert action.dtype == np.int32
        assert ((action >= 0) & (action < self.action_space.n)).all(), "out of range"
        self.queue.append((np.arange(self.knobs["num_envs"]), action))

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        ids, _ = self.queue.pop(0)
        reward = np.zeros(len(ids), np.float32)
        for row, lane in enumerate(ids):
            if self.done[lane]:  # NEXT_STEP: the action is not played
                self._open(lane)
                continue
            self.steps[lane] += 1
            reward[row] = 10 * self.steps[lane]
            self.done[lane] = self.steps[lane] == STEPS_TO_THE_END[lane % 2]
        obs, info = self._shown(ids)
        return obs, reward, self.done[ids].copy(), np.zeros(len(ids), bool), info

    def reset(self, env_id: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        assert not self.queue, "a reset among unread steps"
        ids = np.arange(self.knobs["num_envs"]) if env_id is None else env_id
        for lane in ids:
            self._open(lane)
        return self._shown(ids)

    def _open(self, lane: int) -> None:
        self.episode[lane] += 1
        self.steps[lane], self.done[lane] = 0, False
        self.openings[lane] += 1

    def _shown(self, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        obs = np.zeros((len(ids), *self.shape), np.uint8)
        for row, lane in enumerate(ids):
            obs[row, 0, 0, :3] = self.knobs["seed"][lane] % 251, self.episode[lane], self.steps[lane]
        lives = 3 - self.steps[ids] // STEPS_TO_A_LIFE + 2 * (self.steps[ids] >= STEPS_TO_A_GIFT)
        return obs, {"lives": lives, "env_id": ids}


class FakeEnvPool:
    """The module. `pools` are those that were made, in order."""

    def __init__(self) -> None:
        self.pools: list[FakePool] = []

    def make_gymnasium(self, task: str, **knobs: Any) -> FakePool:
        self.pools.append(FakePool(task, **knobs))
        return self.pools[-1]
