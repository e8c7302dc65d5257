"""Every action of training, a byte each, from which emulators can play it all again (`record_actions=true`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs.api import UserError

FOLDER = "actions"


class ActionLog:
    """The actions of one iteration, kept on the device until it ends."""

    def __init__(self) -> None:
        self._actions: list[Tensor] = []

    def add(self, action: Tensor) -> None:
        """int64 (N), below 256."""
        self._actions.append(action.to(torch.uint8))

    def write(self, folder: Path, iteration: int) -> None:
        """Writes actions/iteration-NNNN.npy, uint8 (T, N), into a run folder."""
        target = folder / FOLDER / f"iteration-{iteration:04d}.npy"
        target.parent.mkdir(exist_ok=True)
        beside = target.with_suffix(".writing")
        with beside.open("wb") as file:
            np.save(file, torch.stack(self._actions).cpu().numpy(), allow_pickle=False)
        beside.replace(target)


def recorded(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(iteration, actions uint8 (T, N)) of a run folder, in order. UserError where none were recorded or a file is damaged."""
    paths = sorted((folder / FOLDER).glob("iteration-*.npy"))
    if not paths:
        raise UserError(f"{folder} holds no actions; train with record_actions=true")
    for path in paths:
        try:
            actions = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as trouble:
            raise UserError(f"{path} is damaged ({trouble})") from trouble
        if actions.dtype != np.uint8 or actions.ndim != 2:
            raise UserError(f"{path} is damaged: it holds {actions.dtype} of shape {actions.shape}")
        yield int(path.stem.rpartition("-")[2]), actions
