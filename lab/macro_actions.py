"""kind: macro_actions of a bench: does a planner commit to plans in a maze's corridors, and think again at its junctions?

Trained agents play evaluation episodes on GridMaze (Vezhnevets et al. 2016, arXiv 1606.04695, section 4.1). A step is told by the cell that
it starts from: a dead end (1 exit), a corridor (2) or a junction (more). Episodes' first steps, which always plan, count only in the mean.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from agents.actor_critic import ActorCritic
from agents.api import Agent
from agents.loop import evaluate
from agents.planned import Planned
from envs.api import UserError
from envs.gridmaze import GridMaze
from generative.straw import Straw, made_anew
from lab import checkpoint, plan_pictures
from lab.configure import compose
from lab.folder import read_config, write_beside
from lab.plan_pictures import Moment
from lab.run import derive_seed, forked_seed, make_agent, make_env, pick_device

CELLS = ("dead_end", "corridor", "junction")
LANES, EPISODES = 64, 8
FILM_STEPS = 120


class Walk(NamedTuple):
    """T steps of N lanes of a planner in a maze.

    Attributes:
        exits: int (T, N), of the cell that a step starts from.
        opens: bool (T, N), whether a step opens an episode.
        replanned: bool (T, N).
        counted: bool (T, N), false in what a lane plays beyond its quota of episodes.
    """

    exits: np.ndarray
    opens: np.ndarray
    replanned: np.ndarray
    counted: np.ndarray


def tally(walk: Walk) -> dict[str, float | None]:
    """What the steps that count come to; None where there is nothing to divide by.

    `commitment_steps` is steps to a plan. Of each kind of cell, without openings: `CELL_share`, of steps, `CELL_replanned`, the share of
    its steps that plan anew, and `corridor_commitment_steps`, how many steps in corridors come to one plan made there.
    """
    within = walk.counted & ~walk.opens
    kinds = np.clip(walk.exits, 1, 3)
    figures: dict[str, float | None] = {"commitment_steps": _ratio(walk.counted.sum(), (walk.replanned & walk.counted).sum())}
    for kind, name in enumerate(CELLS, 1):
        there = within & (kinds == kind)
        figures[f"{name}_share"] = _ratio(there.sum(), within.sum())
        figures[f"{name}_replanned"] = _ratio((there & walk.replanned).sum(), there.sum())
    corridor = within & (kinds == 2)
    figures["corridor_commitment_steps"] = _ratio(corridor.sum(), (corridor & walk.replanned).sum())
    return figures


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def walk_mazes(env: GridMaze, agent: Agent, episodes: int, seed: int) -> tuple[Walk, list[Moment]]:
    """Plays `episodes` in every lane. Also returns lane 0's first FILM_STEPS moments."""
    env.reset(seed)  # as `evaluate` does first: where the lanes stand before the first tick
    exits = np.stack([env.exits(lane) for lane in range(env.num_envs)])
    lanes, finished = np.arange(env.num_envs), np.zeros(env.num_envs, np.int64)
    here = (env.lanes.grid[0].copy(), env.lanes.agent.copy(), env.lanes.goal[0].copy())
    rows: list[tuple[np.ndarray, ...]] = []
    moments: list[Moment] = []
    for tick in evaluate(env, agent, episodes, seed):
        grid, at, goal = here
        plan = tick.decision.carry.state
        replanned = made_anew(plan).cpu().numpy()
        rows.append((exits[lanes, at[:, 0], at[:, 1]], tick.step.last.cpu().numpy(), replanned, finished < episodes))
        if len(moments) < FILM_STEPS:
            moments.append(Moment(grid, at[0], goal, plan[0].cpu().numpy(), bool(replanned[0]), bool(tick.step.last[0])))
        ended = tick.after.last.cpu().numpy()
        finished = finished + ended
        for lane in np.flatnonzero(ended):
            exits[lane] = env.exits(int(lane))
        here = (env.lanes.grid[0].copy(), env.lanes.agent.copy(), env.lanes.goal[0].copy())
    return Walk(*(np.stack(parts) for parts in zip(*rows))), moments


def check_settings(bench: Mapping[str, Any]) -> None:
    """UserError unless all runs of a bench play GridMaze."""
    for words in bench["runs"]:
        game = compose([*map(str, bench.get("common", [])), *map(str, words)]).choices.env
        if bench.get("games") or game != "GridMaze":
            raise UserError(
                "a bench of kind macro_actions knows the cells of GridMaze alone; put env=GridMaze into bench.common, and no games"
            )


def load_walk(folder: Path, device: torch.device) -> tuple[Walk, list[Moment]] | None:
    """The walk of a finished run, its evaluation's seed another than in training; None where it has no planner with plans like STRAW's."""
    cfg = read_config(folder)
    env = cast(GridMaze, make_env(cfg, LANES, device, for_evaluation=True))
    agent, _ = make_agent(cfg, env.spec, device)
    if not (
        isinstance(agent, ActorCritic) and isinstance(agent.network.policy, Planned) and isinstance(agent.network.policy.planner, Straw)
    ):
        return None
    agent.load_state_dict(checkpoint.load(folder).state["agent"])
    seed = derive_seed(cfg["seed"], 0, "macro-actions")
    with forked_seed(seed):
        walked = walk_mazes(env, agent, EPISODES, seed)
    env.close()
    return walked


def draw_figures(folders: Mapping[str, Sequence[Path]], folder: Path, device: str) -> None:
    """Writes macro_actions.json, .csv and .png, and of each setting's first run with plans a picture and a film, plans-N.png and .mp4."""
    rows: list[dict[str, Any]] = []
    for label, paths in folders.items():
        for path in paths:
            walked = load_walk(path, pick_device(device))
            if walked is None:
                continue
            walk, moments = walked
            if not any(row["setting"] == label for row in rows):
                name = f"plans-{len({row['setting'] for row in rows})}"
                plan_pictures.draw(moments, folder / f"{name}.png", label)
                plan_pictures.film(moments, folder / f"{name}.mp4")
            rows.append({"setting": label, "seed": int(path.name.rpartition("-")[2]), **tally(walk)})
    write_beside(folder / "macro_actions.json", json.dumps(rows, indent=2))
    if not rows:
        return
    with (folder / "macro_actions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    plan_pictures.draw_shares(rows, CELLS, folder / "macro_actions.png")
    for row in rows:
        shares = ", ".join(f"{name.replace('_', ' ')} {100 * (row[f'{name}_replanned'] or 0):.0f} %" for name in CELLS)
        print(f"{row['setting']} seed {row['seed']}: {row['commitment_steps']:.1f} steps to a plan; plans anew at: {shares}")
