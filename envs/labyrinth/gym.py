"""Labyrinths for whoever has Gymnasium alone: gymnasium.make("reverie/Forage-v0"), and make_vec. Installing the project registers them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.api import Step, UserError
from envs.labyrinth.world import Labyrinth


class LabyrinthEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One lane. Observations uint8 (H, W, C); `render` shows the view with the map beside it.

    Args:
        render_mode: rgb_array or None.
        knobs: of `envs.labyrinth.world.Labyrinth`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": Labyrinth.steps_per_second}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **knobs: Any) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode is rgb_array or None, got {render_mode}")
        self.world, self.render_mode = Labyrinth(1, "cpu", num_threads=1, **knobs), render_mode
        self.observation_space, self.action_space = _spaces(self.world)
        self._view = np.zeros(self.observation_space.shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._view = _pictures(self.world.reset(int(self.np_random.integers(2**31))).obs)[0]
        return self._view, {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"an action is a whole number from 0 to {self.world.spec.num_actions - 1}, got {action!r}")
        after = self.world.step(torch.tensor([int(action)]))
        self._view = _pictures(after.next_obs)[0]
        terminated, truncated = (bool(flag[0]) for flag in _ends(after))
        return self._view, float(after.reward), terminated, truncated, {}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        view = np.broadcast_to(self._view, (*self._view.shape[:2], 3))
        return np.concatenate([view, self.world.overview(0)], 1)

    def close(self) -> None:
        self.world.close()


class LabyrinthVectorEnv(VectorEnv):
    """Many lanes in one array. A lane that ends is reset within the step, and its last picture stands in info["final_obs"]."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": Labyrinth.steps_per_second}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, **knobs: Any) -> None:
        self.world, self.num_envs = Labyrinth(num_envs, "cpu", **knobs), num_envs
        self.single_observation_space, self.single_action_space = _spaces(self.world)
        self.observation_space, self.action_space = (
            batch_space(space, num_envs) for space in (self.single_observation_space, self.single_action_space)
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return _pictures(self.world.reset(int(self.np_random.integers(2**31))).obs), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu":
            raise ValueError(f"actions are whole numbers, got {actions.dtype}")
        after = self.world.step(torch.from_numpy(actions.astype(np.int64)))
        terminated, truncated = _ends(after)
        info: dict[str, Any] = {}
        if after.next_obs is not after.obs:
            ended = terminated | truncated
            final = np.full(self.num_envs, None, object)
            for lane in ended.nonzero()[0]:
                final[lane] = _pictures(after.next_obs)[lane]
            info = {"final_obs": final, "_final_obs": ended}
        return _pictures(after.obs), after.reward.numpy().astype(np.float64), terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        self.world.close()


def _spaces(world: Labyrinth) -> tuple[Box, Discrete]:
    channels, height, width = world.spec.obs_shape
    return Box(0, 255, (height, width, channels), np.uint8), Discrete(world.spec.num_actions)


def _pictures(obs: torch.Tensor) -> np.ndarray:
    """uint8 (N, H, W, C), a copy of one's own."""
    return obs.permute(0, 2, 3, 1).numpy().copy()


def _ends(after: Step) -> tuple[np.ndarray, np.ndarray]:
    """bool (N): terminated, truncated."""
    over = after.discount.numpy() == 0
    return after.last.numpy() & over, after.last.numpy() & ~over
