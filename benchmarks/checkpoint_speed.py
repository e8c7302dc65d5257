"""Seconds to save and load a large memory: a first time, again with nothing changed, and again with 3% of its rows written.

    python benchmarks/checkpoint_speed.py [--gigabytes 2] [--folder .]

Beside each time stands that of a plain write (or read) of the same bytes to the same disk, since disks differ more than programs do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lab.checkpoint import load, save

FEATURES = 64
ROW_BYTES = 4 * FEATURES + 4 + 8 + 8  # key, value, hash, stamp


def memory(rows: int) -> dict[str, torch.Tensor]:
    """An episodic memory of random content: float32 keys (rows, 64) and values (rows), int64 hashes and stamps (rows)."""
    ints = torch.randint(0, 2**62, (2, rows))
    return {"keys": torch.randn(rows, FEATURES), "values": torch.randn(rows), "hashes": ints[0].clone(), "stamps": ints[1].clone()}


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call, its result let go."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def overwrite(state: dict[str, torch.Tensor], first: int, rows: int) -> None:
    """Writes `rows` rows from `first` on anew, as a memory that fills up or goes round does."""
    for name, fresh in memory(rows).items():
        state[name][first : first + rows] = fresh


def plain_write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The state's bytes in one file, down to the disk."""
    with open(folder / "plain", "wb") as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def plain_read(folder: Path) -> None:
    """The file of `plain_write` in blocks of 4 MiB."""
    with open(folder / "plain", "rb", buffering=0) as file:
        while file.read(4 << 20):
            pass


def written_bytes(run: Path) -> int:
    """Bytes of the newest checkpoint that are not linked from the one before."""
    return sum(file.stat().st_size for file in (run / "checkpoint").iterdir() if file.stat().st_nlink == 1)


def measure(folder: Path, gigabytes: float) -> dict[str, float]:
    """All figures: seconds, and bytes written."""
    rows = int(gigabytes * 1e9 / ROW_BYTES)
    state, changed = memory(rows), rows * 3 // 100
    run = folder / "run"
    figures: dict[str, float] = {"rows": rows, "bytes": rows * ROW_BYTES}
    figures["plain write, s"] = seconds(lambda: plain_write(folder, state))
    figures["first save, s"] = seconds(lambda: save(run, state))
    figures["save unchanged, s"] = seconds(lambda: save(run, state))
    figures["save unchanged, bytes written"] = written_bytes(run)
    overwrite(state, rows // 2, changed)
    figures["save with 3% overwritten in a row, s"] = seconds(lambda: save(run, state))
    figures["save with 3% overwritten in a row, bytes written"] = written_bytes(run)
    state = {name: torch.cat([tensor, fresh]) for (name, tensor), fresh in zip(state.items(), memory(changed).values())}
    figures["save with 3% appended, s"] = seconds(lambda: save(run, state))
    figures["save with 3% appended, bytes written"] = written_bytes(run)
    figures["plain read, s"] = seconds(lambda: plain_read(folder))
    found = load(run).state
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    del found
    figures["load, s"] = seconds(lambda: load(run))
    figures["load values only, s"] = seconds(lambda: load(run, only="values"))
    return figures


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-speed-", dir=options.folder))
    try:
        print(json.dumps({name: round(figure, 2) for name, figure in measure(folder, options.gigabytes).items()}, indent=2))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
