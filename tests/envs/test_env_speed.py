"""The benchmark runs, prints a row and writes what a reader needs to judge it."""

import json

from benchmarks.env_speed import main


def test_the_benchmark_writes_its_result(tmp_path, capsys):
    out = tmp_path / "speed.json"
    arguments = [
        "--games",
        "Pong",
        "--obs",
        "grey84",
        "--num-envs",
        "2",
        "--num-threads",
        "1",
        "--pairs",
        "2",
        "--steps",
        "5",
        "--out",
        str(out),
    ]
    assert main(arguments) in (0, 1)
    assert "Pong" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["command"].startswith("python -m benchmarks.env_speed --games Pong")
    assert set(result["versions"]) == {"python", "torch", "ale-py", "numpy"}
    (row,) = result["rows"]
    assert row["frames_per_second"] > 0
    assert 0 < row["ratio_quartiles"][0] <= row["ratio_median"] <= row["ratio_quartiles"][1]
