"""What commands show: stages, progress, tables, answers, log lines; plain without a terminal."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

__all__ = [
    "Console",
    "Progress",
    "embedding_words",
    "log_on_stderr",
    "number_or_none",
    "print_answer",
    "table",
]

_BAR_CELLS = 24
_REDRAW_S = 0.1
_PLAIN_PERIOD_S = 3.0


class Console:
    """Writes to `stream`; colours and redrawn lines only on a terminal, and never with NO_COLOR."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.colours = self.is_terminal and "NO_COLOR" not in os.environ

    def line(self, text: str = "") -> None:
        """One line."""
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def stage(self, text: str) -> None:
        """Announces what comes next."""
        self.line(f"{self.paint('==>', '1;34')} {self.paint(text, '1')}")

    def warn(self, text: str) -> None:
        """Something the user should know that ends nothing."""
        self.line(f"{self.paint('warning:', '1;33')} {text}")

    def paint(self, text: str, code: str) -> str:
        """`text` in an ANSI style, or as it is."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text

    def progress(self, total: int, what: str) -> Progress:
        """A progress display of `total` steps."""
        return Progress(self, total, what)


class Progress:
    """A bar, redrawn on a terminal; elsewhere a line every few seconds. A context manager."""

    def __init__(self, console: Console, total: int, what: str) -> None:
        self.done = 0
        self._console = console
        self._total = max(1, total)
        self._what = what
        self._drawn_s = -1e9
        self._note = ""
        self._period_s = _REDRAW_S if console.is_terminal else _PLAIN_PERIOD_S

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._draw()
        if self._console.is_terminal:
            self._console.stream.write("\n")
            self._console.stream.flush()

    def step(self, note: str = "", *, to: int | None = None) -> None:
        """One step further (or to step `to`), with a word about it."""
        self.done = self.done + 1 if to is None else to
        self._note = note
        if time.monotonic() - self._drawn_s >= self._period_s:
            self._draw()

    def finish(self, note: str = "") -> None:
        """All that there was is done, be it less than was expected."""
        self._total = max(1, self.done)
        self._note = note

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        share = min(1.0, self.done / self._total)
        counts = f"{self.done}/{self._total}"
        if not self._console.is_terminal:
            self._console.line(f"  {self._what} {counts}{f'  {self._note}' if self._note else ''}")
            return
        full = round(share * _BAR_CELLS)
        bar = "█" * full + "░" * (_BAR_CELLS - full)
        width = shutil.get_terminal_size().columns - 1
        text = f"  {self._what} {bar} {counts}  {self._note}"[:width]
        self._console.stream.write(f"\r{text}\x1b[K")
        self._console.stream.flush()


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: str = "") -> str:
    """`rows` in aligned columns under `header`. `right` holds an "r" for each column of numbers,
    as in "lrr".
    """
    everything = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not everything:
        return ""
    widths = [max(len(row[place]) for row in everything) for place in range(len(everything[0]))]

    def show(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right[place : place + 1] == "r" else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [show(row) for row in everything]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{warning}{record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print the package's log lines while this lasts, and keep transformers' bars out of them."""
    ours, lines = logging.getLogger("librobot_vlm_ros"), _Lines(logging.INFO)
    before = ours.level, ours.propagate
    ours.addHandler(lines)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(lines)
        ours.setLevel(before[0])
        ours.propagate = before[1]


Row = tuple[str, float, tuple[float, float, float, float]]


def print_answer(text: str, regions: Sequence[Row], embedding: str, note: str) -> None:
    """Print what came back: `regions` as (label, score, box in pixels); `note` goes to stderr."""
    if text and not regions:
        print(text)
    if regions:
        rows = [
            (label, "-" if math.isnan(score) else f"{score:.2f}", *(f"{edge:.1f}" for edge in box))
            for label, score, box in regions
        ]
        header = ("label", "score", "x_min", "y_min", "x_max", "y_max")
        print(table(rows, header=header, right="lrrrrr"))
    elif not text:
        print(embedding or "nothing found")
    print(f"({note})", file=sys.stderr)


def embedding_words(dtype: str, shape: Sequence[int]) -> str:
    """An embedding is too long to be shown: what it is."""
    return f"embedding {dtype}{list(shape)}"


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
