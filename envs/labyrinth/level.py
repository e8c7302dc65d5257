"""A level is one small TOML file: a map, what lies about in it, and how long an episode lasts. Those in levels/ are there to be copied.

    seconds = 60                      # of an episode
    walk_inertia = 0.9                # the share of its speed that a body keeps from frame to frame, and
    turn_inertia = 0.8                # of its turning; these where nothing is said, 0 for none
    # one character a cell
    map = '''
    #######
    #^...A#
    #######
    '''
    [legend]                          # characters of the map: a wall's look, or a thing
    "#" = "brick"
    A = "apple"
    [things.apple]
    reward = 1.0
    then = "elsewhere"                # when it is taken: gone, elsewhere, restart or end
    count = 1                         # so many more at random places

`.` is floor where random things may lie, a blank is floor where none does; `^ > v <` are starts that face so, `S` one that faces anywhere.
`draws = [{x = "red"}, {x = "green"}]` lists alternatives, one of which is drawn whenever an episode begins or a thing says restart: what a
character of the map stands for then (a look, a thing, or floor). `[maze]` with rows, columns and look, in place of a map, carves a new
maze for every episode.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from envs.api import UserError
from envs.labyrinth.physics import FRAMES_PER_SECOND, THEN, Rules
from envs.labyrinth.textures import LOOKS, THINGS

LEVELS = Path(__file__).parent / "levels"
STARTS = {"^": -math.pi / 2, ">": 0.0, "v": math.pi / 2, "<": math.pi, "S": math.nan}
FLOORS = ". "
INERTIA = {"walk_inertia": 0.9, "turn_inertia": 0.8}
KEYS = {"about", "seconds", *INERTIA, "map", "legend", "things", "draws", "maze"}
SMALLEST, LARGEST = 3, 99  # rows and columns
MOST_THINGS, MOST_REWARD = 64, 1_000_000


@dataclass(frozen=True)
class Level:
    """A level that was read and found playable.

    Attributes:
        name: of its file.
        about: what it asks for, in a sentence.
        rules: its arrays.
    """

    name: str
    about: str
    rules: Rules


def level_names() -> list[str]:
    """The levels that come with the project."""
    return sorted(path.stem for path in LEVELS.glob("*.toml"))


def load_level(level: str, size: int | None = None) -> Level:
    """A level by its name in levels/, or by the path of a .toml file.

    Args:
        level: name or path.
        size: rows and columns of a maze, in place of the file's; odd.

    Raises:
        UserError: where there is none, or it cannot be played: one line that names the file and what to put right.
    """
    path = Path(level) if level.endswith(".toml") else LEVELS / f"{level}.toml"
    if not _is_file(path):
        near = difflib.get_close_matches(level, level_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(level_names())}, or the path of a .toml file"
        raise UserError(f"there is no level {level}; {hint}")
    try:
        written = tomllib.loads(path.read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"level {path.name} is no TOML: {error}") from None
    except OSError as error:
        raise UserError(f"level {path} cannot be read: {error.strerror}") from None
    try:
        return Level(path.stem, _text(written, "about"), _rules(written, size))
    except _Mistake as error:
        raise UserError(f"level {path.name}: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


class _Mistake(Exception):
    """What is wrong with a level."""


def _text(written: Mapping[str, Any], key: str) -> str:
    value = written.get(key, "")
    if not isinstance(value, str):
        raise _Mistake(f"{key} must be text in quotes, got {value}")
    return value


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Mistake(f"{where} must be a table, got {value}")
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rules(written: Mapping[str, Any], size: int | None) -> Rules:
    unknown = sorted(set(written) - KEYS)
    if unknown:
        raise _Mistake(f"unknown key {unknown[0]}; there are {', '.join(sorted(KEYS))}")
    seconds = written.get("seconds")
    if not _is_number(seconds) or not 1 / FRAMES_PER_SECOND <= seconds <= 36_000:
        raise _Mistake(f"seconds must be a number from 1/{FRAMES_PER_SECOND}, a frame, to 36,000, got {seconds}")
    inertia = {name: written.get(name, share) for name, share in INERTIA.items()}
    for name, share in inertia.items():
        if not _is_number(share) or not 0 <= share < 1:
            raise _Mistake(f"{name} must be a number from 0 to below 1, got {share}")
    things, maze = _things(_table(written.get("things", {}), "things")), written.get("maze")
    if (maze is None) == (written.get("map") is None):
        raise _Mistake("it needs either a map or a [maze]")
    if maze is None and size is not None:
        raise _Mistake("size is for mazes, its map has one already")
    for key in ("legend", "draws"):
        if maze is not None and key in written:
            raise _Mistake(f"{key} is for maps, and a maze has none")
    board = _board(written, things) if maze is None else _maze(_table(maze, "maze"), size)
    slots, draws = _draws(written.get("draws", []), board, things) if maze is None else ([], [])
    kinds, homes = [kind for kind, _ in board.fixed], [home for _, home in board.fixed]
    for name, settings in things.items():
        kinds += [THINGS.index(name)] * settings["count"]
        homes += [(-1, -1)] * settings["count"]
    slot_rows = []
    for row, column in slots:
        slot_rows.append((row, column, len(kinds)))
        kinds.append(-1)
        homes.append((row, column))
    if len(kinds) > MOST_THINGS:
        raise _Mistake(f"{len(kinds)} things are more than {MOST_THINGS}")
    elsewhere = {THINGS.index(name) for name, settings in things.items() if settings["then"] == "elsewhere"}
    drawn = max((sum(-value - 1 in elsewhere for value in alternative) for alternative in draws), default=0)
    scattered = sum(settings["count"] for settings in things.values()) + sum(kind in elsewhere for kind, _ in board.fixed) + drawn
    rows, columns = board.base.shape
    floor = int(board.roomy.sum()) if maze is None else 2 * (rows // 2) * (columns // 2) - 1  # of a perfect maze
    if scattered and scattered >= floor:
        marked = " marked '.'" if maze is None else ""
        raise _Mistake(f"{scattered} things at random places need more floor{marked} than {floor} cells")
    if maze is None:
        reached = set().union(*(_check_reach(board, slots, alternative) for alternative in draws or [[]]))
        _fill(board.base, reached | set(slots))
    reward, then = np.zeros(len(THINGS), np.float32), np.zeros(len(THINGS), np.int8)
    for name, settings in things.items():
        reward[THINGS.index(name)], then[THINGS.index(name)] = settings["reward"], THEN.index(settings["then"])
    return Rules(
        base=board.base,
        roomy=board.roomy,
        starts=np.array(board.starts, np.float64).reshape(-1, 3),
        kinds=np.array(kinds, np.int8),
        homes=np.array(homes, np.int32).reshape(-1, 2),
        slots=np.array(slot_rows, np.int32).reshape(-1, 3),
        draws=np.array(draws, np.int8).reshape(len(draws), len(slots)),
        reward=reward,
        then=then,
        maze=np.array([maze is not None], np.int8),
        limit=np.array([round(seconds * FRAMES_PER_SECOND)], np.int32),
        inertia=np.array(list(inertia.values()), np.float64),
    )


@dataclass
class _Board:
    base: np.ndarray
    roomy: np.ndarray
    starts: list[tuple[float, float, float]]
    fixed: list[tuple[int, tuple[int, int]]]
    letters: dict[str, list[tuple[int, int]]]
    """Characters that neither the legend nor the language of maps knows, and where they stand: draws say what they are."""


def _things(written: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, settings in written.items():
        if name not in THINGS:
            raise _Mistake(f"there is no thing {name}; there are {', '.join(THINGS)}")
        unknown = sorted(set(_table(settings, f"things.{name}")) - {"reward", "then", "count"})
        if unknown:
            raise _Mistake(f"things.{name} has no {unknown[0]}; it has reward, then and count")
        reward, then, count = settings.get("reward"), settings.get("then", "gone"), settings.get("count", 0)
        if not _is_number(reward) or not abs(reward) <= MOST_REWARD:
            raise _Mistake(f"things.{name}.reward must be a number of at most {MOST_REWARD:,} in size, got {reward}")
        if then not in THEN:
            raise _Mistake(f"things.{name}.then is one of {', '.join(THEN)}, got {then}")
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_THINGS:
            raise _Mistake(f"things.{name}.count must lie in 0..{MOST_THINGS}, got {count}")
        found[name] = {"reward": float(reward), "then": then, "count": count}
    return found


def _board(written: Mapping[str, Any], things: Mapping[str, Any]) -> _Board:
    lines = _text(written, "map").strip("\n").splitlines()
    rows, columns = len(lines), max((len(line) for line in lines), default=0)
    _check_size(rows, columns)
    legend = {"#": "brick", **_table(written.get("legend", {}), "legend")}
    for letter, meaning in legend.items():
        if len(letter) != 1 or letter in FLOORS or letter in STARTS:
            raise _Mistake(f"the legend explains single characters other than {FLOORS}{''.join(STARTS)}, got {letter!r}")
        _check_meaning(meaning, things, f"legend.{letter}", floor=False)
    board = _Board(np.zeros((rows, columns), np.uint8), np.zeros((rows, columns), np.bool_), [], [], {})
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            meaning = legend.get(letter, "")
            if meaning in LOOKS:
                board.base[row, column] = LOOKS.index(meaning) + 1
            elif meaning:
                board.fixed.append((THINGS.index(meaning), (row, column)))
            elif letter in STARTS:
                board.starts.append((column + 0.5, row + 0.5, STARTS[letter]))
            elif letter == ".":
                board.roomy[row, column] = True
            elif letter != " ":
                board.letters.setdefault(letter, []).append((row, column))
    if not board.starts:
        raise _Mistake("the map has no start: put one of ^ > v < S on its floor")
    return board


def _maze(maze: Mapping[str, Any], size: int | None) -> _Board:
    unknown = sorted(set(maze) - {"rows", "columns", "look"})
    if unknown:
        raise _Mistake(f"maze has no {unknown[0]}; it has rows, columns and look")
    rows, columns = (maze.get("rows"), maze.get("columns")) if size is None else (size, size)
    if not isinstance(rows, int) or not isinstance(columns, int) or rows % 2 == 0 or columns % 2 == 0 or min(rows, columns) < 5:
        raise _Mistake(f"rows and columns of a maze must be odd and at least 5, got {rows} and {columns}")
    _check_size(rows, columns)
    look = maze.get("look", "brick")
    if look not in LOOKS:
        raise _Mistake(f"maze.look is one of {', '.join(LOOKS)}, got {look}")
    base = np.full((rows, columns), LOOKS.index(look) + 1, np.uint8)
    roomy = np.zeros((rows, columns), np.bool_)
    roomy[1:-1, 1:-1] = True
    return _Board(base, roomy, [], [], {})


def _draws(written: list[Mapping[str, str]], board: _Board, things: Mapping[str, Any]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    if not isinstance(written, list):
        raise _Mistake(f"draws must be a list of tables, got {written}")
    letters = sorted(set().union(*(_table(one, f"alternative {number} of draws") for number, one in enumerate(written, 1))))
    for letter in sorted(set(board.letters) - set(letters)):
        raise _Mistake(f"the map's character {letter!r} stands neither in the legend nor in draws")
    for letter in letters:
        if letter not in board.letters:
            raise _Mistake(f"draws speak of {letter!r}, which is not on the map (or has a meaning already)")
    slots, columns = [], []
    for letter in letters:
        meanings = []
        for number, alternative in enumerate(written, 1):
            if letter not in alternative:
                raise _Mistake(f"alternative {number} of draws does not say what {letter!r} is")
            meaning = alternative[letter]
            _check_meaning(meaning, things, f"draws, {letter}", floor=True)
            wall = LOOKS.index(meaning) + 1 if meaning in LOOKS else 0
            meanings.append(-THINGS.index(meaning) - 1 if meaning in THINGS else wall)
        for place in board.letters[letter]:
            slots.append(place)
            columns.append(meanings)
    return slots, [list(row) for row in zip(*columns)] if columns else []


def _check_meaning(meaning: object, things: Mapping[str, Any], where: str, floor: bool) -> None:
    if isinstance(meaning, str) and (meaning in things or meaning in LOOKS or (floor and meaning == "floor")):
        return
    if meaning in THINGS:
        raise _Mistake(f"{where} is a {meaning}, which has no [things.{meaning}] with its reward")
    raise _Mistake(f"{where}: {meaning} is neither a look ({', '.join(LOOKS)}) nor a thing ({', '.join(THINGS)})")


def _fill(base: np.ndarray, kept: set[tuple[int, int]]) -> None:
    """Makes walls, of the commonest look, of floor that nobody can reach: the corners of a map around its rooms."""
    common = 1 + np.bincount(base.ravel(), minlength=2)[1:].argmax()
    for row, column in np.argwhere(base == 0):
        if (row, column) not in kept:
            base[row, column] = common


def _check_reach(board: _Board, slots: list[tuple[int, int]], alternative: list[int]) -> set[tuple[int, int]]:
    """That walls surround what can be walked to, and that every start leads to all things and all floor that random things may lie on.
    Returns what can be walked to."""
    walls, goals = board.base.copy(), {home for _, home in board.fixed} | {(int(r), int(c)) for r, c in np.argwhere(board.roomy)}
    for (row, column), value in zip(slots, alternative):
        walls[row, column] = max(value, 0)
        if value < 0:
            goals.add((row, column))
    everywhere: set[tuple[int, int]] = set()
    for x, y, _ in board.starts:
        if (int(y), int(x)) in everywhere:
            continue
        reached, ahead = set[tuple[int, int]](), [(int(y), int(x))]
        while ahead:
            row, column = place = ahead.pop()
            if place in reached:
                continue
            if row in (0, walls.shape[0] - 1) or column in (0, walls.shape[1] - 1):
                raise _Mistake(f"the map is open: a way leads to its edge at row {row + 1}, column {column + 1}")
            reached.add(place)
            ahead += [(r, c) for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)) if not walls[r, c]]
        for row, column in sorted(goals - reached):
            raise _Mistake(f"row {row + 1}, column {column + 1} cannot be reached from the start at row {int(y) + 1}, column {int(x) + 1}")
        everywhere |= reached
    return everywhere


def _check_size(rows: int, columns: int) -> None:
    if not (SMALLEST <= rows <= LARGEST and SMALLEST <= columns <= LARGEST):
        raise _Mistake(f"rows and columns must lie in {SMALLEST}..{LARGEST}, got {rows} and {columns}")
