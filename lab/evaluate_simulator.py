"""job=evaluate_simulator: simulators on the same clips and in the same live world, as results.json, errors.csv and a page."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from agents.api import Agent
from agents.random import RandomAgent
from envs.api import UserError, VectorEnv
from generative.api import Clip, Simulator
from generative.clips import ClipData
from generative.last_frame import LastFrame
from generative.rollouts import rollout
from lab.configure import plain
from lab.evaluate import load_trained
from lab.folder import find_folder, write_beside
from lab.rollout_pictures import FILMED, write_film
from lab.run import derive_seed, make_agent, make_env, pick_device, seed_everything
from lab.simulator_figures import HELD_STEPS, control_score, counterfactuals, event_figures, picture_errors, steps_per_second
from lab.simulator_page import page
from lab.simulators import load_fitted, recorded_world

BASELINE = "last_frame"
LEAD_STEPS = 60  # into a part, about, where actions are tried


def run(cfg: DictConfig) -> int:
    """Judges the simulator of `run`, those of `against`, and the last frame, and writes all into the first run's folder."""
    settings = plain(cfg)
    device, judge = pick_device(settings["device"]), checked(settings["judge"])
    names = [settings["run"], *_words(settings["against"], "against")]
    whole = ClipData(Path(settings["data"]), rest=True)
    for line in whole.refused:
        print(line)
    data = whole
    shares: list[float] = []
    simulators: dict[str, Simulator] = {}
    for name in names:
        label, simulator, held = load_simulator(name, whole, device)
        simulators[label if label not in simulators else f"{label} ({Path(name).name})"] = simulator
        if held is not None:
            shares.append(held)
    least = min(shares, default=None)
    if least:
        data = whole.split(least)[1]
    elif least is not None:
        print(f"a run was fitted to all of {whole.folder}: its figures are on what it has seen")
    simulators[BASELINE] = LastFrame(whole.obs_shape, whole.num_actions, device)
    known = max(one.context_frames for one in simulators.values())
    horizon = _fitting_horizon(data, judge["horizon"])
    world = world_of(whole) if judge["moments"] or judge["control_run"] else None
    player = _player(judge["control_run"], whole) if judge["control_run"] else None
    target = find_folder(names[0], "run") / "evaluations" / f"simulator-seed-{settings['seed']}"
    if target.is_symlink():
        raise UserError(f"{target} is a link, and a run folder holds none")
    target.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    films: dict[str, Path] = {}
    for name, simulator in simulators.items():
        seed_everything(derive_seed(settings["seed"], 0, "evaluate_simulator"))
        print(f"judging  {name}", flush=True)
        results[name] = _judge(simulator, data, whole, judge, (known, horizon), world, player, settings["seed"])
        films[name] = target / f"{name.split(' ')[0]}-{len(films)}.mp4"
        seen = rollout(simulator, data.spread_clips(FILMED, known - 1 + horizon, known - 1), horizon, known)
        write_film(films[name], seen, list(range(len(seen.frames))))
    _write(target, settings, data, results, films)
    _tell(results, target)
    return 0


def checked(judge: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of judge.*. UserError for a value of another kind."""
    if not isinstance(judge, Mapping):
        raise UserError(f"judge is a group of keys (judge.NAME=value), got {judge}")
    for key in ("horizon", "clips", "event_clips", "control_steps", "control_envs", "moments"):
        if not _is_count(judge[key], least=0 if key == "moments" else 1):
            raise UserError(f"judge.{key} must be a whole number {'of 0 or more' if key == 'moments' else 'above 0'}, got {judge[key]}")
    every = judge["control_every"]
    if not isinstance(every, list) or not every or not all(_is_count(steps, 1) for steps in every):
        raise UserError(f"judge.control_every is a list of whole numbers above 0, got {every}")
    if judge["control_run"] is not None and not isinstance(judge["control_run"], str):
        raise UserError(f"judge.control_run names a run folder, got {judge['control_run']}")
    return dict(judge)


def load_simulator(name: str, data: ClipData, device: torch.device) -> tuple[str, Simulator, float | None]:
    """(the model's name, the fitted simulator, the share of `data`, recorded last, that its fit has not seen).

    The share is None where it was fitted to other clips; of a folder that has grown since, it is what came later. UserError where the run
    fitted no simulator, or one of other pictures or actions.
    """
    fitted = load_fitted(name, device)
    shape = fitted.simulator.obs_shape
    if (shape, fitted.num_actions) != (data.obs_shape, data.num_actions):
        theirs = f"pictures of {data.obs_shape} and {data.num_actions} actions"
        raise UserError(f"run={name} simulates pictures of {shape} under {fitted.num_actions} actions, and {data.folder} holds {theirs}")
    return fitted.label, fitted.simulator, _unseen(data, fitted.parts, fitted.settings["fit"]["heldout"])


def _unseen(data: ClipData, fitted: Sequence[str], heldout: float) -> float | None:
    """The share of `data` that was held out of a fit to parts of these checksums; None where they are others.

    Where a part that was fitted to is not whole any more, none was held out for certain, but what came later.
    """
    seen = [number for number, part in enumerate(data.checksums) if part in fitted]
    if not seen:
        return None
    later = sum(part["steps"] for part in data.parts[seen[-1] + 1 :])
    if later:
        return later / sum(part["steps"] for part in data.parts)
    return heldout if list(fitted) == data.checksums else 0.0


def world_of(data: ClipData) -> dict[str, Any]:
    """The configuration of the world that clips were recorded in. UserError where the folder names code that is not ours."""
    return recorded_world(data.source, data.folder, "leave judge.moments=0 and judge.control_run=null")


def _player(name: str, data: ClipData) -> Agent:
    """The trained agent of a run, on the CPU. UserError where it sees other pictures than those of `data`."""
    folder, settings, loaded = load_trained(name)
    device = torch.device("cpu")
    env = make_env(settings, 1, device)
    env.close()
    if (env.spec.obs_shape, env.spec.num_actions) != (data.obs_shape, data.num_actions):
        raise UserError(f"judge.control_run={folder} sees pictures of {env.spec.obs_shape}, and {data.folder} holds {data.obs_shape}")
    agent, _ = make_agent(settings, env.spec, device)
    agent.load_state_dict(loaded.state["agent"])
    return agent


def _judge(
    simulator: Simulator,
    data: ClipData,
    whole: ClipData,
    judge: Mapping[str, Any],
    span: tuple[int, int],
    world: dict[str, Any] | None,
    player: Agent | None,
    seed: int,
) -> dict[str, Any]:
    """All figures of one simulator; `span` is how many frames are known, and how many foretold."""
    found: dict[str, Any] = {"errors": picture_errors(simulator, data, *span, judge["clips"])}
    found["events"] = event_figures(simulator, data, span[0], judge["event_clips"])
    if world is not None and judge["moments"]:
        found["counterfactuals"] = _try_actions(simulator, whole, world, judge["moments"])
    if world is not None and player is not None:
        env = make_env(world, judge["control_envs"], torch.device("cpu"))
        found["control"] = _play(simulator, env, player, judge, seed)
        env.close()
    context = simulator.context_frames
    clip = data.spread_clips(16, context, context - 1)
    found["steps_per_second"] = steps_per_second(simulator, Clip(clip.frames[:, :context], *(part[:, : context - 1] for part in clip[1:])))
    return found


def _try_actions(simulator: Simulator, whole: ClipData, world: dict[str, Any], moments: int) -> dict[str, Any] | None:
    """Means over the last parts, a moment each; pairs are added up."""
    env = make_env(world, whole.lanes, torch.device("cpu"))
    tried = []
    for part in range(max(0, len(whole.parts) - moments), len(whole.parts)):
        step = min(LEAD_STEPS + part, whole.parts[part]["steps"] - HELD_STEPS - part)  # another in each: in toys all lanes end at once
        if step >= 0:
            tried.append(counterfactuals(simulator, whole, env, part, step))
    env.close()
    found = [one for one in tried if one is not None]
    if not found:
        return None
    means: dict[str, Any] = {"pairs": sum(one["pairs"] for one in found), "moments": len(found)}
    for key in ("recall", "specificity", "overlap", "correlation"):
        values = [one[key] for one in found if one[key] is not None]
        means[key] = sum(values) / len(values) if values else None
    return means


def _play(simulator: Simulator, env: VectorEnv, player: Agent, judge: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns by steps between two true frames; "random" is play at random, with the truth always before it."""
    played = {}
    for every in judge["control_every"]:
        seed_everything(derive_seed(seed, every, "control"))
        played[str(every)] = control_score(simulator, env, player, every, derive_seed(seed, 0, "control env"), judge["control_steps"])
    seed_everything(derive_seed(seed, 0, "control"))
    randomly = RandomAgent(env.spec, torch.device("cpu"))
    played["random"] = control_score(simulator, env, randomly, 1, derive_seed(seed, 0, "control env"), judge["control_steps"])
    return {name: {"mean": sum(returns) / len(returns), "returns": returns} for name, returns in played.items()}


def _fitting_horizon(data: ClipData, wanted: int) -> int:
    """As many steps as the longest stretch has, at most `wanted`."""
    longest = max(part.stop - part.start for part in data.ranges)
    if longest < wanted:
        print(f"judge.horizon={wanted} becomes {longest}: no longer stretch is held out in {data.folder}")
    return min(wanted, longest)


def _write(target: Path, settings: Mapping[str, Any], data: ClipData, results: Mapping[str, Any], films: Mapping[str, Path]) -> None:
    facts = {"data": settings["data"], "clips_of": data.source, "frames": len(data), "seed": settings["seed"], "judge": settings["judge"]}
    write_beside(target / "results.json", json.dumps({"settings": facts, "results": results}, indent=1))
    with (target / "errors.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["simulator", "steps_ahead", "mse", "psnr", "ssim", "moving_mse"])
        for name, found in results.items():
            columns = found["errors"]
            for index, row in enumerate(zip(*(columns[key] for key in ("mse", "psnr", "ssim", "moving_mse")))):
                writer.writerow([name, index + 1, *row])
    told = f"{len(data):,} frames of {data.source.get('env', 'an unnamed world')}, seed {settings['seed']}"
    write_beside(target / "report.html", page("Simulators compared", told, results, films))


def _tell(results: Mapping[str, Any], target: Path) -> None:
    for name, found in results.items():
        psnr = dict(enumerate(found["errors"]["psnr"], start=1))
        shown = ", ".join(f"{psnr[step]:.1f} at {step}" for step in (1, 5, 10, 30, 100) if psnr.get(step) is not None)
        print(f"PSNR     {name}: {shown}")
    print(f"figures  {target / 'results.json'}\nreport   {target / 'report.html'}")


def _words(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{key} is a list of run folders, such as {key}=[runs/A,runs/B], got {value}")
    return value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**31
