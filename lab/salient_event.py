"""bench=salient_event: do pseudo-counts of a rare event grow only while it happens? (Bellemare et al. 2016, section 3.3, figure 1.)

A chicken in Freeway waits for a while, then walks up for a while, and so on. It scores whenever it gets across: the salient event. A
density learns every frame. The pseudo-count of the event's frames must be near 0 at first, grow while the chicken walks, stay while it
waits, and always be a fraction of how often the event happened. For comparison, the count of the frame that it waits in.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from agents.bonus import shrink_frames
from envs.api import UserError, VectorEnv
from generative.api import Density, Recoding
from generative.pseudo_count import pseudo_count
from lab.configure import check_seed, compose, plain
from lab.folder import write_beside
from lab.grid import bench_folder
from lab.progress import Progress
from lab.run import derive_seed, make_env, make_model, pick_device, seed_everything

WAIT, WALK = "NOOP", "UP"


def run(cfg: DictConfig) -> int:
    """Plays, learns and probes; writes results.json and event.png."""
    settings = plain(cfg)
    bench = settings["bench"]
    lacking = [key for key in ("env", "density", "phase_steps", "phases", "probe_steps", "seed") if key not in bench]
    if lacking:
        raise UserError(f"bench={bench.get('name')} lacks {', '.join(lacking)}")
    for key in ("phase_steps", "phases", "probe_steps"):
        if not isinstance(bench[key], int) or isinstance(bench[key], bool) or bench[key] < 1:
            raise UserError(f"bench.{key} must be a whole number above 0, got {bench[key]}")
    check_seed("bench.seed", bench["seed"])
    folder = bench_folder(bench, settings["runs_dir"])
    env, density = _make(bench, pick_device(settings["device"]))
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(bench, env, density)
    write_beside(folder / "results.json", json.dumps(result, indent=2))
    draw(result, folder / "event.png")
    last = [row for row in result["probes"] if row["event_count"] is not None]
    if last:
        row = last[-1]
        print(f"events {row['events']:,}, their pseudo-count {row['event_count']:,.1f}, the waiting frame's {row['wait_count']:,.1f}")
    print(f"results  {folder}")
    return 0


def _make(bench: Mapping[str, Any], device: torch.device) -> tuple[VectorEnv, Density]:
    """The game, and the density that looks on. UserError where the experiment cannot be made with them."""
    cfg = plain(compose([f"env={bench['env']}", "agent=a3c_plus", f"density={bench['density']}"]))
    seed_everything(derive_seed(bench["seed"], 0, "salient event"))
    env = make_env(cfg, 1, device)
    if not {WAIT, WALK} <= set(env.spec.action_names):
        raise UserError(f"bench.env={bench['env']} has no actions {WAIT} and {WALK}; the experiment is Freeway's")
    density: Density = make_model(cfg, "density", env.spec, device)
    if not density.exact:
        needs = "pseudo-counts need a density that is exact"
        raise UserError(f"bench.density={bench['density']} gives only a bound, and {needs}; choose another, such as cts")
    return env, density


def measure(bench: Mapping[str, Any], env: VectorEnv, density: Density) -> dict[str, Any]:
    """Alternates waiting and walking and probes the density every `probe_steps`. Closes the environment.

    Returns:
        The bench's settings and `probes`: rows of step, phase, events so far, pseudo-counts of the last event's frame and of the last one
        waited in (None before the first event).
    """
    shape, names = density.obs_shape, env.spec.action_names
    step, steps = env.reset(derive_seed(bench["seed"], 0, "env")), bench["phase_steps"] * bench["phases"]
    waiting = shrink_frames(step.obs, shape)
    event, events = None, 0
    probes: list[dict[str, Any]] = []
    with Progress(steps, f"{bench['density']} on {bench['env']}", "steps") as progress:
        for played in range(1, steps + 1):
            walking = (played - 1) // bench["phase_steps"] % 2 == 1
            step = env.step(torch.tensor([names.index(WALK if walking else WAIT)], device=step.obs.device))
            frame = shrink_frames(step.next_obs, shape)
            density.absorb(frame)
            if not walking:
                waiting = frame
            if float(step.reward) > 0:
                event, events = frame, events + 1
            if played % bench["probe_steps"] == 0:
                probes.append(
                    {
                        "step": played,
                        "walking": walking,
                        "events": events,
                        "event_count": None if event is None else _count(density, event),
                        "wait_count": _count(density, waiting),
                    }
                )
                progress.update(played)
    env.close()
    return {**dict(bench), "probes": probes}


def _count(model: Density, frame: torch.Tensor) -> float:
    """The pseudo-count of one frame; the density is put back as it was."""
    state = copy.deepcopy(model.state_dict())
    recoding: Recoding = model.absorb(frame)
    model.load_state_dict(state)
    return float(pseudo_count(recoding))


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Pseudo-counts and the true count of events against steps, the walking phases shaded."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    probes = result["probes"]
    steps = [row["step"] for row in probes]
    figure, panel = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for phase in range(1, result["phases"], 2):
        panel.axvspan(
            phase * result["phase_steps"], (phase + 1) * result["phase_steps"], color="0.92", label="walking" if phase == 1 else None
        )
    panel.plot(steps, [row["events"] for row in probes], color="0.5", linestyle="--", label="salient events, true count")
    seen = [row for row in probes if row["event_count"] is not None]
    panel.plot([row["step"] for row in seen], [row["event_count"] for row in seen], color="C3", label="salient event, pseudo-count")
    panel.plot(steps, [row["wait_count"] for row in probes], color="C0", label="waiting frame, pseudo-count")
    panel.set_yscale("symlog", linthresh=1)
    panel.set_xlabel("agent steps")
    panel.set_ylabel("count")
    panel.set_title(f"{result['density']} on {result['env']}", fontsize=10)
    panel.legend(fontsize=7, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
