"""What happens in a lane, as plain scalar functions of its number, compiled for CPU threads and for CUDA.

Units: a cell of the map is 1, time goes by frames, 60 a second. The body is a disc that walls stop along each axis by itself, so it slides
along them. It has inertia: of what it walks and turns in a frame a share outlives it, and the rest is what the action asks for.

Everything random comes from the lane's own stream (`envs.mazes`), so a lane's fate follows from its seed and actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from envs import mazes

FRAMES_PER_SECOND = 60
FRAMES_PER_STEP = 4
WALK = 3.0 / FRAMES_PER_SECOND  # cells a frame
TURN = math.radians(180.0) / FRAMES_PER_SECOND  # a frame
BODY = 0.2  # radius
REACH = 0.45  # a thing whose centre is nearer is taken
SKIN = 1e-6  # between body and wall, so that rounding puts nobody into it
TRIES = 1000  # to find a free random cell
THEN = ("gone", "elsewhere", "restart", "end")
"""What follows where a thing is taken: it vanishes; it comes back at a random free place; the lane goes back to a start and draws anew; its
episode ends."""
GONE, ELSEWHERE, RESTART, END = range(4)
ACTIONS = ("MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT", "FORWARD", "BACKWARD", "FORWARD_TURN_LEFT", "FORWARD_TURN_RIGHT")
AHEAD, ASIDE, TURNS = (0, 0, 0, 0, 1, -1, 1, 1), (-1, 1, 0, 0, 0, 0, 0, 0), (0, 0, -1, 1, 0, 0, -1, 1)  # of each action; to the right


class Rules(NamedTuple):
    """A level, as arrays. S things, K slots, O alternatives, T starts.

    Attributes:
        base: uint8 (R, C), the map: 0 floor, else a wall of look value - 1.
        roomy: bool (R, C), where random things and starts may lie.
        starts: float64 (T, 3), x, y and angle, nan for a random angle; none: a random cell that is roomy.
        kinds: int8 (S), of things at an episode's start; -1 where a draw decides.
        homes: int32 (S, 2), row and column of things, -1 for a random place.
        slots: int32 (K, 3), row, column and thing of what draws decide.
        draws: int8 (O, K), what each alternative puts there: a wall of look value - 1, nothing (0), or a thing of kind -value - 1.
        reward: float32 (kinds).
        then: int8 (kinds), see THEN.
        maze: int8 (1), whether the map is carved anew for every episode, by corridors between cells of odd row and column.
        limit: int32 (1), frames of an episode.
        inertia: float64 (2), the share of walking and of turning that outlives a frame.
    """

    base: np.ndarray
    roomy: np.ndarray
    starts: np.ndarray
    kinds: np.ndarray
    homes: np.ndarray
    slots: np.ndarray
    draws: np.ndarray
    reward: np.ndarray
    then: np.ndarray
    maze: np.ndarray
    limit: np.ndarray
    inertia: np.ndarray


class Lanes(NamedTuple):
    """N lanes, as arrays.

    Attributes:
        pose: float64 (N, 3), x, y and angle; angles grow clockwise on the map.
        speed: float64 (N, 3), of each, a frame.
        grid: uint8 (N, R, C), 0 floor, else a wall of look value - 1.
        kinds: int8 (N, S), of things, -1 where there is none.
        places: float32 (N, S, 2), x and y of things.
        clock: int32 (N), frames since the episode began.
        dice: uint64 (N), states of random streams.
    """

    pose: np.ndarray
    speed: np.ndarray
    grid: np.ndarray
    kinds: np.ndarray
    places: np.ndarray
    clock: np.ndarray
    dice: np.ndarray


def make_functions(compiled: Callable[..., Any]) -> tuple[Any, Any]:
    """(open_lane, step_lane), compiled by `compiled`, the decorator of the CPU or of CUDA."""

    roll, carve = mazes.make_functions(compiled)

    def free_cell(rules, lanes, n):
        """row * C + column of a random cell that is roomy, without a wall or a thing and not under the body; some roomy one if none is."""
        rows, columns = rules.base.shape
        cell = columns + 1
        for _ in range(TRIES):
            row, column = roll(lanes.dice, n, rows), roll(lanes.dice, n, columns)
            if not rules.roomy[row, column] or lanes.grid[n, row, column] != 0:
                continue
            cell = row * columns + column
            free = abs(lanes.pose[n, 0] - column - 0.5) > 1.0 or abs(lanes.pose[n, 1] - row - 0.5) > 1.0
            for s in range(lanes.kinds.shape[1]):
                if lanes.kinds[n, s] >= 0 and int(lanes.places[n, s, 0]) == column and int(lanes.places[n, s, 1]) == row:
                    free = False
            if free:
                break
        return cell

    free_cell = compiled(free_cell)

    def scatter(rules, lanes, n, s):
        """Puts thing s at a random free place."""
        kind = lanes.kinds[n, s]
        lanes.kinds[n, s] = -1
        cell = free_cell(rules, lanes, n)
        lanes.kinds[n, s] = kind
        lanes.places[n, s, 0] = cell % rules.base.shape[1] + 0.5
        lanes.places[n, s, 1] = cell // rules.base.shape[1] + 0.5

    scatter = compiled(scatter)

    def start(rules, lanes, n):
        """Draws anew, and takes the body to a start."""
        if rules.draws.shape[0] > 0:
            drawn = roll(lanes.dice, n, rules.draws.shape[0])
            for k in range(rules.slots.shape[0]):
                row, column, s = rules.slots[k, 0], rules.slots[k, 1], rules.slots[k, 2]
                value = rules.draws[drawn, k]
                lanes.grid[n, row, column] = max(value, 0)
                lanes.kinds[n, s] = max(-value - 1, -1)
        if rules.starts.shape[0] > 0:
            t = roll(lanes.dice, n, rules.starts.shape[0])
            x, y, angle = rules.starts[t, 0], rules.starts[t, 1], rules.starts[t, 2]
        else:
            cell = free_cell(rules, lanes, n)
            x, y, angle = cell % rules.base.shape[1] + 0.5, cell // rules.base.shape[1] + 0.5, math.nan
        if math.isnan(angle):
            angle = roll(lanes.dice, n, 1 << 20) * (2.0 * math.pi / (1 << 20))
        lanes.pose[n, 0], lanes.pose[n, 1], lanes.pose[n, 2] = x, y, angle
        lanes.speed[n, 0], lanes.speed[n, 1], lanes.speed[n, 2] = 0.0, 0.0, 0.0

    start = compiled(start)

    def open_lane(rules, lanes, n):
        """Begins an episode in lane n."""
        lanes.clock[n] = 0
        if rules.maze[0] > 0:
            carve(lanes.grid[n], lanes.dice, n)
        for row in range(rules.base.shape[0]):
            for column in range(rules.base.shape[1]):
                if rules.maze[0] == 0 or lanes.grid[n, row, column] != 0:
                    lanes.grid[n, row, column] = rules.base[row, column]
        for s in range(rules.kinds.shape[0]):
            lanes.kinds[n, s] = -1
        lanes.pose[n, 0], lanes.pose[n, 1] = -9.0, -9.0  # nowhere
        for s in range(rules.kinds.shape[0]):
            lanes.kinds[n, s] = rules.kinds[s]
            lanes.places[n, s, 0], lanes.places[n, s, 1] = rules.homes[s, 1] + 0.5, rules.homes[s, 0] + 0.5
            if rules.homes[s, 0] < 0:
                scatter(rules, lanes, n, s)
        start(rules, lanes, n)

    def glide(lanes, n, axis):
        """Moves the body along x (axis 0) or y (1) by its speed as far as walls let it; one that stops it takes the speed."""
        at, move, across = lanes.pose[n, axis], lanes.speed[n, axis], lanes.pose[n, 1 - axis]
        front, low, high = int(at + move + math.copysign(BODY, move)), int(across - BODY), int(across + BODY)
        if axis == 0:
            blocked = lanes.grid[n, low, front] != 0 or lanes.grid[n, high, front] != 0
        else:
            blocked = lanes.grid[n, front, low] != 0 or lanes.grid[n, front, high] != 0
        if blocked:
            lanes.pose[n, axis] = front - BODY - SKIN if move > 0.0 else front + 1 + BODY + SKIN
            lanes.speed[n, axis] = 0.0
        else:
            lanes.pose[n, axis] = at + move

    glide = compiled(glide)

    def step_lane(rules, lanes, n, action):
        """Plays FRAMES_PER_STEP frames of lane n, fewer where its episode ends. (reward, 1 where it ended else 0)."""
        ahead, aside, walking, turning = AHEAD[action], ASIDE[action], rules.inertia[0], rules.inertia[1]
        reward, speed = 0.0, lanes.speed[n]
        for _ in range(FRAMES_PER_STEP):
            speed[2] = turning * speed[2] + (1.0 - turning) * TURN * TURNS[action]
            angle = lanes.pose[n, 2] + speed[2]
            if angle < 0.0:
                angle += 2.0 * math.pi
            elif angle >= 2.0 * math.pi:
                angle -= 2.0 * math.pi
            lanes.pose[n, 2] = angle
            ahead_x, ahead_y = math.cos(angle), math.sin(angle)
            speed[0] = walking * speed[0] + (1.0 - walking) * WALK * (ahead * ahead_x - aside * ahead_y)
            speed[1] = walking * speed[1] + (1.0 - walking) * WALK * (ahead * ahead_y + aside * ahead_x)
            glide(lanes, n, 0)
            glide(lanes, n, 1)
            lanes.clock[n] += 1
            ended = lanes.clock[n] >= rules.limit[0]
            for s in range(lanes.kinds.shape[1]):
                kind = lanes.kinds[n, s]
                if kind < 0:
                    continue
                dx, dy = lanes.places[n, s, 0] - lanes.pose[n, 0], lanes.places[n, s, 1] - lanes.pose[n, 1]
                if dx * dx + dy * dy >= REACH * REACH:
                    continue
                reward += rules.reward[kind]
                then = rules.then[kind]
                if then == ELSEWHERE:
                    scatter(rules, lanes, n, s)
                elif then == RESTART:
                    start(rules, lanes, n)
                    break
                elif then == END:
                    ended = True
                    break
                else:
                    lanes.kinds[n, s] = -1
            if ended:
                return reward, 1
        return reward, 0

    return compiled(open_lane), compiled(step_lane)


_open_lane, _step_lane = make_functions(njit(nogil=True, error_model="numpy"))


@njit(cache=True, nogil=True, error_model="numpy")
def open_lanes(rules, lanes, first, stop, which):
    """Begins an episode in those lanes of first..stop where which uint8 (N) is not 0."""
    for n in range(first, stop):
        if which[n] != 0:
            _open_lane(rules, lanes, n)


@njit(cache=True, nogil=True, error_model="numpy")
def step_lanes(rules, lanes, first, stop, actions, reward, ended):
    """Plays a step of lanes first..stop by actions int64 (N); writes reward float32 (N) and ended uint8 (N)."""
    for n in range(first, stop):
        reward[n], ended[n] = _step_lane(rules, lanes, n, actions[n])
