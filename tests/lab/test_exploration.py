import json

import ale_py
import numpy as np
import pytest
import torch
import yaml

from envs.api import UserError
from envs.atari import AtariEnv, Emulator
from envs.protocols import PROTOCOLS
from lab.actions import ActionLog, recorded
from lab.exploration import baseline_score, draw_figures, mean_curve, quartiles_over_games, scores_by_setting
from lab.rooms import ROWS, draw, rooms_reached
from lab.run import derive_seed
from lab.salient_event import draw as draw_event


def row(setting, game, curves):
    return {"setting": setting, "game": game, "score": float(np.mean([curve[-1][1] for curve in curves])), "curves": curves}


def test_baseline_score_by_hand():
    assert baseline_score(5, random=1, baseline=9) == 0.5
    assert baseline_score(9, random=1, baseline=9) == 1
    assert baseline_score(1, random=1, baseline=9) == 0
    assert baseline_score(4, random=8, baseline=4) == 0  # a baseline below random play
    assert baseline_score(12, random=8, baseline=4) == 2
    with pytest.raises(ValueError, match="equals"):
        baseline_score(1, 2, 2)


def test_quartiles_over_games_by_hand():
    by_game = {name: {0: 0.0, 10: value, **({20: 1.0} if value else {})} for name, value in zip("abcde", (0, 1, 2, 3, 4))}
    assert quartiles_over_games(by_game) == [(0, 0.0, 0.0, 0.0), (10, 1.0, 2.0, 3.0)]
    assert mean_curve([[(0, 1.0), (10, 3.0)], [(0, 3.0)]]) == {0: 2.0}


def test_seeds_evaluated_at_other_frames_are_averaged_between():
    stopped = [(0, 0.0), (3, 3.0), (13, 13.0)]
    assert mean_curve([[(0, 2.0), (10, 4.0)], stopped]) == pytest.approx({0: 1.0, 3: 2.8, 10: 7.0})
    assert mean_curve([[(0, 2.0), (10, 4.0)], [(0, 0.0), (10, 6.0)]]) == {0: 1.0, 10: 5.0}
    assert mean_curve([[(0, 2.0)], [(5, 4.0)]]) == {}
    assert mean_curve([]) == mean_curve([[(0, 1.0)], []]) == {}
    rows = quartiles_over_games({"a": {0: 0.0, 4: 4.0}, "b": {0: 2.0, 8: 2.0}})
    assert [row[0] for row in rows] == [0, 4]
    assert rows[1][1:] == pytest.approx((2.5, 3.0, 3.5))


def test_games_without_a_baseline_score_are_named(tmp_path, capsys):
    curves = [[(0, 0.0), (10, 0.0)]]
    results = [{"setting": f"env=Freeway agent={name}", "game": "Freeway", "score": 0.0, "curves": curves} for name in ("a3c", "a3c_plus")]
    draw_figures({"baseline": ["agent=a3c"], "runs": [["agent=a3c"], ["agent=a3c_plus"]]}, results, {}, tmp_path)
    assert "Freeway has no baseline score" in capsys.readouterr().out
    assert (tmp_path / "baseline_score.png").stat().st_size > 1000


def test_scores_stand_beside_random_play_and_the_baselines_end():
    results = [
        row("env=Toy agent=a3c", "Toy", [[(0, 1.0), (10, 5.0)], [(0, 3.0), (10, 7.0)]]),
        row("env=Toy agent=a3c_plus", "Toy", [[(0, 2.0), (10, 10.0)]]),
        row("env=Freeway agent=a3c", "Freeway", [[(0, 0.0), (10, 10.0)]]),
        row("env=Freeway agent=a3c_plus", "Freeway", [[(0, 0.0), (10, 20.0)]]),
        row("env=Lonely agent=a3c_plus", "Lonely", [[(0, 0.0), (10, 20.0)]]),
    ]
    scores = scores_by_setting("agent=a3c", results)
    assert scores["agent=a3c"] == {"Toy": {0: 0.0, 10: 1.0}, "Freeway": {0: 0.0, 10: 1.0}}
    assert scores["agent=a3c_plus"] == {"Toy": {0: 0.0, 10: 2.0}, "Freeway": {0: 0.0, 10: 2.0}}


def test_figures_are_drawn_and_told(tmp_path, capsys):
    results = [
        row("env=Toy agent=a3c", "Toy", [[(0, 1.0), (5, 2.0), (10, 5.0)]]),
        row("env=Toy agent=a3c_plus", "Toy", [[(0, 1.0), (5, 5.0), (10, 9.0)]]),
    ]
    bench = {"runs": [["agent=a3c"], ["agent=a3c_plus"]], "baseline": ["agent=a3c"]}
    draw_figures(bench, results, {}, tmp_path)
    told = json.loads((tmp_path / "exploration.json").read_text())
    assert told["quartiles"]["agent=a3c_plus"][-1] == [10, 2.0, 2.0, 2.0]
    assert (tmp_path / "baseline_score.png").stat().st_size > 5_000
    assert (tmp_path / "bonuses.png").stat().st_size > 5_000
    assert "baseline score of agent=a3c_plus at 10 frames: median 2.00" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"bench\.baseline"):
        draw_figures({**bench, "baseline": ["agent=dqn"]}, results, {}, tmp_path)


@pytest.fixture
def montezuma(tmp_path):
    """A run folder of 60 steps of random play in two lanes, and the rooms that single emulators show on the way."""
    cfg = {"job": "train", "seed": 3, "choices": {"env": "MontezumaRevenge"}, "protocol": {"name": "machado2018"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    torch.manual_seed(0)
    log = ActionLog()
    for _ in range(60):
        log.add(torch.randint(18, (2,)))
    log.write(tmp_path, 1)
    return tmp_path


def test_actions_come_back_as_they_were(montezuma):
    torch.manual_seed(0)
    expected = np.stack([torch.randint(18, (2,)).numpy() for _ in range(60)])
    ((iteration, actions),) = recorded(montezuma)
    assert iteration == 1
    assert np.array_equal(actions, expected)
    (montezuma / "actions" / "iteration-0001.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="damaged"):
        list(recorded(montezuma))


def test_the_known_world_begins_in_the_first_room(montezuma, tmp_path):
    assert rooms_reached(montezuma) == {1: 0}
    draw({"a3c": {1: 0, 0: 500}}, tmp_path / "world.png")
    assert (tmp_path / "world.png").stat().st_size > 5_000
    assert sum(ROWS) == 24


def test_a_replay_prints_no_banner(montezuma, capfd):
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Info)  # as in a process that has made no emulator yet
    rooms_reached(montezuma)
    assert capfd.readouterr() == ("", "")


def test_rooms_are_those_of_the_lanes_own_memory(montezuma, monkeypatch):
    """Which byte is read does not matter to the search: with a byte that changes, first sights equal those of a plain replay."""
    monkeypatch.setattr("lab.rooms.ROOM_BYTE", 0)  # a counter of frames
    expected = {}
    ((_, actions),) = recorded(montezuma)
    for lane in range(2):
        emulator = Emulator("MontezumaRevenge", PROTOCOLS["machado2018"])
        seed = AtariEnv.lane_seed(derive_seed(3, 1, "env"), lane)
        for step, _ in enumerate(emulator.replay(seed, actions[:, lane].tolist())):
            value = int(emulator.ram()[0])
            expected[value] = min(expected.get(value, step * 8), step * 8)
    assert rooms_reached(montezuma) == dict(sorted(expected.items()))


def test_rooms_of_another_game_are_refused(montezuma):
    text = (montezuma / "config.yaml").read_text().replace("MontezumaRevenge", "Pong")
    (montezuma / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="rooms are those of MontezumaRevenge"):
        rooms_reached(montezuma)


def test_runs_without_actions_are_refused(tmp_path):
    with pytest.raises(UserError, match="record_actions=true"):
        list(recorded(tmp_path))


def test_salient_event_is_drawn(tmp_path):
    probes = [
        {"step": step, "walking": step > 5, "events": step, "event_count": None if step < 3 else step / 2, "wait_count": 1.0}
        for step in range(9)
    ]
    draw_event({"probes": probes, "phases": 2, "phase_steps": 4, "density": "cts", "env": "Freeway"}, tmp_path / "event.png")
    assert (tmp_path / "event.png").stat().st_size > 5_000
