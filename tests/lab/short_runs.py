"""Short runs of the door, and what it means that two runs are the same."""

import json
from pathlib import Path

import torch

import launch
from lab import checkpoint

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "env=Catch",
    "wandb=off",
    "frames_per_iteration=320",
    "log_frames=64",
    "num_envs=4",
    "evaluation.num_envs=2",
    "evaluation.video=false",
]
VAE = ["encoder=vae", "fit.frames=320", "fit.updates=6", "fit.batch_size=8"]


def run(tmp_path: Path, name: str, *words: str) -> Path:
    assert launch.main([*WORDS, f"runs_dir={tmp_path}", f"run_name={name}", *words]) == 0
    return tmp_path / name


def metrics(folder: Path) -> list[dict]:
    """Rows without what a clock or the process's size says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "speed/", "memory/process_bytes", "fit/updates_per_second")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def assert_equal(left, right, path: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            if f"{path}/{key}" != "/logs/metrics.jsonl":  # its rows hold times of varying length
                assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def assert_same_run(left: Path, right: Path) -> None:
    assert metrics(left) == metrics(right)
    assert (left / "evaluation.csv").read_text() == (right / "evaluation.csv").read_text()
    assert_equal(checkpoint.load(left).state, checkpoint.load(right).state)
