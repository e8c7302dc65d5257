"""Two processes that train in turns on the same processors, and wait, idle, while the other trains.

A worker is any process that prints one JSON line of facts when it is ready; then, for each line of input (a number of agent steps),
trains for at least so many and prints {"steps": ..., "seconds": ..., "cpu_seconds": ...} and what else it has to say.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agents.loop import Tick

ROOT = Path(__file__).parent.parent
OUTSIDE = {"GOMP_SPINCOUNT": "5000"}  # OpenMP's threads sleep sooner, and leave the processors to the emulators'
"""What is tuned outside the code, for our side alone: a rival runs as installed."""


class Worker:
    """One side: a process that trains when it is told to."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        everything = os.environ | environment
        self._process = subprocess.Popen(command, cwd=ROOT, env=everything, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def train(self, steps: int) -> dict[str, Any]:
        """Steps done and seconds taken."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{shlex.join(self._process.args)} has ended")  # type: ignore[arg-type]
        return json.loads(line)


def serve(ticks: Iterator[Tick], lanes: int, facts: dict[str, Any], updates: Callable[[], int]) -> None:
    """A worker of ours: the other end of `Worker`, until its input ends."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        count, parts, before = -(-int(line) // lanes), [0.0] * 4, updates()
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            parts = [total + part for total, part in zip(parts, next(ticks).seconds)]
        wall, busy = time.perf_counter() - began, time.process_time() - busy
        shares = dict(zip(("act", "env", "learn", "observe"), (round(part / wall, 3) for part in parts)))
        answer = {"steps": count * lanes, "seconds": wall, "cpu_seconds": busy, "updates": updates() - before, "shares": shares}
        print(json.dumps(answer), flush=True)


def take_turns(workers: Sequence[Worker], pairs: int, seconds: float, block: int) -> list[dict[str, Any]]:
    """Rows of `pairs` adjacent turns of about `seconds` each, in whole `block`s of agent steps, after a warm-up. Two workers, ours first;
    who goes first alternates. They are closed."""
    try:
        steps = []
        for worker in workers:
            worker.train(block)
            warm = worker.train(block)
            steps.append(max(1, round(seconds * warm["steps"] / warm["seconds"] / block)) * block)
        rows = []
        for pair in range(pairs):
            turns = {who: workers[who].train(steps[who]) for who in ((0, 1) if pair % 2 == 0 else (1, 0))}
            rates = [turns[who]["steps"] / turns[who]["seconds"] for who in (0, 1)]
            work = [round(1e6 * turns[who]["cpu_seconds"] / turns[who]["steps"]) for who in (0, 1)]
            row = {"ratio": rates[0] / rates[1], "ours": rates[0], "other": rates[1], "cpu_us_per_step": work}
            rows.append(row | {name: turns[0][name] for name in ("updates", "steps", "shares")})
        return rows
    finally:
        for worker in workers:
            worker.close()


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the range of ratios."""
    ratios = [row["ratio"] for row in rows]
    return {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_ratio_median": round(statistics.median(row["cpu_us_per_step"][1] / row["cpu_us_per_step"][0] for row in rows), 3),
        "steps_per_second": round(statistics.median(row["ours"] for row in rows)),
        "others_steps_per_second": round(statistics.median(row["other"] for row in rows)),
        "pairs": [{name: row[name] for name in ("ratio", "ours", "other", "cpu_us_per_step", "shares")} for row in rows],
    }
