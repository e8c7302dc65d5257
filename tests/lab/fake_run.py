"""A run folder as training leaves it, made up: for tests of the report, and for looking at it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from lab.logging import EvaluationLog, MetricsLog

ACTIONS = ("NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN")


def make_run(
    folder: Path,
    env: str = "Qbert",
    iterations: int = 10,
    rows_per_iteration: int = 20,
    actions: tuple[str, ...] = ACTIONS,
    video: bytes | None = None,
) -> Path:
    """Fills `folder` with what is left of `iterations` iterations of 200,000 frames; from a score of 160 to about 5,000."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    config = f"job: train\nframes: 2000000\nseed: 3\nnum_envs: 16\nchoices:\n  agent: episodic_control\n  env: {env}\n  encoder: vae\n"
    (folder / "config.yaml").write_text(config + "agent:\n  k: 11\n  epsilon: 0.005\nprotocol:\n  name: mfec2016\n")
    versions = {"git": "0123456789abcdef", "packages": {"torch": "2.13.0", "ale-py": "0.12.1"}, "device": "cpu", "torch_threads": 2}
    (folder / "version.json").write_text(json.dumps(versions))
    with MetricsLog(folder) as log, EvaluationLog(folder) as evaluations:
        for update in range(100, 5001, 100):
            rate = 20 * (1 - np.exp(-update / 900)) + random.normal(0, 0.2)
            distortion = -9000 * (1 - np.exp(-update / 700)) + random.normal(0, 60)
            row = {"fit/update": update, "fit/elbo": -rate - distortion, "fit/rate": rate, "fit/distortion": distortion}
            log.write({"frames": 100_000, "iteration": 0, **row, "fit/updates_per_second": random.normal(41, 1)})
        for iteration in range(iterations + 1):
            skill = 160 + 4800 * (1 - np.exp(-iteration / 4))
            evaluations.write(
                {
                    "frames": iteration * 200_000,
                    "iteration": iteration,
                    "episode": episode,
                    "lane": episode % 16,
                    "return": 25 * round(random.gamma(6, skill / 6) / 25),
                    "length_frames": int(random.integers(900, 5000)),
                    "protocol": "mfec2016",
                    "epsilon": 0.005,
                }
                for episode in range(32)
            )
            if iteration:
                _iteration(log, random, iteration, rows_per_iteration, actions)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    imsave(images / "reconstructions.png", random.random((170, 680)), cmap="gray")
    imsave(images / "samples.png", random.random((170, 680)), cmap="gray")
    if video:
        (folder / "videos").mkdir(exist_ok=True)
        for iteration in range(iterations + 1):
            (folder / "videos" / f"iteration-{iteration:04d}.mp4").write_bytes(video)
    return folder


def _iteration(log: MetricsLog, random: np.random.Generator, iteration: int, rows: int, actions: tuple[str, ...]) -> None:
    for step in range(rows):
        frames = (iteration - 1) * 200_000 + (step + 1) * 200_000 // rows
        skill = 160 + 4000 * (1 - np.exp(-frames / 8e5))
        act = 0.2 + 0.4 * frames / 2e6
        entries = {name: int(frames / 4 / len(actions) * (0.6 + 0.8 * i / len(actions))) for i, name in enumerate(actions)}
        row = {
            "train/return_mean": skill * random.gamma(20, 1 / 20),
            "train/return_min": skill * 0.2,
            "train/return_max": skill * 2.4,
            "train/episodes": int(random.integers(3, 12)),
            "train/length_frames_mean": 2500 + random.normal(0, 200),
            "speed/frames_per_second": 9000 * (1 - 0.5 * frames / 2e6) + random.normal(0, 150),
            "time/env": 0.75 - act + random.normal(0, 0.005),
            "time/act": act,
            "time/learn": 0.15,
            "time/observe": 0.06,
            "time/log": 0.03,
            "memory/entries": sum(entries.values()),
            **{f"memory/entries_{name}": count for name, count in entries.items()},
            "memory/exact_hit_rate": 0.6 * (1 - np.exp(-frames / 5e5)) + random.normal(0, 0.01),
            "memory/bytes": sum(entries.values()) * 420,
            "agent/epsilon": 0.005,
        }
        log.write({"frames": frames, "iteration": iteration, **row})
