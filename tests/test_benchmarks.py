"""What benchmarks share: turns that alternate, and a file that tells what the figures were found on."""

import json

import pytest

from benchmarks.record import record
from benchmarks.simulators import lost, ranges, table
from benchmarks.turns import serve, summary, take_turns


class Paced:
    """A worker that trains at a fixed rate and writes down when it was asked."""

    def __init__(self, name, rate, log):
        self.name, self.rate, self.log, self.closed = name, rate, log, False

    def train(self, steps):
        self.log.append((self.name, steps))
        return {"steps": steps, "seconds": steps / self.rate, "cpu_seconds": 2 * steps / self.rate, "updates": steps // 4, "shares": {}}

    def close(self):
        self.closed = True


def test_turns_alternate_and_last_as_long_as_said():
    log = []
    workers = [Paced("ours", 100, log), Paced("other", 40, log)]
    rows = take_turns(workers, 3, 4.0, 20)
    assert log[:4] == [("ours", 20), ("ours", 20), ("other", 20), ("other", 20)]  # past what compiles and fills
    assert log[4:] == [("ours", 400), ("other", 160), ("other", 160), ("ours", 400), ("ours", 400), ("other", 160)]
    assert all(worker.closed for worker in workers)
    assert [row["ratio"] for row in rows] == pytest.approx([2.5] * 3)
    found = summary(rows)
    assert (found["ratio_median"], found["steps_per_second"], found["others_steps_per_second"]) == (2.5, 100, 40)
    assert found["cpu_ratio_median"] == 2.5


def test_workers_are_closed_where_one_breaks_off():
    workers = [Paced("ours", 100, []), Paced("other", 40, [])]
    workers[1].train = lambda steps: 1 / 0
    with pytest.raises(ZeroDivisionError):
        take_turns(workers, 1, 1.0, 20)
    assert all(worker.closed for worker in workers)


def test_a_worker_of_ours_answers_each_line(monkeypatch, capsys):
    class Tick:
        seconds = (0.0, 0.0, 0.0, 0.0)

    done = []

    def ticks():
        while True:
            done.append(1)
            yield Tick

    monkeypatch.setattr("sys.stdin", iter(["10\n", "4\n"]))
    serve(ticks(), 4, {"threads": 1}, lambda: 3 * len(done))
    facts, *answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert facts == {"threads": 1}
    assert [(answer["steps"], answer["updates"]) for answer in answers] == [(12, 9), (4, 3)]


def test_a_record_tells_the_command_without_paths_of_the_machine(tmp_path):
    record(None, "sb3_speed", [], [])
    path = tmp_path / "new" / "rows.json"
    record(path, "sb3_speed", ["--sb3-python", "/home/me/bin/python", "--pairs", "2"], [{"ratio": 2.5}], ("torch",), goal=3.0)
    found = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks.sb3_speed --sb3-python /path/to/venv/bin/python --pairs 2"
    assert found["rows"] == [{"ratio": 2.5}]
    assert found["goal"] == 3.0
    assert set(found["versions"]) == {"python", "torch"}
    assert found["usable_cpus"] >= 1


def test_where_an_action_conditional_simulator_fails_is_told_by_horizon():
    def result(*errors):
        return {"errors": {"mse": list(errors), "psnr": list(errors)}, "steps_per_second": 1.0}

    results = {
        "small_feedforward": result(9, 9, 9, 9, 9, 1, 3, 1, 3, 4),
        "small_no_action": result(0, 0, 0, 0, 0, 2, 3, 2, 2, 9),
        "last_frame": result(0, 0, 0, 0, 0, 2, 4, 2, 9, None),
    }
    assert lost(results) == {"small_feedforward": [7, 9]}, "up to five steps, and where no clip reaches, nothing is asked"
    assert ranges([6, 7, 8, 10, 12, 13]) == "6-8, 10, 12-13"
    told = table({"Pong": results})
    assert "Pong, `small_feedforward`: no better than both baselines at 7, 9 steps beyond 5." in told
    assert "| Pong | `last_frame` | 0.0 | 0.0 |  |" in told
