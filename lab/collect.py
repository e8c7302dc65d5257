"""job=collect: clips of an agent at play (random, scripted, or trained) into a folder on disk."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from agents.api import Agent
from agents.loop import ticks_for, watch
from envs.api import UserError, VectorEnv
from envs.stats import EpisodeStats
from generative.recording import ClipWriter
from lab.configure import plain
from lab.evaluate import load_trained
from lab.folder import as_word, lock
from lab.progress import Progress, human_bytes
from lab.run import derive_seed, make_agent, make_env, make_protocol, pick_device, seed_everything

UNTRAINED = ("random", "scripted")


def run(cfg: DictConfig) -> int:
    """Plays `frames` environment frames, part after part, and keeps all of it. A folder that was begun is gone on with."""
    settings = plain(cfg)
    device, folder = pick_device(cfg.device), Path(settings["data"])
    world, learned, who = _player(settings)
    shown = _shown(world, settings["collect"]["obs"])
    part_frames = min(settings["frames"], settings["frames_per_iteration"])
    source = {
        "env": shown["choices"]["env"],
        "world": {key: value for key, value in shown["env"].items() if key != "num_threads"},
        "protocol": (shown.get("protocol") or {}).get("name"),
        **who,
    }
    epsilon = settings["collect"]["epsilon"]
    if epsilon is None:
        protocol = make_protocol(world)
        epsilon = protocol.evaluation_epsilon if protocol else 0.0
    source |= {"epsilon": float(epsilon), "seed": settings["seed"], "frames_per_part": part_frames}
    env = make_env(world, settings["num_envs"], device)
    twin = make_env(shown, settings["num_envs"], torch.device("cpu")) if shown is not world else None
    try:
        agent, _ = make_agent(world, env.spec, device)
        if learned is not None:
            agent.load_state_dict(learned)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder), ClipWriter(folder, (twin or env).spec, settings["num_envs"], source) as writer:
            _record(env, twin, agent, writer, settings["frames"], part_frames)
            _tell(writer, folder)
    except FileExistsError as trouble:
        raise UserError(f"{as_word('data', folder)}: there is a file of that name") from trouble
    except KeyboardInterrupt:
        print("whole parts are kept; the same command goes on after them")
        raise
    finally:
        env.close()
        if twin is not None:
            twin.close()
    return 0


def _player(settings: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None, dict[str, Any]]:
    """The configuration that is played, what its agent has learned, and what the manifest tells of it."""
    if settings["run"] is not None:
        folder, world, loaded = load_trained(settings["run"])
        told = {"agent": world["choices"]["agent"], "run": folder.resolve().name, "trained_frames": loaded.state["frames"]}
        return world, loaded.state["agent"], told
    name = settings["choices"]["agent"]
    if name not in UNTRAINED:
        raise UserError(f"agent={name} has learned nothing: train it, then job=collect run=runs/NAME (or agent={' or '.join(UNTRAINED)})")
    return settings, None, {"agent": name, **{key: value for key, value in settings["agent"].items() if key != "_target_"}}


def _shown(world: dict[str, Any], obs: str | None) -> dict[str, Any]:
    """The configuration whose pictures are recorded: `world` itself, or the same with other observations."""
    if obs is None or obs == world["env"].get("obs"):
        return world
    if "obs" not in world["env"]:
        raise UserError(f"collect.obs={obs} chooses among pictures of Atari, and env={world['choices']['env']} is none; leave it out")
    return {**world, "env": {**world["env"], "obs": obs}}


def _record(env: VectorEnv, twin: VectorEnv | None, agent: Agent, writer: ClipWriter, frames: int, part_frames: int) -> None:
    """Plays the parts that the folder lacks. Each is a function of (seed, its number): stopped collections end as others do."""
    parts, begun = -(-frames // part_frames), len(writer.parts)
    seed, epsilon = writer.source["seed"], writer.source["epsilon"]
    ticks, title = ticks_for(part_frames, env), f"collecting {env.spec.name}"
    frames_per_tick = env.num_envs * env.spec.frames_per_step
    with Progress(parts * ticks * frames_per_tick, title) as progress:
        if begun:
            progress.message(f"{writer.folder} holds {begun} of {parts} parts already")
        for part in range(begun, parts):
            seed_everything(derive_seed(seed, part, "collect"))
            env_seed = derive_seed(seed, part, "env")
            stats = EpisodeStats(env.num_envs, env.spec.frames_per_step, torch.device("cpu"))
            seen = twin.reset(env_seed) if twin is not None else None
            for tick in islice(watch(env, agent, env_seed, epsilon), ticks):
                step, action, after = tick.step, tick.decision.action, tick.after
                if twin is not None and seen is not None:
                    step, seen = seen, twin.step(action.cpu())
                    assert torch.equal(seen.reward, after.reward.cpu()), "the same seed and actions have led to another game"
                    after = seen
                writer.append(step, action, after)
                stats.update(after)
                progress.update(part * ticks * frames_per_tick + tick.played)
            returns = [episode.episode_return for episode in stats.drain()]
            mean = sum(returns) / len(returns) if returns else None
            writer.end_part({"env_seed": env_seed, "episodes": len(returns), "return_mean": mean})


def _tell(writer: ClipWriter, folder: Path) -> None:
    steps = sum(part["steps"] for part in writer.parts) * writer.lanes
    episodes = sum(part["episodes"] for part in writer.parts)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"clips    {steps:,} steps in {len(writer.parts)} parts, {human_bytes(size)} ({size / steps:,.0f} bytes a step) in {folder}")
    if episodes:
        score = sum(part["return_mean"] * part["episodes"] for part in writer.parts if part["episodes"]) / episodes
        print(f"episodes {episodes:,} whole ones, mean return {score:,.1f}")
    print(f"next     python launch.py job=fit model=vae {as_word('data', folder)}")
