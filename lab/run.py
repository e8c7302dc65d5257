"""A run: its device, its seeds, its memory, and the objects that its configuration names."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from agents.api import Agent
from agents.bonus import Bonus, density_shape
from envs.api import Spec, UserError, VectorEnv
from generative.api import Density, Encoder, Planner, Simulator
from lab.configure import MODEL_JOBS, build, constructor_keys

BACKENDS = {"ale": "envs.atari.AtariEnv", "envpool": "envs.atari_envpool.EnvPoolAtari"}
PROTOCOL_OF = {"encoder": Encoder, "density": Density, "simulator": Simulator, "planner": Planner}


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one. UserError where the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda: torch finds no CUDA device here; use device=cpu, or install an NVIDIA driver and a CUDA build of torch"
        )
    return torch.device(name)


def derive_seed(seed: int, iteration: int, purpose: str, rank: int = 0) -> int:
    """A seed of 31 bits for one purpose in one iteration of one run."""
    words = [seed, iteration, rank, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1


def seed_everything(seed: int) -> None:
    """Seeds the default generators of python, numpy and torch (CPU and CUDA), the only ones that are used."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def forked_seed(seed: int) -> Iterator[None]:
    """Seeds everything for a while, then puts all random states back as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def make_env(cfg: Mapping[str, Any], num_envs: int, device: torch.device, for_evaluation: bool = False) -> VectorEnv:
    """The environment of a configuration; for evaluation, with the protocol's episode cap of evaluation."""
    return build(_backend(cfg), "env", num_envs=num_envs, device=device, protocol=make_protocol(cfg, for_evaluation))


def _backend(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The node of the environment, where that is Atari with `env.backend` read: ale (also where a run knows of none), or envpool."""
    node = dict(cfg["env"])
    if node.get("_target_") != BACKENDS["ale"]:
        return node
    backend = node.pop("backend", "ale")
    if backend not in list(BACKENDS):
        raise UserError(f"there is no env.backend={backend}; there are {' and '.join(BACKENDS)}")
    if backend != "ale" and cfg.get("record_actions"):
        needed = "recorded actions are played again by ale-py, from openings that only it knows"
        raise UserError(f"record_actions=true needs env.backend=ale: {needed}")
    return node | {"_target_": BACKENDS[backend]}


def make_protocol(cfg: Mapping[str, Any], for_evaluation: bool = False) -> Any:
    """The protocol that an Atari configuration names, or None for worlds that know none."""
    node = cfg.get("protocol")
    if not node:
        return None
    from envs.protocols import PROTOCOLS

    if node["name"] not in PROTOCOLS:
        raise UserError(f"there is no protocol={node['name']}; there are {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[node["name"]]
    return protocol.for_evaluation() if for_evaluation else protocol


def make_model(cfg: Mapping[str, Any], job: str, spec: Spec, device: torch.device) -> Any:
    """The model that does `job`; densities see small grey frames. UserError, by name, where the model cannot do it."""
    obs_shape = density_shape(spec.obs_shape) if job == "density" else spec.obs_shape
    model = build(cfg[job], job, obs_shape=obs_shape, num_actions=spec.num_actions, device=device)
    if not isinstance(model, PROTOCOL_OF[job]):
        raise UserError(f"{job}={cfg.get('choices', {}).get(job, '?')}: a {type(model).__name__} is no {job}")
    return model


def make_bonus(cfg: Mapping[str, Any], spec: Spec, device: torch.device) -> Bonus | None:
    """The bonus of a configuration, with the density that it counts by; None where there is none, or no density for one that needs it."""
    node = cfg.get("bonus")
    if not node:
        return None
    given: dict[str, Any] = {"obs_shape": spec.obs_shape, "device": device}
    if "density" in constructor_keys(node, "bonus"):
        if not cfg.get("density"):
            return None
        given["density"] = make_model(cfg, "density", spec, device)
    bonus: Bonus = build(node, "bonus", **given)
    return bonus


def make_agent(cfg: Mapping[str, Any], spec: Spec, device: torch.device) -> tuple[Agent, dict[str, Any]]:
    """The agent of a configuration, and what does its jobs, by job. A density works for the bonus, and only where there is one."""
    jobs = {job: make_model(cfg, job, spec, device) for job in MODEL_JOBS if cfg.get(job) and job != "density"}
    bonus = make_bonus(cfg, spec, device)
    if bonus is not None:
        jobs["bonus"] = bonus
    if cfg.get("inner"):
        jobs["inner"] = _make_inner(cfg, spec, device, jobs)
    return build(cfg["agent"], "agent", spec=spec, device=device, **jobs), jobs


def _make_inner(cfg: Mapping[str, Any], spec: Spec, device: torch.device, jobs: Mapping[str, Any]) -> Agent:
    """The agent that learns within another. UserError, by its own keys, where it cannot be built."""
    try:
        inner: Agent = build(cfg["inner"], "inner", spec=spec, device=device, **jobs)
    except UserError as trouble:
        raise UserError(str(trouble).replace("agent.", "inner.")) from trouble
    return inner


def free_bytes(device: torch.device) -> int:
    """Memory that is free now on the device (for the CPU, within the container's limit where there is one)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # the word "max" where there is no limit
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, limit - used)
    except (OSError, ValueError, KeyError):
        pass
    return free


def check_memory(needed: int, device: torch.device, advice: str) -> None:
    """UserError, with both numbers of bytes, where the memory that a run will grow to is not there."""
    free = free_bytes(device)
    if needed > free:
        raise UserError(f"the agent's memory will grow to {needed:,} bytes but only {free:,} are free on {device}; {advice}")


def check_disk(needed: int, folder: Path) -> None:
    """UserError where `folder` cannot grow to `needed` bytes: what is free in its file system, and what it holds already."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in folder.glob("checkpoint*/*"))
    if needed > free:
        needs = f"the checkpoints will grow to {needed:,} bytes but only {free:,} are free in {folder}"
        raise UserError(f"{needs}; lower agent.capacity or frames, or choose another runs_dir")
