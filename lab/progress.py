"""The live view of a job: a bar with time left, score, speed and time budget on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console, Group
from rich.errors import LiveError
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 10.0
REFRESH_SECONDS = 0.5
SPEED_SECONDS = 15.0
ALIASES = {"memory/bytes": "memory_bytes"}
PARTS = {"env": "cyan", "act": "blue", "learn": "magenta", "density": "yellow", "observe": "green", "log": "bright_black"}


class Progress:
    """Shows how far a job has come. A context manager; what it costs when nothing is due is one look at the clock.

    A terminal gets a bar that is redrawn at most twice a second. Pipes, files and dumb terminals get one plain line every `every_seconds`.
    """

    def __init__(
        self,
        total: int,
        title: str,
        unit: str = "frames",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_seconds: float = LINE_SECONDS,
        console: Console | None = None,
    ) -> None:
        """Prepares the view; it appears on `__enter__`, or with the first update.

        Args:
            total: how many `unit` the whole job has (0 where unknown).
            title: what runs, in a few words.
            unit: of the count: frames, updates, episodes.
            stream: where to write; None is stdout.
            clock: seconds from any origin.
            every_seconds: between two plain lines.
            console: a rich console in place of `stream`.
        """
        self.total, self.title, self.unit = max(0, int(total)), title, unit
        self._console = console or _Console(file=stream, highlight=False)
        self._clock, self._every = clock, every_seconds
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        if self._is_live:
            self._every = REFRESH_SECONDS
        self._live: Live | None = None
        self._is_broken = self._is_closed = False
        self._values: dict[str, Any] = {}
        self._done = 0
        self._history: deque[tuple[float, int]] = deque()
        self._due = clock() + self._every

    def __enter__(self) -> Progress:
        if self._is_live and self._live is None:
            self._guard(self._start_live)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, done: int, **values: Any) -> None:
        """Tells that `done` units of the whole are done. Values stay until they are told anew.

        Known names: `score`; `env`, `act`, `learn`, `density`, `observe`, `log` (shares 0..1 of the time); `entries`, `memory_bytes`;
        `frames_per_second`, in place of the speed measured here. Any other is shown by its name. A metric's group (`time/env`,
        `memory/bytes`) may stand in front.
        """
        self._done = done
        if values:
            self._values.update((ALIASES.get(name) or name.rpartition("/")[2], value) for name, value in values.items())
        now = self._clock()
        if not self._history:
            self._history.append((now, done))
        if now >= self._due and not self._is_closed:
            self._due = now + self._every
            self._measure(now)
            self._guard(self._show)

    def message(self, text: str) -> None:
        """Prints `text` above the bar, at once and as it is."""
        self._guard(lambda: self._console.print(Text(text), soft_wrap=True))

    def close(self) -> None:
        """Shows the last state and gives the terminal back. Twice is harmless."""
        if self._is_closed:
            return
        self._measure(self._clock())
        if self._history:
            self._guard(self._show)
        self._is_closed = True
        live, self._live = self._live, None
        if live is not None:
            self._guard(live.stop)

    def line(self) -> str:
        """The state as one plain line."""
        return "  ".join([self.title, *(text for text, _ in self._pieces())])

    def _measure(self, now: float) -> None:
        if not self._history or now > self._history[-1][0]:
            self._history.append((now, self._done))
        while len(self._history) > 2 and self._history[1][0] <= now - SPEED_SECONDS:
            self._history.popleft()

    def _speed(self) -> float | None:
        """Units per second: what the job itself reports of frames, else the mean of the last 15 seconds."""
        told = self._values.get("frames_per_second")
        if told is not None and self.unit == "frames":
            return float(told)
        if len(self._history) < 2:
            return None
        (before, done_before), (now, done) = self._history[0], self._history[-1]
        return (done - done_before) / (now - before) if now > before and done >= done_before else None

    def _pieces(self) -> list[tuple[str, str]]:
        """(text, style), the most wanted first."""
        speed, values = self._speed(), dict(self._values)
        values.pop("frames_per_second", None)
        share = f" {self._done / self.total:.0%}" if self.total else ""
        of = f"/{_short(self.total)}" if self.total else ""
        pieces = [(f"{_short(self._done)}{of} {self.unit}{share}", "bold")]
        if speed and self.total > self._done:
            pieces.append((f"{_duration((self.total - self._done) / speed)} left", "cyan"))
        score = values.pop("score", None)
        if score is not None:
            pieces.append((f"score {_number(score)}", "bold green"))
        if speed is not None:
            pieces.append((f"{_number(speed) if speed < 100 else format(speed, ',.0f')} {self.unit}/s", ""))
        for name, style in PARTS.items():
            if values.get(name) is not None:
                pieces.append((f"{name} {float(values[name]):.0%}", style))
            values.pop(name, None)
        entries, size = values.pop("entries", None), values.pop("memory_bytes", None)
        if entries is not None or size is not None:
            told = [f"{_short(float(entries))} entries"] if entries is not None else []
            told += [human_bytes(float(size))] if size is not None else []
            pieces.append(("memory " + ", ".join(told), ""))
        pieces += [(f"{name.replace('_', ' ')} {_number(value)}", "") for name, value in values.items() if value is not None]
        return pieces

    def _start_live(self) -> None:
        self._live = Live(self._picture(), console=self._console, auto_refresh=False, transient=False)
        self._live.start(refresh=True)

    def _show(self) -> None:
        if not self._is_live:
            self._console.print(Text(self.line()), soft_wrap=True)
        elif self._live is None:
            self._start_live()
        else:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        width = self._console.width
        pieces = self._pieces()
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True, overflow="ellipsis", max_width=max(8, width // 2))
        head.add_column(ratio=1, min_width=6)
        head.add_column(no_wrap=True, justify="right")
        title, (count, count_style) = Text(self.title, style="bold"), pieces.pop(0)
        bar = ProgressBar(total=self.total or 1, completed=min(self._done, self.total or 0), complete_style="cyan", finished_style="green")
        if width >= len(count) + 30:
            head.add_row(title, bar, Text(count, style=count_style))
        else:
            head.add_row(Text(""), bar, Text(""))
            pieces.insert(0, (count, count_style))
        return Group(head, *_fill(pieces, width, " | " if self._console.options.ascii_only else " · "))

    def _guard(self, work: Callable[[], Any]) -> None:
        """A view that cannot write (a closed pipe, a full disk) falls silent; the job goes on."""
        if self._is_broken:
            return
        try:
            work()
        except (OSError, ValueError, LiveError):
            self._is_broken = True


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Where nobody reads any more (a closed pipe) rich would end the program; a run goes on, and its words go nowhere."""
        self.quiet = True
        if self.file is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill(pieces: list[tuple[str, str]], width: int, separator: str) -> list[Text]:
    """Pieces, in order, on as few lines as `width` characters allow; no piece is broken."""
    lines: list[Text] = []
    for text, style in pieces:
        if lines and lines[-1].cell_len + len(separator) + len(text) <= width - 1:
            lines[-1].append(separator, style="dim").append(text, style=style)
        else:
            lines.append(Text(no_wrap=True, overflow="ellipsis").append(text, style=style))
    return lines


def _number(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return f"{number:,.1f}" if abs(number) >= 10 or number == 0 else f"{number:.3g}"


def _short(count: float) -> str:
    """12,345 as it is; 1,234,567 as 1.235M."""
    if abs(count) < 1_000_000:
        return f"{count:,.0f}"
    return f"{count / 1e6:.3f}".rstrip("0").rstrip(".") + "M"


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB': decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
