"""Does speed cost learning? Frames to the same score on Catch in 84x84, beside Stable-Baselines3, in full and in half precision.

    python -m benchmarks.sb3_learning --sb3-python /path/to/venv/bin/python --out benchmarks/results/sb3_learning.json

Every run trains until the last 200 episodes score 0.9 on average (1 is perfect) or its budget is spent, with the settings that
`benchmarks.sb3_speed` times. Both sides play our own Catch, four frames stacked; the rival wears it as a
VecEnv. One thread a run; the figure is frames, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
EPISODES, SCORE = 200, 0.9
PIXELS_PER_CELL = 12
BUDGET = {"a3c": 400_000, "dqn": 60_000}
LANES = {"a3c": 16, "dqn": 8}
SIDES = ("sb3", "float32", "float16")
TARGET_FRAMES, LEARNING_STARTS = 2000, 800


class Scores:
    """Whether the last EPISODES episodes score SCORE on average."""

    def __init__(self, lanes: int) -> None:
        self._running, self._scores = torch.zeros(lanes), deque[float](maxlen=EPISODES)

    def add(self, reward: torch.Tensor, last: torch.Tensor) -> bool:
        """One step of all lanes, float32 (N) and bool (N)."""
        self._running += reward
        self._scores.extend(self._running[last].tolist())
        self._running[last] = 0
        return len(self._scores) == EPISODES and sum(self._scores) >= SCORE * EPISODES


def ours(name: str, precision: str, seed: int) -> int | None:
    """Frames to the score, or None where the budget was too small."""
    from agents.actor_critic import ActorCritic
    from agents.dqn import DQN
    from agents.loop import play
    from benchmarks.sb3_speed import OURS_DQN
    from envs.toy import Catch

    device = torch.device("cpu")
    torch.manual_seed(seed)
    env, scores = Catch(LANES[name], device, pixels_per_cell=PIXELS_PER_CELL), Scores(LANES[name])
    if name == "a3c":
        agent: ActorCritic | DQN = ActorCritic(env.spec, device, precision=precision)
    else:
        knobs = OURS_DQN | {"learning_starts_frames": LEARNING_STARTS, "update_frames": 4, "target_frames": TARGET_FRAMES}
        agent = DQN(env.spec, device, precision=precision, **knobs)
    for tick in play(env, agent, BUDGET[name], seed):
        if scores.add(tick.after.reward, tick.after.last):
            return tick.played
    return None


def rivals(name: str, seed: int, knobs: dict[str, Any]) -> int | None:
    """The same for Stable-Baselines3, which takes `knobs`; runs in its venv."""
    import numpy as np
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3 import A2C, DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

    from envs.toy import Catch

    class Worn(VecEnv):
        """Our Catch as a VecEnv."""

        def __init__(self) -> None:
            self.world = Catch(LANES[name], "cpu", pixels_per_cell=PIXELS_PER_CELL)
            channels, high, wide = self.world.spec.obs_shape
            super().__init__(LANES[name], Box(0, 255, (high, wide, channels), np.uint8), Discrete(self.world.spec.num_actions))

        def _pictures(self, obs: torch.Tensor) -> Any:
            return obs.permute(0, 2, 3, 1).numpy()

        def reset(self) -> Any:
            return self._pictures(self.world.reset(seed).obs)

        def step_async(self, actions: Any) -> None:
            self.world.send(torch.as_tensor(actions, dtype=torch.int64))

        def step_wait(self) -> Any:
            step = self.world.recv()
            infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            for lane in step.last.nonzero().flatten().tolist():
                ended = {"terminal_observation": self._pictures(step.next_obs)[lane], "TimeLimit.truncated": bool(step.discount[lane])}
                infos[lane] = ended
            return self._pictures(step.obs), step.reward.numpy(), step.last.numpy(), infos

        def close(self) -> None:
            pass

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [None] * self.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * self.num_envs

    class Until(BaseCallback):
        """Ends training at the score."""

        def __init__(self) -> None:
            super().__init__()
            self.scores, self.reached = Scores(LANES[name]), False

        def _on_step(self) -> bool:
            reward, last = torch.as_tensor(self.locals["rewards"]), torch.as_tensor(self.locals["dones"])
            self.reached = self.scores.add(reward, last)
            return not self.reached

    env = VecFrameStack(Worn(), 4)
    model = {"a3c": A2C, "dqn": DQN}[name]("CnnPolicy", env, seed=seed, device="cpu", **knobs)
    until = Until()
    model.learn(BUDGET[name], callback=until)
    return int(model.num_timesteps) if until.reached else None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints frames to the score, writes JSON with `--out`, and returns 1 where a median of ours is above twice the rival's, else 0."""
    parser = argparse.ArgumentParser(prog="sb3_learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sb3-python", help="the interpreter of a venv with stable-baselines3")
    parser.add_argument("--agents", nargs="+", default=list(BUDGET), choices=list(BUDGET))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        name, side, seed, knobs = arguments.serve
        torch.set_num_threads(1)
        print(json.dumps(rivals(name, int(seed), json.loads(knobs)) if side == "sb3" else ours(name, side, int(seed))))
        return 0
    if not arguments.sb3_python:
        parser.error("--sb3-python names the interpreter of a venv with stable-baselines3")
    from benchmarks.record import record
    from benchmarks.sb3_speed import RIVALS_DQN, SETTINGS

    rivals_knobs = {
        "a3c": SETTINGS["a3c"]["rival"],
        "dqn": RIVALS_DQN | {"learning_starts": LEARNING_STARTS, "target_update_interval": TARGET_FRAMES},
    }
    rows, one_thread = [], os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    for name in arguments.agents:
        for side in SIDES:
            frames = []
            for seed in range(arguments.seeds):
                python = arguments.sb3_python if side == "sb3" else sys.executable
                command = [python, "-m", "benchmarks.sb3_learning", "--serve", name, side, str(seed), json.dumps(rivals_knobs[name])]
                done = subprocess.run(command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, text=True, check=True)
                frames.append(json.loads(done.stdout.splitlines()[-1]))
            spent = [BUDGET[name] if count is None else count for count in frames]
            rows.append(
                {"agent": name, "side": side, "frames_to_score": frames, "median": statistics.median(spent), "budget": BUDGET[name]}
            )
            print(f"{name} {side:8s} {frames}", flush=True)
    record(arguments.out, "sb3_learning", argv, rows, ("torch", "numpy"), game="Catch 7x7 in 84x84", score=SCORE, episodes=EPISODES)
    medians = {(row["agent"], row["side"]): row["median"] for row in rows}
    return int(any(medians[name, side] > 2 * medians[name, "sb3"] for name, side in medians))


if __name__ == "__main__":
    raise SystemExit(main())
