"""Seconds from launch to the first training frames, with a warm file cache.

    python -m benchmarks.start_time --out benchmarks/results/start_time.json

A process is launched as a user would, with a row of metrics on the first tick; the clock stops when that row is on disk. The first launch
only warms the caches (of files and of compiled kernels) and is not counted. `evaluation.before=true` (of experiment=demo) is measured
apart: it plays whole episodes before the first training frame.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOAL_SECONDS = 6.0


def seconds_to_first_row(words: Sequence[str]) -> float:
    """Launches, waits for the first row of metrics, and ends the process."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "launch.py", f"runs_dir={runs}", "run_name=start", "log_frames=64", *words]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        rows = Path(runs) / "start" / "metrics.jsonl"
        try:
            while process.poll() is None:
                if rows.exists() and rows.stat().st_size:
                    return time.perf_counter() - began
                time.sleep(0.005)
            raise RuntimeError(f"launch ended with {process.returncode}: {process.stderr.read().decode()[-500:] if process.stderr else ''}")
        finally:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints, and writes JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--games", nargs="+", default=["Pong"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    results = []
    for game in options.games:
        for before in ("false", "true"):
            words = [f"env={game}", "agent=episodic_control", f"evaluation.before={before}"]
            seconds_to_first_row(words)
            times = [seconds_to_first_row(words) for _ in range(options.repeats)]
            result = {"words": " ".join(words), "median_seconds": statistics.median(times), "seconds": times}
            results.append(result)
            print(f"{result['words']:66} {result['median_seconds']:.2f} s (goal {GOAL_SECONDS:.0f}; {min(times):.2f} to {max(times):.2f})")
    if options.out:
        facts = {"load": os.getloadavg()[0], "cores": os.cpu_count(), "goal_seconds": GOAL_SECONDS}
        options.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
