"""The live view: what it says, when it speaks, and that it neither costs nor breaks anything."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lab.progress import Progress, _duration, _short

BUDGET = {"time/env": 0.41, "time/act": 0.38, "time/learn": 0.12, "time/observe": 0.06, "time/log": 0.03}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_lines(total: int = 2_000_000, unit: str = "frames") -> tuple[Progress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Progress(total, "random on Pong", unit=unit, stream=stream, clock=clock), stream, clock


def terminal(width: int = 100, **settings: object) -> tuple[Progress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, color_system="truecolor", **settings)  # type: ignore[arg-type]
    return Progress(2_000_000, "random on Pong", clock=clock, console=console), stream, clock


def last_picture(stream: io.StringIO) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    return [line for line in re.split(r"\x1b\[[0-9]*[AK]", text)[-1].replace("\x1b[?25h", "").split("\n") if line.strip()]


def test_a_plain_line_says_it_all() -> None:
    progress, stream, clock = plain_lines()
    progress.update(0)
    clock.now += 10
    progress.update(500_000, score=-19.84, **BUDGET, **{"memory/entries": 12_345, "memory/bytes": 45e6, "train/return_mean": -20.1})
    assert stream.getvalue() == (
        "random on Pong  500,000/2M frames 25%  0:30 left  score -19.8  50,000 frames/s  env 41%  act 38%  learn 12%  observe 6%  log 3%"
        "  memory 12,345 entries, 45.0 MB  return mean -20.1\n"
    )


def test_plain_lines_come_every_ten_seconds_and_at_the_end() -> None:
    progress, stream, clock = plain_lines()
    with progress:
        for second in range(25):
            clock.now = 100.0 + second
            progress.update(second * 1000)
        assert stream.getvalue().count("\n") == 2  # at 10 and 20 seconds
        assert "10,000/2M" in stream.getvalue().splitlines()[0]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "24,000/2M" in lines[-1]
    progress.close()
    clock.now += 60
    progress.update(99)
    assert len(stream.getvalue().splitlines()) == 3


def test_speed_is_measured_from_where_a_resumed_run_began_and_follows_the_last_seconds() -> None:
    progress, _, clock = plain_lines()
    progress.update(1_000_000)  # resumed here
    clock.now += 10
    progress.update(1_010_000)
    assert "1,000 frames/s" in progress.line()
    assert "16:30 left" in progress.line()
    for _ in range(4):
        clock.now += 10
        progress.update(progress._done + 100_000)
    assert "10,000 frames/s" in progress.line()


def test_the_jobs_own_speed_of_frames_goes_first_but_not_for_updates() -> None:
    for unit, answer in (("frames", "1,234 frames/s"), ("updates", "50.0 updates/s")):
        progress, _, clock = plain_lines(unit=unit)
        progress.update(0, **{"speed/frames_per_second": 1234.4})
        clock.now += 10
        progress.update(500)
        assert answer in progress.line()
        assert "frames per second" not in progress.line()


def test_values_stay_and_none_is_not_shown() -> None:
    progress, _, _ = plain_lines()
    progress.update(1, score=3, elbo=None)
    progress.update(2)
    assert "score 3" in progress.line()
    assert "elbo" not in progress.line()
    progress.update(3, note="[red]")
    assert "note [red]" in progress.line()


def test_unknown_totals_and_overruns() -> None:
    progress, _, clock = plain_lines(total=0, unit="episodes")
    progress.update(3)
    clock.now += 10
    progress.update(4)
    assert "4 episodes " in progress.line()
    assert "left" not in progress.line()
    over, stream, clock = terminal()
    with over:
        clock.now += 1
        over.update(3_000_000)
    assert "150%" in stream.getvalue()


def test_a_message_is_printed_as_it_is_at_once() -> None:
    progress, stream, _ = plain_lines()
    progress.message("run folder [bold]runs/x[/bold] " + "y" * 300)
    assert stream.getvalue() == "run folder [bold]runs/x[/bold] " + "y" * 300 + "\n"


@pytest.mark.parametrize("width", [20, 34, 60, 100, 200])
def test_a_terminal_of_any_width_shows_everything_in_whole_words(width: int) -> None:
    progress, stream, clock = terminal(width)
    with progress:
        progress.update(0)
        clock.now += 1
        progress.update(500_000, score=-19.8, entries=12_345, **BUDGET)
    lines = last_picture(stream)
    assert all(len(line.rstrip()) <= width for line in lines)
    text = "\n".join(lines)
    if width >= 34:
        for piece in ("25%", "score -19.8", "0:03 left", "500,000 frames/s", "env 41%", "log 3%", "memory 12,345 entries"):
            assert piece in text
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is given back


def test_a_terminal_is_redrawn_at_most_twice_a_second() -> None:
    progress, stream, clock = terminal()
    with progress:
        began = len(stream.getvalue())
        for _ in range(49):
            clock.now += 0.01
            progress.update(1)
        assert len(stream.getvalue()) == began
        clock.now += 0.02
        progress.update(1)
        assert len(stream.getvalue()) > began


def test_messages_stand_above_the_bar() -> None:
    progress, stream, clock = terminal()
    with progress:
        clock.now += 1
        progress.update(1)
        progress.message("saved")
    assert stream.getvalue().index("saved") < stream.getvalue().rindex("random on Pong")


def test_no_color_is_respected() -> None:
    progress, stream, clock = terminal(no_color=True)
    with progress:
        clock.now += 1
        progress.update(1, score=1)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;)[0-9;]*m", stream.getvalue())


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_dumb_terminals_get_plain_lines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", kind)
    progress, stream, clock = terminal()
    with progress:
        progress.update(0)
        clock.now += 10
        progress.update(1)
        assert stream.getvalue().endswith("random on Pong  1/2M frames 0%  5555:33:10 left  0.1 frames/s\n")
    assert "\x1b[2K" not in stream.getvalue()
    assert "\x1b[?25l" not in stream.getvalue()


def test_terminals_without_unicode_get_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    clock = Clock()
    with Progress(100, "x", clock=clock, console=Console(file=stream, force_terminal=True, width=80)) as progress:
        clock.now += 1
        progress.update(50, score=1, **BUDGET)
    stream.flush()
    assert not progress._is_broken
    assert b"score 1" in raw.getvalue()


def test_a_closed_pipe_silences_the_view_and_nothing_else() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    clock = Clock()
    with Progress(10, "x", stream=Closed(), clock=clock) as progress:
        progress.message("hello")
        clock.now += 20
        progress.update(5)
        progress.message("hello")


def test_a_job_whose_reader_left_runs_to_its_end(tmp_path: Path) -> None:
    script = """
import sys, time
from lab.progress import Progress
with Progress(10, "x", every_seconds=0.0) as progress:
    for done in range(200):
        progress.update(done)
        time.sleep(0.002)
print("the summary")
open(sys.argv[1], "w").write("done")
"""
    command = f"{sys.executable} -c '{script}' {tmp_path / 'end'} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2], check=False)
    assert (tmp_path / "end").read_text() == "done"
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_an_error_within_gives_the_terminal_back_and_passes_on() -> None:
    progress, stream, _ = terminal()
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert stream.getvalue().endswith("\x1b[?25h")


def test_an_update_that_shows_nothing_costs_under_fifty_microseconds() -> None:
    progress = Progress(10**9, "x", stream=io.StringIO(), every_seconds=1e9)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for done in range(1000):
            progress.update(done)
        best = min(best, (time.perf_counter() - began) / 1000)
    assert best < 50e-6
    assert len(progress._history) < 10  # and it does not grow


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00"), (90_061, "25:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999_999, "999,999"), (1_000_000, "1M"), (1_234_567, "1.235M"), (10_500_000, "10.5M")]
)
def test_counts(count: int, text: str) -> None:
    assert _short(count) == text
