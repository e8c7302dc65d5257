"""The table of both backends' rates runs, prints its rows and writes what a reader needs to judge them."""

import json
import sys

import pytest
from fake_envpool import FakeEnvPool

from benchmarks import backends, record
from envs.api import UserError

SHORT = ["--num-envs", "1", "2", "--num-threads", "1", "2", "--pairs", "2", "--lane-steps", "6"]


def test_the_benchmark_writes_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", FakeEnvPool())
    monkeypatch.setattr(record, "version", lambda name: "1.0")
    out = tmp_path / "backends.json"
    assert backends.main([*SHORT, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert capsys.readouterr().out.count("Pong") == 3
    assert result["command"].startswith("python -m benchmarks.backends --num-envs 1 2")
    assert set(result["versions"]) == {"python", "torch", "ale-py", "envpool", "numpy"}
    assert [(row["num_envs"], row["num_threads"], row["steps_per_turn"]) for row in result["rows"]] == [(1, 1, 6), (2, 1, 3), (2, 2, 3)]
    for row in result["rows"]:
        assert row["ale_frames_per_second"] > 0
        assert row["envpool_frames_per_second"] > row["ale_frames_per_second"]  # the stand-in plays nothing
        assert 1 < row["ratio_quartiles"][0] <= row["ratio_median"] <= row["ratio_quartiles"][1]
        assert len(row["open_seconds"]) == 2


def test_without_envpool_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(UserError, match=r"reverie\[envpool\]"):
        backends.main(SHORT)
