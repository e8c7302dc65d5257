"""The maze seen from above of STRAW (Vezhnevets et al. 2016, arXiv 1606.04695, section 4.1): pixels in, one frame a step.

Lanes live on the host and are moved by compiled loops. Everything random in a lane comes from its own stream (`envs.mazes`). A
goal that stays draws nothing, so a lane's row of mazes follows from its seed alone, whoever walks them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from envs.api import Spec, Step, UserError, check_actions, first_step
from envs.mazes import DOWN, RIGHT, SOLID, make_functions
from envs.seeds import lane_seed
from envs.transfer import Transfer

ACTIONS = ("UP", "DOWN", "LEFT", "RIGHT")
FLOOR, WALL, GOAL, AGENT = range(4)
PALETTES = {"rgb": ((240, 240, 240), (32, 32, 32), (30, 90, 220), (220, 50, 30)), "grey": ((170,), (0,), (85,), (255,))}
"""What floor, wall, goal and agent look like: a value a channel. The agent hides a goal that it stands on."""
LEAST_SIZE, MOST_SIZE, MOST_PIXELS = 5, 99, 1024
SURE = 2**32  # a chance of 1, as what a roll of so many sides must lie below


class Lanes(NamedTuple):
    """N lanes, as arrays on the host.

    Attributes:
        grid: uint8 (N, S, S), FLOOR or WALL.
        agent: int32 (N, 2), row and column.
        goal: int32 (N, 2), row and column.
        clock: int32 (N), steps since the episode began.
        dice: uint64 (N), states of random streams.
    """

    grid: np.ndarray
    agent: np.ndarray
    goal: np.ndarray
    clock: np.ndarray
    dice: np.ndarray


class GridMaze:
    """A new random maze for every episode; the agent walks to the goal, which gives reward 1 and ends the episode.

    Rooms are cells in a square lattice, `room_steps` apart: with 2 those of odd row and column. Corridors that depth-first search carves
    between them join any two by exactly one way (a perfect maze), unless `openings` makes loops. Agent and goal begin in two different
    random rooms. Actions go a cell up, down, left or right; walls hold. Every step costs `step_cost`, the last one too. At the time limit
    an episode is cut with discount 1. Optimal: the shortest way. Sizes, rewards and limits are ours: the paper's could not be confirmed.

    The default picture is 44x44: one 4x4 patch of the agents' large torso is one cell. With pixels_per_cell=1 the small torso sees 11x11.

    Args:
        num_envs: N, lanes.
        device: where tensors lie.
        size: S, rows and columns with the walls around: room_steps (R - 1) + 3, of R^2 rooms, R at least 2.
        room_steps: steps from a room to the next, 2 or more. Longer corridors leave fewer rooms, so fewer choices, in as large a picture.
        openings: the chance that a wall between two neighbouring rooms is open although the perfect maze has it closed.
        step_cost: what every step costs.
        goal_moves: the chance, after every step that did not reach it, that the goal jumps to another random room.
        max_steps: the time limit; None for 2 S^2, over four times the longest way; 0 for none.
        colours: rgb or grey.
        pixels_per_cell: the side of a cell in the picture.

    UserError on a bad knob, among them a time limit that the longest way between two rooms might exceed.
    """

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        size: int = 11,
        room_steps: int = 2,
        openings: float = 0.0,
        step_cost: float = 0.01,
        goal_moves: float = 0.0,
        max_steps: int | None = None,
        colours: str = "rgb",
        pixels_per_cell: int = 4,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        if not LEAST_SIZE <= size <= MOST_SIZE:
            raise UserError(f"GridMaze: size must lie in {LEAST_SIZE}..{MOST_SIZE}, got {size}")
        if not 2 <= room_steps <= size - 3:
            raise UserError(f"GridMaze: room_steps must lie in 2..{size - 3} for size {size}, got {room_steps}")
        if (size - 3) % room_steps:
            fit = size - (size - 3) % room_steps
            raise UserError(f"GridMaze: size must be 3 more than a multiple of room_steps, {room_steps}, such as {fit}, got {size}")
        for name, chance in (("openings", openings), ("goal_moves", goal_moves)):
            if not 0 <= chance <= 1:
                raise UserError(f"GridMaze: {name} is a chance and must lie in 0..1, got {chance}")
        if not 0 <= step_cost < math.inf:
            raise UserError(f"GridMaze: step_cost must be 0 or more, and finite, got {step_cost}")
        longest = room_steps * (_rooms(size, room_steps) ** 2 - 1)  # through every room
        self._limit = 2 * size * size if max_steps is None else max_steps
        if self._limit < 0 or 0 < self._limit < longest:
            raise UserError(f"GridMaze: max_steps must be 0 (no limit) or, for size {size}, at least {longest}, got {max_steps}")
        if colours not in PALETTES:
            raise UserError(f"GridMaze: colours is one of {', '.join(PALETTES)}, got {colours}")
        if not 1 <= pixels_per_cell <= MOST_PIXELS // size:
            raise UserError(f"GridMaze: pixels_per_cell must lie in 1..{MOST_PIXELS // size} for size {size}, got {pixels_per_cell}")
        self.num_envs, self.size, self.step_cost, self._room_steps = num_envs, size, float(step_cost), room_steps
        self._openings, self._goal_moves = round(openings * SURE), round(goal_moves * SURE)
        self._palette = np.array(PALETTES[colours], np.uint8)
        edge = size * pixels_per_cell
        self.spec = Spec("GridMaze", len(ACTIONS), ACTIONS, (self._palette.shape[1], edge, edge), 1)
        self._transfer = Transfer(device)
        self._lanes: Lanes | None = None
        self._action: np.ndarray | None = None

    @property
    def lanes(self) -> Lanes:
        """The lanes' state, to be looked at between steps. RuntimeError before reset."""
        if self._lanes is None:
            raise RuntimeError("lanes come with reset")
        return self._lanes

    def reset(self, seed: int) -> Step:
        """Starts every lane anew; all that is random follows from `seed`. Drains a pending send."""
        count, size = self.num_envs, self.size
        self._action = None
        self._lanes = Lanes(
            grid=np.zeros((count, size, size), np.uint8),
            agent=np.zeros((count, 2), np.int32),
            goal=np.zeros((count, 2), np.int32),
            clock=np.zeros(count, np.int32),
            dice=np.array([lane_seed(seed, lane) for lane in range(count)], np.uint64),
        )
        everyone = np.ones(count, np.bool_)
        _open_lanes(self._lanes, everyone, self._room_steps, self._openings)
        (obs,) = self._transfer(self._draw(everyone))
        return first_step(obs)

    def send(self, action: Tensor) -> None:
        """Takes int64 (N) actions on any device. ValueError where one is out of range."""
        if self._lanes is None or self._action is not None:
            raise RuntimeError("send comes after reset or recv")
        action = action.cpu()
        check_actions(action, self.num_envs, self.spec.num_actions)
        self._action = action.numpy().copy()

    def recv(self) -> Step:
        """Plays the step that `send` began."""
        if self._lanes is None or self._action is None:
            raise RuntimeError("recv comes after send")
        action, self._action = self._action, None
        reward, terminated, last = (np.empty(self.num_envs, dtype) for dtype in (np.float32, np.bool_, np.bool_))
        _step_lanes(self._lanes, action, self._room_steps, self.step_cost, self._goal_moves, self._limit, reward, terminated, last)
        discount = 1 - terminated.astype(np.float32)
        seen = self._draw(np.ones(self.num_envs, np.bool_))
        if not last.any():
            obs, *rest = self._transfer(seen, reward, discount, last)
            return Step(obs, rest[0], rest[1], rest[2], obs)
        _open_lanes(self._lanes, last, self._room_steps, self._openings)
        return Step(*self._transfer(self._draw(last, seen.copy()), reward, discount, last, seen))

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Forgets the lanes. Twice is harmless."""
        self._lanes = self._action = None

    def exits(self, lane: int) -> np.ndarray:
        """int64 (S, S): how many neighbours of a floor cell are floor (1 a dead end, 2 a corridor, more a junction); 0 for walls."""
        floor = (self.lanes.grid[lane] == FLOOR).astype(np.int64)
        around = np.pad(floor, 1)
        return floor * (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:])

    def distances(self, lane: int) -> np.ndarray:
        """int32 (S, S): steps from each cell to the goal, -1 for walls."""
        return _distances(self.lanes.grid[lane], *self.lanes.goal[lane])

    def shortest(self, lane: int) -> np.ndarray:
        """int64 (D): the actions of a shortest way from agent to goal, D >= 1 long; where there are several, the first by action."""
        distances, (row, column), actions = self.distances(lane), self.lanes.agent[lane].tolist(), []
        for distance in range(distances[row, column] - 1, -1, -1):
            action = next(k for k in range(len(ACTIONS)) if distances[row + DOWN[k], column + RIGHT[k]] == distance)
            row, column = row + DOWN[action], column + RIGHT[action]
            actions.append(action)
        return np.array(actions, np.int64)

    def optimal_return(self, gamma: float = 1.0) -> Tensor:
        """float64 (N): what each lane's agent can still get from where it stands, gamma^(D - 1) - step_cost (1 + gamma + ... +
        gamma^(D - 1)) over a shortest way of D steps, for a goal that stays. Time limits are not counted as ends."""
        lengths = [int(self.distances(lane)[tuple(self.lanes.agent[lane])]) for lane in range(self.num_envs)]
        return torch.tensor([gamma ** (d - 1) - self.step_cost * sum(gamma**t for t in range(d)) for d in lengths], dtype=torch.float64)

    def _draw(self, which: np.ndarray, pictures: np.ndarray | None = None) -> np.ndarray:
        """uint8 (N, C, H, W): `pictures`, or new ones, with those lanes drawn where which bool (N)."""
        pictures = np.empty((self.num_envs, *self.spec.obs_shape), np.uint8) if pictures is None else pictures
        _draw_lanes(self.lanes, which, self._palette, pictures)
        return pictures


_roll, _carve = make_functions(njit(error_model="numpy"))


@njit(cache=True)
def _rooms(size, room_steps):
    """How many rooms stand side by side."""
    return (size - 3) // room_steps + 1


@njit(cache=True)
def _room(number, side, room_steps):
    """Row and column of a room, of side * side."""
    return 1 + room_steps * (number // side), 1 + room_steps * (number % side)


@njit(cache=True)
def _make_maze(grid, dice, n, room_steps, openings):
    """A random maze; of the walls between two rooms, each opens where a roll lies below `openings`."""
    least = 2 * _rooms(grid.shape[0], room_steps) + 1  # the same maze with a cell a corridor
    plan = np.empty((least, least), np.uint8)
    _carve(plan, dice, n)
    for row in range(least):
        for column in range(least):
            if plan[row, column] == SOLID:
                inside = 0 < row < least - 1 and 0 < column < least - 1 and (row + column) % 2 == 1
                plan[row, column] = FLOOR if inside and _roll(dice, n, SURE) < openings else WALL
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            grid[row, column] = plan[_place(row, room_steps), _place(column, room_steps)]


@njit(cache=True)
def _place(row, room_steps):
    """The row, or column, of a maze with a cell a corridor that becomes `row` of one with longer corridors."""
    room, beyond = (row - 1) // room_steps, (row - 1) % room_steps
    return 2 * room + 1 + (beyond > 0)


@njit(cache=True)
def _open_lanes(lanes, which, room_steps, openings):
    """Begins an episode in the lanes where which bool (N)."""
    side = _rooms(lanes.grid.shape[1], room_steps)
    for n in range(which.shape[0]):
        if which[n]:
            _make_maze(lanes.grid[n], lanes.dice, n, room_steps, openings)
            start, goal = _roll(lanes.dice, n, side * side), _roll(lanes.dice, n, side * side - 1)
            lanes.agent[n] = _room(start, side, room_steps)
            lanes.goal[n] = _room(goal + (goal >= start), side, room_steps)
            lanes.clock[n] = 0


@njit(cache=True)
def _step_lanes(lanes, actions, room_steps, step_cost, goal_moves, limit, reward, terminated, last):
    """Plays a step of all lanes by actions int64 (N); writes reward float32 (N), terminated and last bool (N)."""
    side = _rooms(lanes.grid.shape[1], room_steps)
    for n in range(actions.shape[0]):
        agent, goal = lanes.agent[n], lanes.goal[n]
        row, column = agent[0] + DOWN[actions[n]], agent[1] + RIGHT[actions[n]]
        if lanes.grid[n, row, column] != WALL:
            agent[0], agent[1] = row, column
        lanes.clock[n] += 1
        terminated[n] = agent[0] == goal[0] and agent[1] == goal[1]
        last[n] = terminated[n] or (limit > 0 and lanes.clock[n] >= limit)
        reward[n] = (1.0 if terminated[n] else 0.0) - step_cost
        if goal_moves > 0 and not terminated[n] and _roll(lanes.dice, n, SURE) < goal_moves:
            while True:
                row, column = _room(_roll(lanes.dice, n, side * side), side, room_steps)
                if (row != agent[0] or column != agent[1]) and (row != goal[0] or column != goal[1]):
                    break
            goal[0], goal[1] = row, column


@njit(cache=True)
def _draw_lanes(lanes, which, palette, pictures):
    """Draws the lanes where which bool (N) into pictures uint8 (N, C, H, W)."""
    size, zoom = lanes.grid.shape[1], pictures.shape[2] // lanes.grid.shape[1]
    for n in range(which.shape[0]):
        if which[n]:
            cells = lanes.grid[n].copy()
            cells[lanes.goal[n, 0], lanes.goal[n, 1]] = GOAL
            cells[lanes.agent[n, 0], lanes.agent[n, 1]] = AGENT
            for channel in range(palette.shape[1]):
                for row in range(size):
                    top = pictures[n, channel, row * zoom]
                    for column in range(size):
                        value = palette[cells[row, column], channel]
                        for x in range(column * zoom, (column + 1) * zoom):
                            top[x] = value
                    for y in range(1, zoom):
                        pictures[n, channel, row * zoom + y] = top


@njit(cache=True)
def _distances(grid, row, column):
    """int32 (S, S): steps from each floor cell to the one at `row` and `column`, by breadth-first search; -1 for walls."""
    distances = np.full(grid.shape, -1, np.int32)
    queue = np.empty((grid.size, 2), np.int64)
    distances[row, column] = 0
    queue[0, 0], queue[0, 1] = row, column
    done, known = 0, 1
    while done < known:
        row, column = queue[done]
        done += 1
        for way in range(4):
            r, c = row + DOWN[way], column + RIGHT[way]
            if grid[r, c] != WALL and distances[r, c] < 0:
                distances[r, c] = distances[row, column] + 1
                queue[known, 0], queue[known, 1] = r, c
                known += 1
    return distances
