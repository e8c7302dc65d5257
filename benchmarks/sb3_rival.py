"""Stable-Baselines3, stock, as a worker of `benchmarks.sb3_speed`; runs in an environment of its own and imports nothing of ours.

Prints one JSON line of facts when it is ready; then, for each line of input (a number of agent steps), trains for at least so many and
prints {"steps": ..., "seconds": ..., "cpu_seconds": ...}.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import ale_py
import gymnasium
import torch
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack


def make(agent: str, game: str, num_envs: int, knobs: dict[str, Any]) -> BaseAlgorithm:
    """The algorithm with its defaults for Atari, but for `knobs`."""
    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env(f"{game}NoFrameskip-v4", n_envs=num_envs, seed=0), n_stack=4)
    kind = {"a3c": A2C, "dqn": DQN}[agent]
    return kind("CnnPolicy", env, seed=0, device="cpu", **knobs)


def main() -> None:
    agent, game, num_envs, knobs = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    model = make(agent, game, num_envs, knobs)
    packages = ("torch", "stable-baselines3", "ale-py", "gymnasium", "numpy", "opencv-python-headless")
    facts = {"python": platform.python_version(), "torch_threads": torch.get_num_threads(), **{name: version(name) for name in packages}}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        before, began, busy = model.num_timesteps, time.perf_counter(), time.process_time()
        model.learn(int(line), log_interval=None, reset_num_timesteps=False)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        print(json.dumps({"steps": model.num_timesteps - before, "seconds": seconds, "cpu_seconds": busy}), flush=True)


if __name__ == "__main__":
    main()
