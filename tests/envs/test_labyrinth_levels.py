"""Levels: those that come with the project, and what cannot be played, told in one line."""

import textwrap
import time

import pytest
from small_levels import NAMES, ROOM, written

import launch
from envs.api import UserError
from envs.labyrinth import level
from envs.labyrinth.level import level_names, load_level
from envs.labyrinth.world import Labyrinth
from lab.configure import compose

APPLE = "[legend]\nA = 'apple'\n[things.apple]\nreward = 1"


def test_the_levels_that_come_with_it():
    assert level_names() == NAMES
    for name in NAMES:
        assert load_level(name).about


def test_floor_that_nobody_can_reach_becomes_wall():
    env = Labyrinth(1, "cpu", "DoubleTMaze", height=8, width=8)
    env.reset(0)
    assert (env.lanes.grid[0] == 0).sum() == 13 + 2 * 8 + 4  # the row of the arms, their ends, the way from the start


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seconds = ", "is no TOML"),
        ("seconds = 5", "either a map or a"),
        ("seconds = 0\nmap = '#'", "seconds must be"),
        ("seconds = 0.01\nmap = '#'", "from 1/60"),
        ("seconds = true\nmap = '#'", "got True"),
        ("seconds = 5\nmap = ['###', '#S#', '###']", "map must be text"),
        ("about = 5\n" + ROOM, "about must be text"),
        ("a = " + "[" * 5000, "is no TOML"),
        ("seconds = 5\nmaze = 5", "maze must be a table, got 5"),
        ("seconds = 5\nlegend = { x = 'red' }\n[maze]\nrows = 5\ncolumns = 5", "legend is for maps"),
        ("seconds = 5\ndraws = [{ x = 'red' }]\n[maze]\nrows = 5\ncolumns = 5", "draws is for maps"),
        ("seconds = 5\n[maze]\nrows = 5\ncolumns = 5\n[things.apple]\nreward = 1\ncount = 7", "need more floor than 7"),
        (ROOM + "things = 5", "things must be a table"),
        (ROOM + "things.apple = 5", "things.apple must be a table"),
        (ROOM + "legend = ['#', 'brick']", "legend must be a table"),
        (ROOM + "legend = { A = ['red'] }", "legend.A: ['red'] is neither"),
        (ROOM + "draws = { A = 'red' }", "draws must be a list of tables"),
        (ROOM + "draws = [{ A = 'red' }, 3]", "alternative 2 of draws must be a table"),
        (ROOM.replace("#     #", "#  A  #", 1) + "draws = [{ A = 3 }]", "draws, A: 3 is neither"),
        (
            ROOM.replace("#     #", "#  A  #", 1) + APPLE + "\nthen = 'elsewhere'",
            "1 things at random places need more floor marked '.' than 0",
        ),
        (
            ROOM.replace("#     #", "#  A  #", 1) + "draws = [{ A = 'apple' }]\n[things.apple]\nreward = 1\nthen = 'elsewhere'",
            "than 0 cells",
        ),
        (ROOM + "[things.apple]\nreward = 1e39", "at most 1,000,000 in size"),
        (ROOM + "[things.apple]\nreward = true", "reward must be a number"),
        (ROOM + "[things.apple]\nreward = 1\ncount = true", "count must lie in"),
        ("second = 5", "unknown key second"),
        (ROOM.replace("turn_inertia = 0", "turn_inertia = 1"), "turn_inertia must be a number from 0 to below 1, got 1"),
        (ROOM.replace("walk_inertia = 0", "walk_inertia = 'x'"), "walk_inertia must be a number from 0 to below 1, got x"),
        (ROOM.replace("S", " "), "no start"),
        (ROOM.replace("#     #\n#######", "#     #\n### ###"), "open: a way leads to its edge at row 5, column 4"),
        (ROOM.replace("#     #", "#  Q  #", 1), "'Q' stands neither"),
        (ROOM + "[things.pear]\nreward = 1", "no thing pear"),
        (ROOM + "[things.apple]\nreward = 'x'", "apple.reward must be a number"),
        (ROOM + "[things.apple]\nreward = 1\nthen = 'vanish'", "then is one of"),
        (ROOM + "[things.apple]\nreward = 1\ncount = 3", "need more floor"),
        (
            ROOM.replace("#  S  #", "#  S#A#").replace("#     #", "#   ###") + "[legend]\nA = 'apple'\n[things.apple]\nreward = 1",
            "row 3, column 6",
        ),
        (ROOM + "[legend]\nA = 'apple'", "has no"),
        (ROOM + "[legend]\nA = 'marble'", "neither a look"),
        ("seconds = 5\n[maze]\nrows = 4\ncolumns = 5", "odd and at least 5"),
        ("seconds = 5\n[maze]\nrows = 101\ncolumns = 5", "must lie in 3..99"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        written(tmp_path, text)
    assert words in str(caught.value)
    assert "mine.toml" in str(caught.value) or "level mine" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"level": "Forrage"}, "did you mean Forage"),
        ({"level": "nowhere.toml"}, "there is no level nowhere.toml"),
        ({"level": "n" * 5000}, "there is no level nnn"),
        ({"num_envs": 0}, "num_envs"),
        ({"height": 7}, "height and width"),
        ({"width": 5000}, "height and width"),
        ({"colours": "blue"}, "colours is one of"),
        ({"field_of_view": 180}, "field_of_view"),
        ({"num_threads": -1}, "num_threads"),
        ({"size": 9}, "size is for mazes"),
        ({"level": "NavMaze", "size": 8}, "odd"),
    ],
)
def test_bad_knobs_are_refused(knobs, words):
    with pytest.raises(UserError, match=words):
        Labyrinth(**{"num_envs": 2, "device": "cpu"} | knobs)


def test_the_example_in_the_words_about_levels_can_be_played(tmp_path):
    indented = [line for line in (level.__doc__ or "").splitlines() if line.startswith("    ")]
    assert written(tmp_path, textwrap.dedent("\n".join(indented)), height=8, width=8).level.rules.limit == 3600


def test_a_byte_order_mark_is_no_matter_and_walls_may_all_be_drawn(tmp_path):
    env = written(tmp_path, "\ufeffseconds = 5\nmap = \"xxx\\nxSx\\nxxx\"\ndraws = [{ x = 'red' }]", height=8, width=8)
    env.reset(0)
    assert (env.lanes.grid[0] == 0).sum() == 1


def test_a_map_full_of_starts_is_read_in_no_time(tmp_path):
    map_ = "\n".join(["#" * 99, *["#" + "S" * 97 + "#"] * 97, "#" * 99])
    began = time.perf_counter()
    written(tmp_path, f"seconds = 5\nmap = '''\n{map_}\n'''", height=8, width=8)
    assert time.perf_counter() - began < 10  # minutes, where every start is walked from


def test_a_level_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(level.Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"mine\.toml cannot be read: Permission denied"):
        written(tmp_path, ROOM)


@pytest.mark.parametrize("name", ["josé (1)", "a=b", "with space", "a,b", "~"])
def test_a_level_may_lie_where_people_put_it(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    written(folder, ROOM)
    assert load_level(compose(["env=Forage", f"env.level={folder / 'mine.toml'}"]).env.level).name == "mine"


def test_pictures_beyond_memory_are_refused_before_anything_is_written(tmp_path, capsys):
    words = ["env=NavMaze", "agent=random", "env.height=1024", "env.width=1024", "num_envs=65536"]
    assert launch.main([*words, f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "env does not fit into memory" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
