"""job=collect: frames of an agent at play (random play by default) into a folder of shards on disk."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from agents.loop import play
from generative.data import FrameWriter
from lab.configure import plain
from lab.folder import as_word
from lab.progress import Progress, human_bytes
from lab.run import derive_seed, make_agent, make_env, pick_device, seed_everything


def run(cfg: DictConfig) -> int:
    """Plays `frames` environment frames and keeps every observation that was acted on."""
    settings = plain(cfg)
    device = pick_device(cfg.device)
    seed_everything(derive_seed(cfg.seed, 0, "collect"))
    env = make_env(settings, cfg.num_envs, device)
    try:
        agent, _ = make_agent(settings, env.spec, device)
        protocol = (settings.get("protocol") or {}).get("name")
        source = {"env": env.spec.name, "agent": settings["choices"]["agent"], "protocol": protocol, "seed": cfg.seed}
        folder, title = Path(str(cfg.data)), f"collecting {env.spec.name}"
        with FrameWriter(folder, env.spec.obs_shape, source) as writer, Progress(cfg.frames, title) as progress:
            for tick in play(env, agent, cfg.frames, derive_seed(cfg.seed, 0, "env")):
                writer.append(tick.step.obs)
                progress.update(tick.played)
        size = sum(path.stat().st_size for path in folder.iterdir())
        count = tick.played // env.spec.frames_per_step
        following = f"python launch.py job=fit model=vae {as_word('data', folder)}"
        print(f"{count:,} observations ({human_bytes(size)}) in {folder}; next: {following}")
    finally:
        env.close()
    return 0
