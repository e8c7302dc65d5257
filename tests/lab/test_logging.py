"""Logs survive kills, full disks and strangers; a cut goes back to the checkpoint's byte."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.api import UserError
from lab import logging as logs
from lab.logging import EvaluationLog, MetricsLog, cut_back, plain, read_evaluation, read_metrics

EPISODE = {
    "frames": 400,
    "iteration": 1,
    "episode": 0,
    "lane": 3,
    "return": -20.5,
    "length_frames": 96,
    "protocol": "mfec2016",
    "epsilon": 0.005,
}


def test_a_row_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(
            {"frames": 4, "a": torch.tensor(0.5), "b": np.float32(2), "c": True, "d": math.nan, "e": -math.inf, "f": "word", "g": None}
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"frames": 4, "a": 0.5, "b": 2.0, "c": True, "d": None, "e": None, "f": "word", "g": None}
    (read,) = read_metrics(tmp_path)
    assert read["a"] == 0.5
    assert read["f"] == "word"
    assert all(math.isnan(float(read[name])) for name in "deg")


@pytest.mark.parametrize("value", [torch.zeros(2), [1], {}, np.zeros(3), object()])
def test_a_metric_is_one_number(value: object) -> None:
    with pytest.raises(TypeError, match="a metric is"):
        plain(value)


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for frames in range(3):
        log.write({"frames": frames})
        assert len(read_metrics(tmp_path)) == frames + 1


def test_position_and_cut_back_meet_byte_for_byte(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, EvaluationLog(tmp_path) as evaluations:
        assert log.position() == {"metrics.jsonl": 0, "evaluation.csv": 0}
        log.write({"frames": 4})
        evaluations.write([EPISODE])
        position = log.position()
        before = {name: (tmp_path / name).read_bytes() for name in position}
        assert position == {name: len(content) for name, content in before.items()}
        log.write({"frames": 8})
        evaluations.write([EPISODE, EPISODE])
        log.cut_back(position)
        assert {name: (tmp_path / name).read_bytes() for name in position} == before
        log.write({"frames": 9})  # logs that are open go on behind the cut
        evaluations.write([EPISODE | {"episode": 7}])
    assert [row["frames"] for row in read_metrics(tmp_path)] == [4, 9]
    assert [row["episode"] for row in read_evaluation(tmp_path)] == [0, 7]


def test_cut_to_nothing_brings_the_header_back_with_the_next_row(tmp_path: Path) -> None:
    with EvaluationLog(tmp_path) as log:
        log.write([EPISODE])
        cut_back(tmp_path, {})
        assert (tmp_path / "evaluation.csv").read_bytes() == b""
        log.write([EPISODE])
    assert read_evaluation(tmp_path) == [EPISODE]


def test_cut_back_touches_the_two_logs_only_and_never_lengthens(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("frames: 3\n")
    (tmp_path / "metrics.jsonl").write_text('{"frames": 1}\n{"frames": 2}\n')
    cut_back(tmp_path, {"config.yaml": 0, "../x": 0, "metrics.jsonl": 10**9})
    assert (tmp_path / "config.yaml").read_text() == "frames: 3\n"
    assert len(read_metrics(tmp_path)) == 2
    cut_back(tmp_path, {"metrics.jsonl": 17})  # within the second line: what is left of it goes too
    assert (tmp_path / "metrics.jsonl").read_text() == '{"frames": 1}\n'
    cut_back(tmp_path, {"metrics.jsonl": -5})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("length", [10, 65_536, 200_000])
def test_a_torn_last_line_is_not_read_and_goes_when_the_log_is_opened(tmp_path: Path, length: int) -> None:
    whole = '{"frames": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"frames": 2, "x": ' + "1" * length)
    assert len(read_metrics(tmp_path)) == 1
    with MetricsLog(tmp_path) as log:
        log.write({"frames": 3})
    assert [row["frames"] for row in read_metrics(tmp_path)] == [1, 3]


def test_a_torn_number_is_not_another_number(tmp_path: Path) -> None:
    with EvaluationLog(tmp_path) as log:
        log.write([EPISODE, EPISODE])
    path = tmp_path / "evaluation.csv"
    for size in range(path.stat().st_size):
        torn = tmp_path / "torn"
        torn.mkdir(exist_ok=True)
        (torn / "evaluation.csv").write_bytes(path.read_bytes()[:size])
        assert all(row == EPISODE for row in read_evaluation(torn))


def test_a_full_disk_is_one_clear_line_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)
    log.write({"frames": 1})

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, text: bytes) -> int:
            if len(text) < 8:
                raise OSError(28, "No space left on device")
            return self.file.write(text[: len(text) // 2])  # type: ignore[attr-defined]

    monkeypatch.setattr(log._file, "_file", Full(log._file._file))
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.write({"frames": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"frames": 1}\n'


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)
    file = log._file._file

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

        def write(self, text: bytes) -> int:
            return file.write(text[:3])

    monkeypatch.setattr(log._file, "_file", Slow())
    log.write({"frames": 2, "name": "ünïcödé"})
    assert read_metrics(tmp_path) == [{"frames": 2.0, "name": "ünïcödé"}]


def test_a_folder_that_cannot_be_made_is_the_users_to_put_right(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        MetricsLog(tmp_path / "file")


def test_the_log_of_a_stranger_does_no_harm(tmp_path: Path) -> None:
    lines = [
        b"\xff\xfe\x00garbage",
        b"[" * 100_000,
        b'{"frames": ' + b"9" * 5000 + b"}",
        b'{"frames": 1e999}',
        b'{"frames": "1"}',
        b'{"loss": 1}',
        b"null",
        b'{"frames": 7, "deep": {"a": 1}, "list": [1], "big": 1' + b"0" * 400 + b', "nan": NaN, "ok": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (row,) = read_metrics(tmp_path)
    assert set(row) == {"frames", "big", "nan", "ok"}
    assert (row["frames"], row["ok"]) == (7.0, 2.0)
    assert math.isnan(float(row["big"]))
    (tmp_path / "evaluation.csv").write_bytes(
        b'frames,return,strange\n1,2,3\nx,1,1\n1e999,4,4\n5,nan,0\n6,7\n8,\n"9\n\xff,1,1\n' + b"1," + b"7" * 200_000 + b",\n"
    )
    rows = read_evaluation(tmp_path)
    assert [row["frames"] for row in rows[:3]] == [1, 5, 6]
    assert all(set(row) == {"frames", "return"} for row in rows)
    (tmp_path / "evaluation.csv").write_text("a,b\n1,2\n")
    assert read_evaluation(tmp_path) == []


def test_missing_logs_read_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_metrics(tmp_path, 10) == read_evaluation(tmp_path) == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path, 10) == []


def test_episodes_keep_their_types_and_lines_stay_lines(tmp_path: Path) -> None:
    with EvaluationLog(tmp_path) as log:
        log.write([EPISODE | {"return": torch.tensor(2.5), "protocol": 'a,"b"\nc'}, {"frames": 8, "return": 1}])
        with pytest.raises(ValueError, match="colour"):
            log.write([EPISODE | {"colour": 1}])
    text = (tmp_path / "evaluation.csv").read_text()
    assert text.splitlines()[0] == "frames,iteration,episode,lane,return,length_frames,protocol,epsilon"
    first, second = read_evaluation(tmp_path)
    assert first == EPISODE | {"return": 2.5, "protocol": 'a,"b" c'}
    assert isinstance(first["frames"], int)
    assert second == {"frames": 8, "return": 1.0, "protocol": ""}


def test_thinning_keeps_every_kind_of_row_and_the_last(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for frames in range(10_000):
            log.write({"frames": frames, "often": 1})
            if frames % 50 == 0:
                log.write({"frames": frames, "seldom": 1, "too": 1})
    rows = read_metrics(tmp_path, most_rows=500)
    often = [row["frames"] for row in rows if "often" in row]
    assert 350 <= len(often) <= 700
    assert often[-1] == 9999
    assert np.diff(np.array(often, float)).max() < 60
    assert len([row for row in rows if "seldom" in row]) >= 150
    assert len(read_metrics(tmp_path)) == 10_200
    assert len(read_metrics(tmp_path, 10**6)) == 10_200


def test_position_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(logs.os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    with MetricsLog(tmp_path) as log, EvaluationLog(tmp_path):
        log.position()
    assert synced == [(tmp_path / name).stat().st_ino for name in ("metrics.jsonl", "evaluation.csv")]
