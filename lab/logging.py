"""The logs of a run folder: metrics.jsonl and evaluation.csv, written so that a kill at any moment costs at most the last line."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from envs.api import UserError

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.csv"
EVALUATION_COLUMNS = ("frames", "iteration", "episode", "lane", "return", "length_frames", "protocol", "epsilon")
_WHOLE_NUMBERS = {"frames", "iteration", "episode", "lane", "length_frames"}


def plain(value: Any) -> float | int | str | bool | None:
    """A number or name that strict JSON can hold: 0-d tensors and numpy scalars become numbers, non-finite floats None.

    Raises:
        TypeError: `value` is a container, or a tensor with more than one element.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:
            raise TypeError(f"a metric is one number, got shape {tuple(getattr(value, 'shape', ()))}") from error
        if isinstance(value, (bool, str)):
            return value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"a metric is a number or a name, got {type(value).__name__}")


class _Appender:
    """A file that grows by whole lines. Opening it drops a half-written last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            _cut_file(path, None)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, text: str) -> None:
        """Writes the whole of `text` or nothing, and leaves it in the system's hands: a kill of this process cannot lose it."""
        begin = self.size()
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(begin)
            raise _cannot_write(self.path, error) from error

    def size(self) -> int:
        """Bytes on disk."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Waits until the disk itself holds what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Twice is harmless."""
        self._file.close()


class MetricsLog:
    """metrics.jsonl: one flat JSON object a line, with `frames` and `iteration`. A number that is not finite is written as null."""

    def __init__(self, folder: Path | str) -> None:
        """Opens the log of the run in `folder`, which is made where missing. UserError where it cannot be written."""
        self.folder = Path(folder)
        self._file = _Appender(self.folder / METRICS_FILE)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends `row` (names -> numbers, 0-d tensors, names); this is where tensors on a device are waited for.

        Raises:
            TypeError: a value is not one number or name. UserError: the disk is full or gone.
        """
        self._file.append(json.dumps({str(name): plain(value) for name, value in row.items()}, allow_nan=False) + "\n")

    def position(self) -> dict[str, int]:
        """Bytes of each log of the run folder, for the checkpoint. What they hold is on the disk when this returns."""
        self._file.sync()
        sizes = {METRICS_FILE: self._file.size(), EVALUATION_FILE: 0}
        evaluation = self.folder / EVALUATION_FILE
        if evaluation.exists():
            with evaluation.open("rb") as file:
                os.fsync(file.fileno())
                sizes[EVALUATION_FILE] = os.fstat(file.fileno()).st_size
        return sizes

    def cut_back(self, position: Mapping[str, int]) -> None:
        """See the function `cut_back`; open logs of the folder go on behind the cut."""
        cut_back(self.folder, position)

    def close(self) -> None:
        """Twice is harmless."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EvaluationLog:
    """evaluation.csv: one row an episode under a header of `EVALUATION_COLUMNS`."""

    def __init__(self, folder: Path | str) -> None:
        """Opens the log of the run in `folder`, which is made where missing. UserError where it cannot be written."""
        self._file = _Appender(Path(folder) / EVALUATION_FILE)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends the episodes of one evaluation together, all or none. A missing column stays empty.

        Raises:
            ValueError: a column that is not in `EVALUATION_COLUMNS`. UserError: the disk is full or gone.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, EVALUATION_COLUMNS, lineterminator="\n")
        if self._file.size() == 0:
            writer.writeheader()
        for row in rows:
            cells = {name: plain(value) for name, value in row.items()}
            writer.writerow({name: " ".join(cell.split()) if isinstance(cell, str) else cell for name, cell in cells.items()})
        self._file.append(text.getvalue())

    def close(self) -> None:
        """Twice is harmless."""
        self._file.close()

    def __enter__(self) -> EvaluationLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def cut_back(folder: Path | str, position: Mapping[str, int]) -> None:
    """Drops what the logs in `folder` hold beyond a checkpoint's `position` (bytes by file name), and half-written lines with it.

    A log shorter than its position stays as it is: what it lost cannot be had back. Only the two logs are ever touched.
    """
    for name in (METRICS_FILE, EVALUATION_FILE):
        path = Path(folder) / name
        if path.exists():
            try:
                _cut_file(path, max(0, int(position.get(name, 0))))
            except OSError as error:
                raise _cannot_write(path, error) from error


def _cut_file(path: Path, size: int | None) -> None:
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end if size is None else min(size, end)
        while keep > 0:
            begin = max(0, keep - 65536)
            file.seek(begin)
            newline = file.read(keep - begin).rfind(b"\n")
            if newline >= 0:
                keep = begin + newline + 1
                break
            keep = begin
        if keep < end:
            file.truncate(keep)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}. Free some space, or choose another place with runs_dir=")


def read_metrics(folder: Path | str, most_rows: int | None = None) -> list[dict[str, float | str]]:
    """The rows of metrics.jsonl, for a log of any origin: lines that are no row are passed over, null becomes NaN.

    Args:
        folder: the run folder; a missing log reads as no rows.
        most_rows: about how many rows to read. A longer log is thinned evenly, each kind of row (by its number of names) for itself.

    Returns:
        Flat dicts with a finite `frames`; values are floats, or names.
    """
    rows = []
    for line in _thinned(Path(folder) / METRICS_FILE, most_rows):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            cleaned = {name: value if isinstance(value, str) else _number(value) for name, value in row.items() if _is_flat(value)}
            frames = cleaned.get("frames")
            if isinstance(frames, float) and math.isfinite(frames):
                rows.append(cleaned)
    return rows


def read_evaluation(folder: Path | str) -> list[dict[str, Any]]:
    """The episodes of evaluation.csv, for a file of any origin: rows without a finite frames and a numeric return are passed over.

    Returns:
        Dicts by `EVALUATION_COLUMNS`; counts are ints, return and epsilon floats, protocol a str, and what is missing is absent.
    """
    lines = _whole_lines(Path(folder) / EVALUATION_FILE)
    header = next(lines, b"").decode("utf-8", "replace").strip().split(",")
    if "frames" not in header or "return" not in header:
        return []
    episodes = []
    for line in lines:
        try:
            cells = next(csv.reader([line.decode("utf-8", "replace")]))
            row: dict[str, Any] = {}
            for name, cell in zip(header, cells):
                if cell and name in _WHOLE_NUMBERS:
                    row[name] = int(float(cell))
                elif cell and name in {"return", "epsilon"}:
                    row[name] = float(cell)
                elif name == "protocol":
                    row[name] = cell
        except (ValueError, OverflowError, csv.Error, StopIteration):
            continue
        if "frames" in row and "return" in row:
            episodes.append(row)
    return episodes


def _is_flat(value: object) -> bool:
    return value is None or isinstance(value, (int, float, str))


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.nan


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines that end in a newline: a torn number would otherwise read as another number."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line
    except OSError:
        return


def _thinned(path: Path, most: int | None) -> Iterator[bytes]:
    """All lines, or the first of each kind in every block of equal length, and the last line. Quotation marks tell kinds apart."""
    if most is None or not path.exists() or path.stat().st_size == 0:
        yield from _whole_lines(path)
        return
    with path.open("rb") as file:
        sample = file.read(1 << 20)
    lines = path.stat().st_size * max(1, sample.count(b"\n")) / len(sample)
    block = math.ceil(lines / most)
    seen: set[int] = set()
    line, shown = b"", True
    for index, line in enumerate(_whole_lines(path)):
        if index % block == 0:
            seen.clear()
        kind = line.count(b'"')
        shown = kind not in seen and len(seen) < 8
        if shown:
            seen.add(kind)
            yield line
    if not shown:
        yield line
