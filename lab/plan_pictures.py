"""Pictures and films of plans that unroll over a maze: where the plan leads, what it says (A), and when it will be made anew (c)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.gridmaze import PALETTES, WALL
from envs.mazes import DOWN, RIGHT
from envs.stats import write_mp4

CELL = 24  # pixels
FPS = 3
LEAST_CHANCE = 0.05  # that a plan is still followed; where it falls below, its end is not drawn
FLASH, AHEAD = np.array([255, 170, 0], np.uint8), np.array([150, 60, 170], np.uint8)


class Moment(NamedTuple):
    """A step of one lane.

    Attributes:
        grid: uint8 (S, S), floor and walls.
        agent: int (2), row and column that the step starts from.
        goal: int (2).
        plan: float (A + 1, T), after planning: its first column is acted on.
        replanned: whether the plan was made in this step.
        opens: whether it opens an episode.
    """

    grid: np.ndarray
    agent: np.ndarray
    goal: np.ndarray
    plan: np.ndarray
    replanned: bool
    opens: bool


def chances(plan: np.ndarray) -> np.ndarray:
    """float (A, T): the softmax of each column of an action-plan (A, T)."""
    heights = np.exp(plan - plan.max(0))
    return heights / heights.sum(0)


def way_ahead(moment: Moment) -> list[tuple[int, int, float]]:
    """Row, column and the chance that the plan is followed that far, after each step of the plan's likeliest actions.

    The chance of the first step is 1, and of step k the product of 1 - c_j over the columns j before. Ends at the goal and where the chance
    falls below LEAST_CHANCE.
    """
    (row, column), followed, way = moment.agent.tolist(), 1.0, []
    for action, chance in zip(moment.plan[:-1].argmax(0), moment.plan[-1]):
        if moment.grid[row + DOWN[action], column + RIGHT[action]] != WALL:
            row, column = row + DOWN[action], column + RIGHT[action]
        way.append((row, column, followed))
        followed *= 1 - float(chance)
        if [row, column] == moment.goal.tolist() or followed < LEAST_CHANCE:
            break
    return way


def paint_maze(moment: Moment, ahead: bool = True) -> np.ndarray:
    """uint8 (S * CELL, S * CELL, 3): the maze, the agent, the goal and dots where the plan leads, the paler the less likely."""
    floor, wall, goal, agent = np.array(PALETTES["rgb"], np.uint8)
    picture = np.where(moment.grid[..., None] == WALL, wall, floor).astype(np.uint8)
    picture[tuple(moment.goal)] = goal
    picture = picture.repeat(CELL, 0).repeat(CELL, 1)
    _disc(picture, moment.agent[0], moment.agent[1], 0.4, agent, 1.0)
    for row, column, chance in way_ahead(moment) if ahead else []:
        _disc(picture, row, column, 0.2, AHEAD, chance)
    return picture


def paint(moment: Moment) -> np.ndarray:
    """uint8 (H, W, 3): the maze in a frame that flashes where the plan is made, and beneath it A, a row an action, and c, black for 1."""
    maze = paint_maze(moment)
    frame = FLASH if moment.replanned else np.full(3, 255, np.uint8)
    framed = np.broadcast_to(frame, (maze.shape[0] + CELL, maze.shape[1] + CELL, 3)).copy()
    half = CELL // 2
    framed[half:-half, half:-half] = maze
    shown = np.concatenate([chances(moment.plan[:-1]), np.zeros((1, moment.plan.shape[1])), moment.plan[-1:]])
    rows = np.arange(len(shown) * half) // half
    columns = np.arange(framed.shape[1]) * shown.shape[1] // framed.shape[1]
    grey = np.uint8(255) - (255 * shown[rows][:, columns]).astype(np.uint8)
    return np.concatenate([framed, np.repeat(grey[..., None], 3, 2)])


def film(moments: Sequence[Moment], path: Path) -> None:
    """An mp4 of the moments; a plan that was just made is shown twice as long."""
    write_mp4(path, [paint(moment) for moment in moments for _ in range(1 + moment.replanned)], fps=FPS)


def draw(moments: Sequence[Moment], path: Path, title: str, count: int = 4) -> None:
    """The first episodes, a column each: the path with dots where it planned, and A over c of the plan that was followed longest."""
    pyplot = _pyplot()
    episodes: list[list[Moment]] = []
    for moment in moments:
        if moment.opens:
            episodes.append([])
        episodes[-1].append(moment)
    episodes = sorted(episodes, key=len)[-count:]
    figure, panels = pyplot.subplots(
        3, len(episodes), figsize=(2.6 * len(episodes), 5.4), layout="constrained", squeeze=False, height_ratios=(5, 2, 1)
    )
    for column, episode in enumerate(episodes):
        longest = _longest_followed(episode)
        maze, actions, commitment = panels[:, column]
        maze.imshow(paint_maze(episode[longest]))
        cells = [moment.agent for moment in episode]
        if np.abs(episode[-1].agent - episode[-1].goal).sum() == 1:
            cells.append(episode[-1].goal)
        at = (np.array(cells) + 0.5) * CELL - 0.5
        maze.plot(at[:, 1], at[:, 0], color="C3", linewidth=1)
        planned = at[: len(episode)][[moment.replanned for moment in episode]]
        maze.plot(planned[:, 1], planned[:, 0], "o", color="C1", markersize=5)
        maze.axis("off")
        actions.imshow(chances(episode[longest].plan[:-1]), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        actions.set_yticks(range(4), ("up", "down", "left", "right") if column == 0 else ("",) * 4, fontsize=7)
        actions.set_xticks([])
        commitment.imshow(episode[longest].plan[-1:], cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        commitment.set_yticks([0], ["plan anew"] if column == 0 else [""], fontsize=7)
        commitment.tick_params(labelsize=7)
        commitment.set_xlabel("steps ahead", fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_shares(rows: Sequence[Mapping[str, Any]], cells: Sequence[str], path: Path) -> None:
    """The share of steps that planned anew by kind of cell, a group of bars a setting, a dot a seed."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    for place, name in enumerate(cells):
        for group, setting in enumerate(settings):
            shares = [row[f"{name}_replanned"] or 0.0 for row in rows if row["setting"] == setting]
            at = group + 0.25 * (place - 1)
            panel.bar(at, np.mean(shares), 0.22, color=f"C{place}", alpha=0.6, label=name.replace("_", " ") if group == 0 else None)
            panel.plot([at] * len(shares), shares, "o", color="0.2", markersize=3)
    panel.set_xticks(range(len(settings)), [setting.replace(" ", "\n", 1) for setting in settings], fontsize=7)
    panel.set_ylabel("share of steps that plan anew")
    panel.legend(fontsize=7, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _longest_followed(episode: Sequence[Moment]) -> int:
    """The place of the plan that most steps followed, the first of several."""
    starts = [index for index, moment in enumerate(episode) if moment.replanned] or [0]
    lengths = np.diff([*starts, len(episode)])
    return starts[int(lengths.argmax())]


def _disc(picture: np.ndarray, row: int, column: int, radius: float, colour: np.ndarray, opacity: float) -> None:
    """Paints a disc of `radius` cells in the middle of a cell."""
    middle = (np.arange(CELL) + 0.5) / CELL - 0.5
    inside = middle[:, None] ** 2 + middle**2 < radius**2
    cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    cell[inside] = (opacity * colour + (1 - opacity) * cell[inside]).astype(np.uint8)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
