"""Fitted simulators, from their run folders, and the worlds that they were fitted to: what judging, playing and agents share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from envs.api import Spec, UserError
from generative.api import Simulator
from lab import checkpoint
from lab.configure import build
from lab.fitting import take_up
from lab.folder import find_folder, known_targets, read_config


class Fitted(NamedTuple):
    """A simulator that a run has fitted.

    Attributes:
        label: the model's name, as typed after `simulator=`.
        simulator: with its fitted weights.
        num_actions: A.
        settings: the fit's configuration.
        parts: checksums of the clips that it was fitted to.
    """

    label: str
    simulator: Simulator
    num_actions: int
    settings: dict[str, Any]
    parts: Sequence[str]


def load_fitted(name: str, device: torch.device) -> Fitted:
    """The simulator of the run folder `name`. UserError where that run fitted none."""
    settings, loaded = _fit_of(name, "run")
    for warning in loaded.warnings:
        print(warning)
    shape, actions = tuple(loaded.state["obs_shape"]), loaded.state["num_actions"]
    model = build(settings["simulator"], "simulator", obs_shape=shape, num_actions=actions, device=device)
    model.load_state_dict(loaded.state["model"])
    return Fitted(settings["choices"]["simulator"], model, actions, settings, loaded.state["parts"])


def take_fitted(model: Any, settings: Mapping[str, Any], spec: Spec) -> list[str]:
    """Puts the simulator of the job=fit run that `fit.path` names into `model`. Returns what the user should be told.

    UserError where there is none, where it was fitted with other knobs than `settings` choose, to other pictures or actions than those of
    `spec`, or under another protocol, as far as the fit says. Of another world under the same protocol the user is told.
    """
    name, path = settings["choices"]["simulator"], settings["fit"]["path"]
    if not path:
        raise UserError(f"simulator={name} has learned nothing: job=fit simulator={name} data=FOLDER fits it, fit.path=runs/NAME takes it")
    fit, loaded = _fit_of(path, "fit.path")
    state = loaded.state
    theirs = tuple(state["obs_shape"]), state["num_actions"]
    if theirs != (spec.obs_shape, spec.num_actions):
        ours = f"{spec.name} here has {spec.obs_shape} and {spec.num_actions}"
        raise UserError(f"fit.path={path} simulates pictures of {theirs[0]} under {theirs[1]} actions, and {ours}")
    other = [key for key, value in settings["simulator"].items() if fit["simulator"].get(key, value) != value]
    if other:
        chosen, words = fit["choices"]["simulator"], [f"simulator.{key}={fit['simulator'][key]}" for key in other]
        made = " ".join(words) if chosen == name else f"simulator={chosen}"
        raise UserError(f"fit.path={path} was fitted with {made}; type that here too")
    world, protocol = state.get("world"), (settings.get("protocol") or {}).get("name")
    if world and world["protocol"] != protocol:
        raise UserError(f"fit.path={path} was fitted under protocol={world['protocol']}, and this is protocol={protocol}; take that one")
    take_up(model, state["model"], path)
    notes, env = [*loaded.warnings], settings["choices"]["env"]
    return [*notes, f"the simulator was fitted to {world['env']}, and this is {env}"] if world and world["env"] != env else notes


def _fit_of(name: str, key: str) -> tuple[dict[str, Any], checkpoint.Loaded]:
    """Configuration and checkpoint of the run folder that `key` names. UserError where that run fitted no simulator."""
    folder = find_folder(name, key)
    settings = read_config(folder)
    if settings["job"] != "fit" or not settings.get("simulator"):
        raise UserError(f"{key}={name}: that was job={settings['job']}; a simulator comes from job=fit simulator=NAME")
    loaded = checkpoint.load(folder)
    if not {"obs_shape", "num_actions", "parts", "model"} <= set(loaded.state):
        raise UserError(f"{key}={name}: its checkpoint does not say what it was fitted to; fit it anew")
    return settings, loaded


def recorded_world(source: Mapping[str, Any], folder: Path, advice: str) -> dict[str, Any]:
    """The configuration of the world that clips in `folder` were recorded in, from their manifest's `source`.

    UserError, with `advice`, where it tells of none, or names code that is not ours.
    """
    node, protocol = source.get("world"), source.get("protocol")
    if not isinstance(node, dict) or node.get("_target_") not in known_targets("env"):
        raise UserError(f"{folder} does not say which world it was recorded in; {advice}")
    return {"env": node, "protocol": {"name": protocol} if protocol else None, "choices": {"env": source.get("env")}}
