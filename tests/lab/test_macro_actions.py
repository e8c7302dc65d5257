"""Macro-actions in mazes: counts and pictures of walks whose answer is known."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch

import launch
from agents.actor_critic import ActorCritic
from envs.api import UserError
from envs.gridmaze import FLOOR, WALL, GridMaze
from generative.api import PlanStep
from generative.straw import Straw, time_shift
from lab.bench import run
from lab.configure import compose
from lab.macro_actions import Walk, draw_figures, tally, walk_mazes
from lab.plan_pictures import CELL, FLASH, Moment, chances, draw, draw_shares, film, paint, way_ahead

CPU = torch.device("cpu")


class EveryThird(Straw):
    """Plans at every third step of an episode, and acts at random."""

    def advance(self, features, plan, noise=None):
        due = plan[:, -1, 0] == 1
        fresh = torch.zeros_like(plan)
        fresh[:, -1, 2::3] = 1
        fresh[:, -1, -1] = 1
        plan = torch.where(due.view(-1, 1, 1), fresh, time_shift(plan))
        return PlanStep(plan[:, :-1, 0], plan, due, torch.zeros(len(plan)), torch.zeros(len(plan), 1))


def walk(exits, opens, replanned, counted=None):
    arrays = [np.array(rows).T for rows in (exits, opens, replanned)]
    return Walk(
        arrays[0], *(part.astype(bool) for part in arrays[1:]), np.ones(arrays[0].shape, bool) if counted is None else np.array(counted).T
    )


def test_shares_by_hand():
    exits = [[1, 2, 2, 3, 2, 1], [2, 2, 4, 2, 2, 2]]
    opens = [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]]
    replanned = [[1, 0, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1]]
    counted = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    assert tally(walk(exits, opens, replanned, counted)) == {
        "commitment_steps": 10 / 6,
        "dead_end_share": 1 / 8,
        "dead_end_replanned": 1.0,
        "corridor_share": 5 / 8,
        "corridor_replanned": 1 / 5,
        "junction_share": 2 / 8,
        "junction_replanned": 1.0,
        "corridor_commitment_steps": 5.0,
    }


def test_what_never_happened_is_none():
    figures = tally(walk([[2, 2]], [[1, 0]], [[1, 0]]))
    assert figures == dict.fromkeys(figures) | {
        "commitment_steps": 2,
        "dead_end_share": 0,
        "corridor_share": 1,
        "corridor_replanned": 0,
        "junction_share": 0,
    }


def test_a_planner_that_plans_every_third_step():
    torch.manual_seed(0)
    env = GridMaze(6, CPU, size=7, pixels_per_cell=1)
    planner = EveryThird(env.spec.obs_shape, env.spec.num_actions, CPU, plan_steps=9, filters=2, hidden=4)
    agent = ActorCritic(env.spec, CPU, planner=planner, stack_frames=1)
    seen, moments = walk_mazes(env, agent, 2, seed=3)
    clock = np.zeros(6, int)
    for opens, replanned in zip(seen.opens, seen.replanned):
        clock = np.where(opens, 0, clock + 1)
        assert (replanned == (clock % 3 == 0)).all()
    assert seen.opens[0].all()
    assert set(np.unique(seen.exits)) <= {1, 2, 3, 4}
    assert (seen.opens & seen.counted).sum(0).tolist() == [2] * 6
    assert not seen.counted[-1].all()
    for moment, exits in zip(moments, seen.exits[:, 0]):
        row, column = moment.agent
        around = moment.grid[[row - 1, row + 1, row, row], [column, column, column - 1, column + 1]]
        assert moment.grid[row, column] == FLOOR
        assert (around == FLOOR).sum() == exits
    assert [moment.replanned for moment in moments] == seen.replanned[: len(moments), 0].tolist()
    for one, other in itertools.pairwise(moments):
        assert other.opens or np.abs(one.agent - other.agent).sum() <= 1


def corridor(commitment, replanned=True) -> Moment:
    """A corridor of four cells, the agent at its left and the goal at its right end; the plan goes right, into the wall at last."""
    grid = np.full((3, 7), WALL, np.uint8)
    grid[1, 1:6] = FLOOR
    plan = np.zeros((5, len(commitment)), np.float32)
    plan[3] = 2.0
    plan[-1] = commitment
    return Moment(grid, np.array([1, 1]), np.array([1, 5]), plan, replanned, True)


def test_the_way_ahead_by_hand():
    assert way_ahead(corridor([0, 0.5, 0, 0, 0, 0])) == [(1, 2, 1.0), (1, 3, 1.0), (1, 4, 0.5), (1, 5, 0.5)]
    assert way_ahead(corridor([0, 1, 0, 0])) == [(1, 2, 1.0), (1, 3, 1.0)]
    stuck = corridor([0, 0])._replace(agent=np.array([1, 5]), goal=np.array([1, 1]))
    assert way_ahead(stuck) == [(1, 5, 1.0), (1, 5, 1.0)]


def test_columns_become_chances():
    found = chances(np.log(np.array([[1.0, 2.0], [3.0, 2.0]])) + 5)
    np.testing.assert_allclose(found, [[0.25, 0.5], [0.75, 0.5]])


def test_a_frame_flashes_where_it_plans_and_stands_over_the_plan():
    fresh, kept = paint(corridor([0, 1, 0, 0])), paint(corridor([0, 1, 0, 0], replanned=False))
    assert (fresh[0, 0] == FLASH).all()
    assert (kept[0, 0] == 255).all()
    middle = slice(CELL // 2, 3 * CELL + CELL // 2)
    assert (fresh[middle, CELL:-CELL] == kept[middle, CELL:-CELL]).all()
    bottom, quarter = fresh[-1, :, 0], fresh.shape[1] // 4
    assert [int(bottom[quarter // 2 + k * quarter]) for k in range(4)] == [255, 0, 255, 255]  # c: certain to plan after the second step


def test_pictures_and_a_film_are_written(tmp_path):
    moments = [corridor([0, 1, 0, 0]), corridor([1, 0, 0, 0], replanned=False)._replace(opens=False), corridor([0, 0, 0, 0])]
    draw(moments, tmp_path / "plans.png", "straw")
    film(moments, tmp_path / "plans.mp4")
    rows = [{"setting": name, "a_replanned": 0.5, "b_replanned": None} for name in ("one", "one", "two")]
    draw_shares(rows, ("a", "b"), tmp_path / "shares.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("plans.png", "plans.mp4", "shares.png"))


def listed(words: str) -> str:
    """A list as a word of the door's, its own words in quotes."""
    return "[" + ",".join(f"'{word}'" for word in words.split()) + "]"


def test_other_worlds_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="GridMaze alone"):
        run(compose(["job=bench", "bench=macro_actions", f"runs_dir={tmp_path}", f"bench.common={listed('env=Catch agent=a3c')}"]))
    assert not list(tmp_path.iterdir())


def test_runs_become_figures(tmp_path):
    """Two settings trained for an instant: figures of the planner, none of the other."""
    common = "env=GridMaze env.size=5 env.pixels_per_cell=1 agent=a3c agent.stack_frames=1 wandb=off device=cpu"
    tiny = "num_envs=4 frames=80 frames_per_iteration=80 evaluation.num_envs=2 evaluation.video=false"
    settings = {"agent=a3c": "agent.n_steps=5", "planner=straw": "planner=straw planner.plan_steps=6 planner.filters=2 planner.hidden=4"}
    folders = {label: [tmp_path / f"{label}-seed-7"] for label in settings}
    for label, words in settings.items():
        own = f"runs_dir={tmp_path} run_name={folders[label][0].name}"
        assert launch.main(f"{common} {tiny} {words} {own}".split()) == 0
    draw_figures(folders, tmp_path, "cpu")
    (row,) = json.loads((tmp_path / "macro_actions.json").read_text())
    assert (row["setting"], row["seed"]) == ("planner=straw", 7)
    assert row["commitment_steps"] >= 1
    assert [float(line["commitment_steps"]) for line in csv.DictReader((tmp_path / "macro_actions.csv").open())] == [
        row["commitment_steps"]
    ]
    for name in ("macro_actions.png", "plans-0.png", "plans-0.mp4"):
        assert (tmp_path / name).exists(), name
