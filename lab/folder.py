"""A run's folder: made, found, read, locked. What lies in one may be a stranger's work, so nothing in it is executed or followed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml  # type: ignore[import-untyped]

from envs.api import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RESUMABLE_KEYS = ("frames", "device", "wandb")
PACKAGES = (
    "torch",
    "numpy",
    "ale-py",
    "envpool",
    "vizdoom",
    "gymnasium",
    "numba",
    "faiss-cpu",
    "faiss-gpu",
    "hydra-core",
    "wandb",
    "safetensors",
)
MOST_CONFIG_BYTES = 100_000
WRITTEN = ("config.yaml", "version.json", "metrics.jsonl", "evaluation.csv", "report.html", "videos", "images", "evaluations", "frames")
GROUP_OF = {"inner": "agent", "encoder": "model", "density": "model", "simulator": "model", "planner": "model"}


def as_word(key: str, value: object) -> str:
    """`key=value` as it can be pasted into a shell, whatever the value holds."""
    return shlex.quote(f"{key}={value}")


def find_folder(name: str, key: str) -> Path:
    """The run folder that a user names by path. UserError where there is none, or where links in it lead elsewhere."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{key}={name}: there is no such folder")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{key}={name}: this is not a run folder (it has no config.yaml)")
    for entry in WRITTEN:
        for place in (folder / entry, folder / f"{entry}.writing"):
            if place.is_symlink():
                raise UserError(f"{key}={name}: {place.name} is a link, and a run folder holds none; put the file itself there")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run folder. UserError where it is damaged, or names code that no file under configs/ names."""
    path = folder / "config.yaml"
    try:
        text = path.read_text()
        if len(text) > MOST_CONFIG_BYTES or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it is too large or holds aliases")
        cfg = parse_yaml(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as trouble:
        raise UserError(f"{path} is damaged: {' '.join(str(trouble).split())[:200]}") from trouble
    if not isinstance(cfg, dict) or not isinstance(cfg.get("job"), str):
        raise UserError(f"{path} is damaged: it names no job")
    for key, node in cfg.items():
        target = node.get("_target_") if isinstance(node, dict) else None
        if target is not None and target not in known_targets(GROUP_OF.get(str(key), str(key))):
            raise UserError(f"{path}: {key} names {target!r}; only what a file under configs/ names is ever called")
    return {str(key): value for key, value in cfg.items()}


class _Loader(yaml.SafeLoader):
    """YAML's plain values, with 1e-3 a number as in YAML 1.2."""


_SCIENTIFIC = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """Plain values from YAML. yaml.YAMLError where it is none."""
    return yaml.load(text, _Loader)


def known_targets(group: str) -> set[str]:
    """The classes that files under configs/GROUP name: what a stranger's folder may ask for, and nothing else."""
    lines = [line for path in (CONFIGS / group).glob("*.yaml") for line in path.read_text().splitlines()]
    return {line.split()[1] for line in lines if line.startswith("_target_:")}


def lock(folder: Path) -> IO[str]:
    """Holds the run folder for this process until the returned file is closed. UserError where another process holds it."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process works in {folder}; wait for its end, or stop it") from None
    return file


def _job_of(folder: Path) -> str:
    """The job of a run folder, or nothing where it is none."""
    try:
        return str(read_config(find_folder(str(folder), "run"))["job"])
    except UserError:
        return ""


def new_folder(cfg: Mapping[str, Any], title: str) -> Path:
    """Makes the run folder `runs_dir/run_name` (null: title, seed and time) with config.yaml and version.json in it."""
    name = cfg.get("run_name") or f"{title}-{cfg['seed']}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[\w.,=+-]+", str(name)) or str(name).startswith("."):
        raise UserError(f"run_name must be made of letters, digits and . , = + - _, got {name!r}")
    folder = Path(str(cfg["runs_dir"])) / str(name)
    if cfg.get("run_name") and folder.exists():
        training = cfg["job"] == "train" and _job_of(folder) == "train"
        go_on = f"go on with it by {as_word('resume', folder)} or " if training else ""
        raise UserError(f"{folder} exists already; {go_on}choose another run_name")
    attempt = 1
    while folder.exists():
        attempt += 1
        folder = folder.with_name(f"{name}-{attempt}")
    folder.mkdir(parents=True)
    write_config(folder, cfg)
    return folder


def write_config(folder: Path, cfg: Mapping[str, Any]) -> None:
    """config.yaml: the resolved configuration."""
    write_beside(folder / "config.yaml", yaml.safe_dump(dict(cfg), sort_keys=False))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of all that a resumed run may not change."""
    free = (*RESUMABLE_KEYS, "evaluation", "resume", "runs_dir", "run_name")
    fixed = {key: value for key, value in settings.items() if key not in free}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def check_fingerprint(made_with: object, settings: Mapping[str, Any], folder: Path) -> None:
    """UserError unless a checkpoint's fingerprint is that of the settings."""
    if made_with != fingerprint(settings):
        raise UserError(f"{folder}/config.yaml is not what its checkpoint was made with; put it back, or start a new run")


def write_beside(path: Path, text: str) -> None:
    """Writes a file in one stroke: whole or not at all."""
    beside = path.with_name(path.name + ".writing")
    beside.write_text(text)
    os.replace(beside, path)


def write_versions(folder: Path, device: torch.device) -> None:
    """version.json: git hash, Python, packages, machine, device and threads."""
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    facts = {
        "git": commit or None,
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch_threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }
    write_beside(folder / "version.json", json.dumps(facts, indent=2))
