import pytest

import launch
from envs.api import UserError
from lab.bench import draw, run, table
from lab.configure import compose


def row(setting, game, finals, **more):
    curves = [[(0, 0.1), (500, final), (1000, final)] for final in finals]
    known = {"setting": setting, "game": game, "frames": 1000, "seeds": len(finals), "final_by_seed": finals, "curves": curves}
    figures = {"score": sum(finals) / len(finals), "interval_over_seeds": [min(finals), max(finals)], "frames_per_second": 1234.5}
    return known | figures | more


def test_a_toys_table_has_no_published_columns_and_counts_who_solved_it():
    rows = [
        row("agent=a3c", "Toy", [0.1, 0.1], solved=0.9, seeds_above=0),
        row("agent=a3c_plus", "Toy", [1.0, 0.95], solved=0.9, seeds_above=2),
    ]
    assert table(rows).splitlines() == [
        "| setting | frames | seeds | score (95 % over seeds) | seeds above 0.9 | frames/s |",
        "|---|---|---|---|---|---|",
        "| agent=a3c | 1,000 | 2 | 0.10 (0.10 to 0.10) | 0 of 2 | 1,234 |",
        "| agent=a3c_plus | 1,000 | 2 | 0.97 (0.95 to 1.00) | 2 of 2 | 1,234 |",
    ]


def test_a_game_stands_beside_published_scores():
    named, ruled, pong, toy = table([row("env=Pong", "Pong", [-20.0]), row("env=Toy", "Toy", [1.0])]).splitlines()
    assert named.split("|")[5:9] == [" random ", " human ", " MFEC at 10M (NEC paper) ", " NEC at 10M (NEC paper) "]
    assert named.count("|") == ruled.count("|") == pong.count("|") == toy.count("|") == 10
    assert pong == "| env=Pong | 1,000 | 1 | -20.0 (one seed) | -20.7 | 14.6 | -20.0 | 20.4 | 1,234 |"
    assert toy == "| env=Toy | 1,000 | 1 | 1.0 (one seed) |  |  |  |  | 1,234 |"


@pytest.mark.parametrize("panels", ["game", "setting"])
def test_a_picture_of_any_number_of_panels(tmp_path, panels):
    draw([row(f"agent={name}", "Toy", [0.1, 1.0]) for name in "abcde"], tmp_path / "curves.png", panels)
    assert (tmp_path / "curves.png").stat().st_size > 5_000


@pytest.mark.parametrize("word", ["bench.panels=seed", "bench.solved=most", "bench.solved=true"])
def test_bad_keys_are_refused_before_anything_runs(tmp_path, word):
    with pytest.raises(UserError, match=r"bench\.panels is game or setting"):
        run(compose(["job=bench", "bench=deceptive", f"runs_dir={tmp_path}", word]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["frames=640", "seed=1", "num_envs=2"])
def test_words_that_are_for_its_runs_are_refused(tmp_path, capsys, word):
    assert launch.main(["job=bench", "bench=mazes", f"runs_dir={tmp_path}", word]) == 2
    assert capsys.readouterr().err.startswith(f"error: {word} says nothing to a bench")


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert launch.main(["job=bench", "bench=demo", f"runs_dir={tmp_path / 'file'}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "bench-demo: Not a directory" in line
