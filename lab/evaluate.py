"""Evaluation: episodes without learning. As part of training, and as `python launch.py job=evaluate run=runs/NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from agents.api import Agent
from agents.loop import evaluate
from envs.api import UserError, VectorEnv
from envs.stats import EpisodeStats
from lab import checkpoint
from lab.configure import plain
from lab.film import Film
from lab.folder import check_fingerprint, find_folder, read_config
from lab.logging import EvaluationLog
from lab.protocols import human_normalised, mean_interval
from lab.run import derive_seed, forked_seed, make_agent, make_env, make_protocol, pick_device


def evaluate_agent(
    cfg: Mapping[str, Any],
    env: VectorEnv,
    agent: Agent,
    device: torch.device,
    frames: int,
    iteration: int,
    video: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Plays `evaluation.episodes_per_lane` episodes in each of `evaluation.num_envs` lanes and leaves all random states as they were.

    Args:
        env: made by `make_env(cfg, evaluation.num_envs, device, for_evaluation=True)`.
        frames: environment frames that the agent has trained for, stamped on every row.
        video: where to film the first lane's first episode, or None.
        stopping: asked after every step; where it says True, the evaluation ends there without a result.

    Returns:
        One row an episode, with the columns of evaluation.csv; none where it was stopped.
    """
    quota = cfg["evaluation"]["episodes_per_lane"]
    protocol = make_protocol(cfg, for_evaluation=True)
    epsilon = cfg["evaluation"].get("epsilon")
    if epsilon is None:
        epsilon = protocol.evaluation_epsilon if protocol else 0.0
    stamp = protocol.name if protocol else "none"
    seed = derive_seed(cfg["seed"], iteration, "evaluation")
    rows: list[dict[str, Any]] = []
    finished = [0] * env.num_envs
    with forked_seed(seed):
        stats = EpisodeStats(env.num_envs, env.spec.frames_per_step, device)
        film = Film(env, seed) if video else None
        for tick in evaluate(env, agent, quota, seed, epsilon):
            stats.update(tick.after)
            if film:
                film.watch(tick)
            if stopping():
                return []
            if tick.after.next_obs is tick.after.obs:
                continue
            for episode in stats.drain():
                if finished[episode.lane] < quota:
                    finished[episode.lane] += 1
                    rows.append(
                        {
                            "frames": frames,
                            "iteration": iteration,
                            "episode": len(rows),
                            "lane": episode.lane,
                            "return": episode.episode_return,
                            "length_frames": episode.length_frames,
                            "protocol": stamp,
                            "epsilon": epsilon,
                        }
                    )
        if film and video:
            try:
                film.write(video)
            except (OSError, RuntimeError, ValueError) as trouble:  # a film is not worth a run
                print(f"no video of this evaluation: {' '.join(str(trouble).split())[:200]}")
    return rows


def mean_return(rows: list[dict[str, Any]]) -> float:
    """Mean raw return of evaluation rows."""
    return sum(row["return"] for row in rows) / len(rows)


def load_trained(name: str) -> tuple[Path, dict[str, Any], checkpoint.Loaded]:
    """The folder that `run=` names, its configuration, and its last checkpoint. UserError unless a trained agent lies there."""
    folder = find_folder(name, "run")
    settings = read_config(folder)
    if settings["job"] != "train":
        raise UserError(f"run={folder}: that was job={settings['job']}, and only a trained agent can be watched")
    loaded = checkpoint.load(folder)
    for warning in loaded.warnings:
        print(warning)
    check_fingerprint(loaded.state.get("fingerprint"), settings, folder)
    return folder, settings, loaded


def run(cfg: DictConfig) -> int:
    """job=evaluate: scores a run's last checkpoint, prints the mean with its 95 % bootstrap interval, writes evaluations/*.csv."""
    folder, trained, loaded = load_trained(str(cfg.run))
    own = {**trained, "evaluation": plain(cfg)["evaluation"], "seed": cfg.seed}
    if own["evaluation"]["epsilon"] is None:
        own["evaluation"]["epsilon"] = trained["evaluation"].get("epsilon")
    device = pick_device(cfg.device)
    env = make_env(own, cfg.evaluation.num_envs, device, for_evaluation=True)
    agent, _ = make_agent(own, env.spec, device)
    agent.load_state_dict(loaded.state["agent"])
    frames, iteration = loaded.state["frames"], loaded.state["iteration"]
    name = f"frames-{frames}-seed-{cfg.seed}"
    video = folder / "videos" / f"evaluation-{name}.mp4" if cfg.evaluation.video else None
    rows = evaluate_agent(own, env, agent, device, frames, iteration, video)
    env.close()
    target = folder / "evaluations" / name
    if target.is_symlink():
        raise UserError(f"{target} is a link, and a run folder holds none")
    target.mkdir(parents=True, exist_ok=True)
    (target / "evaluation.csv").unlink(missing_ok=True)
    with EvaluationLog(target) as log:
        log.write(rows)
    mean, low, high = mean_interval([row["return"] for row in rows])
    game = str(own["choices"]["env"])
    normalised = human_normalised(game, mean)
    print(f"{game} after {frames:,} frames, protocol {rows[0]['protocol']}, epsilon {rows[0]['epsilon']:g}, {len(rows)} episodes")
    print(f"score    {mean:.1f} (95 % interval {low:.1f} to {high:.1f})")
    if normalised is not None:
        print(f"human    {100 * normalised:.1f} % of the way from random play to a professional tester")
    print(f"episodes {target / 'evaluation.csv'}")
    if video and video.exists():
        print(f"video    {video}")
    return 0
