"""The known world: which rooms of Montezuma's Revenge a run has reached, and when (Bellemare et al. 2016, figure 4).

The number of the room is a byte of the console's memory, which vector environments do not show; so the recorded actions are played again,
lane by lane, in single emulators that make no pictures.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from envs.api import UserError
from envs.atari import AtariEnv, Emulator
from lab.actions import recorded
from lab.folder import read_config
from lab.run import derive_seed, make_protocol

GAME = "MontezumaRevenge"
ROOM_BYTE = 3
ROWS = (3, 5, 7, 9)
"""Rooms of each floor of the first level, a pyramid; they are numbered from left to right, from the top floor down."""
START = 1


def rooms_reached(folder: Path) -> dict[int, int]:
    """Room -> training frames of all lanes when it was first entered. UserError where the run is of another game or kept no actions."""
    cfg = read_config(folder)
    if cfg["choices"].get("env") != GAME:
        raise UserError(f"{folder} is a run of {cfg['choices'].get('env')}; rooms are those of {GAME}")
    protocol = make_protocol(cfg)
    reached: dict[int, int] = {}
    before = 0
    for iteration, actions in recorded(folder):
        seed = derive_seed(cfg["seed"], iteration, "env")
        seeds = [AtariEnv.lane_seed(seed, lane) for lane in range(actions.shape[1])]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for rooms in pool.map(partial(_first_steps, protocol), seeds, actions.T):
                for room, step in rooms.items():
                    frames = before + step * actions.shape[1] * protocol.frame_skip
                    reached[room] = min(frames, reached.get(room, frames))
        before += actions.size * protocol.frame_skip
    return dict(sorted(reached.items()))


def _first_steps(protocol: object, seed: int, actions: np.ndarray) -> dict[int, int]:
    """Room -> the step of this lane at which it was first seen, from 0."""
    emulator = Emulator(GAME, protocol)  # type: ignore[arg-type]
    first: dict[int, int] = {}
    for step, _ in enumerate(emulator.replay(seed, actions.tolist(), look=False)):
        first.setdefault(int(emulator.ram()[ROOM_BYTE]), step)
    return first


def draw(worlds: dict[str, dict[int, int]], path: Path) -> None:
    """One pyramid a label; rooms that were reached are filled, the earlier the darker."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    latest = max((frames for world in worlds.values() for frames in world.values()), default=1) or 1
    figure, panels = pyplot.subplots(1, len(worlds), figsize=(4.2 * len(worlds), 2.6), squeeze=False, layout="constrained")
    for panel, (label, world) in zip(panels[0], worlds.items()):
        room = 0
        for floor, width in enumerate(ROWS):
            for place in range(width):
                left = place - width / 2
                frames = world.get(room)
                colour = "white" if frames is None else pyplot.get_cmap("viridis")(0.15 + 0.8 * frames / latest)
                panel.add_patch(pyplot.Rectangle((left, -floor), 1, 0.9, facecolor=colour, edgecolor="0.6"))
                panel.text(
                    left + 0.5, 0.45 - floor, str(room), ha="center", va="center", fontsize=7, color="0.5" if frames is None else "white"
                )
                room += 1
        panel.set_xlim(-max(ROWS) / 2, max(ROWS) / 2)
        panel.set_ylim(-len(ROWS) + 0.8, 1.1)
        panel.set_title(f"{label}: {len(world)} of {sum(ROWS)} rooms", fontsize=8)
        panel.set_axis_off()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
