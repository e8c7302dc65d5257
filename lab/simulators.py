"""Fitted simulators, from their run folders, and the worlds that they were fitted to: what judging and playing share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from envs.api import UserError
from generative.api import Simulator
from lab import checkpoint
from lab.configure import build
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
    folder = find_folder(name, "run")
    settings = read_config(folder)
    if settings["job"] != "fit" or not settings.get("simulator"):
        raise UserError(f"run={name}: that was job={settings['job']}; a simulator comes from job=fit simulator=NAME")
    loaded = checkpoint.load(folder)
    for warning in loaded.warnings:
        print(warning)
    if not {"obs_shape", "num_actions", "parts", "model"} <= set(loaded.state):
        raise UserError(f"run={name}: its checkpoint does not say what it was fitted to; fit it anew")
    shape, actions = tuple(loaded.state["obs_shape"]), loaded.state["num_actions"]
    model = build(settings["simulator"], "simulator", obs_shape=shape, num_actions=actions, device=device)
    model.load_state_dict(loaded.state["model"])
    return Fitted(settings["choices"]["simulator"], model, actions, settings, loaded.state["parts"])


def recorded_world(source: Mapping[str, Any], folder: Path, advice: str) -> dict[str, Any]:
    """The configuration of the world that clips in `folder` were recorded in, from their manifest's `source`.

    UserError, with `advice`, where it tells of none, or names code that is not ours.
    """
    node, protocol = source.get("world"), source.get("protocol")
    if not isinstance(node, dict) or node.get("_target_") not in known_targets("env"):
        raise UserError(f"{folder} does not say which world it was recorded in; {advice}")
    return {"env": node, "protocol": {"name": protocol} if protocol else None, "choices": {"env": source.get("env")}}
