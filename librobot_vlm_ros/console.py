"""What commands show: stages, warnings, progress and tables; by `rich` on a terminal.

Into a pipe or a file, and with NO_COLOR, everything is plain lines that scripts can read. `rich` is
imported when something of it is drawn.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

_REDRAW_S = 0.1
_PLAIN_PERIOD_S = 3.0
_STYLES = re.compile(r"\x1b\[[\d;]*m")


class Console:
    """Writes to `stream`. `is_terminal`: lines may be redrawn; `colours`: and be coloured."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colours = self.is_terminal and "NO_COLOR" not in os.environ
        self.above: Any = None
        """rich's console while a progress bar is shown: lines are to stand above it."""

    def line(self, text: str = "") -> None:
        """One line."""
        if self.above is not None:
            self.above.out(text)
            return
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def stage(self, text: str) -> None:
        """Announces what comes next."""
        self.line(f"{self.paint('==>', 'bold blue')} {self.paint(text, 'bold')}")

    def warn(self, text: str) -> None:
        """Something the user should know that ends nothing."""
        self.line(f"{self.paint('warning:', 'bold yellow')} {text}")

    def paint(self, text: str, style: str) -> str:
        """`text` in a style of rich, as "bold red"; as it is where there are no colours."""
        if not self.colours:
            return text
        from rich.color import ColorSystem
        from rich.style import Style

        return Style.parse(style).render(text, color_system=ColorSystem.STANDARD)

    def table(
        self, rows: Sequence[Sequence[str]], *, header: Sequence[str], right: str = ""
    ) -> None:
        """`rows` in columns under `header`. `right` holds an "r" for each column of numbers, as in
        "lrr". Cells may be painted.
        """
        shown = table(rows, header=header, right=right)
        head, rest = shown.split("\n", 1)
        self.line(f"{self.paint(head, 'bold')}\n{rest}")

    def progress(self, total: int, what: str) -> Progress:
        """A progress display of `total` steps."""
        return Progress(self, total, what)


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds. A context manager."""

    def __init__(self, console: Console, total: int, what: str) -> None:
        self.done = 0
        self._console = console
        self._total = max(1, total)
        self._what = what
        self._note = ""
        self._drawn_s = -1e9
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich import progress
            from rich.console import Console as RichConsole

            # It takes no text for markup.
            self._console.above = RichConsole(
                file=self._console.stream,
                force_terminal=True,
                markup=False,
                highlight=False,
                emoji=False,
            )
            self._bar = progress.Progress(
                progress.TextColumn("  {task.description}", markup=False),
                progress.BarColumn(24),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[note]}", markup=False),
                console=self._console.above,
                auto_refresh=False,  # it would do so in a thread
                # What libraries print stands above the bar, unless it goes to a file.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._bar.add_task(self._what, total=self._total, note="")
            self._bar.start()
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._draw()
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._console.above = None

    def step(self, note: str = "", *, to: int | None = None) -> None:
        """One step further (or to step `to`), with a word about it."""
        self.done = self.done + 1 if to is None else to
        self._note = note
        period_s = _PLAIN_PERIOD_S if self._bar is None else _REDRAW_S
        if time.monotonic() - self._drawn_s >= period_s:
            self._draw()

    def finish(self, note: str = "") -> None:
        """All that there was is done, be it less than was expected."""
        self._total = max(1, self.done)
        self._note = note

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        if self._bar is None:
            note = f"  {self._note}" if self._note else ""
            self._console.line(f"  {self._what} {self.done}/{self._total}{note}")
        else:
            state = {"completed": self.done, "total": self._total, "note": self._note}
            self._bar.update(self._bar.task_ids[0], refresh=True, **state)


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: str = "") -> str:
    """`rows` as plain lines in aligned columns, the way `Console.table` prints without colours."""
    if not rows and not header:
        return ""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(_width, cells)) for cells in columns]

    def line(row: Sequence[str]) -> str:
        cells = []
        for cell, width, side in zip(row, widths, right.ljust(len(row)), strict=True):
            space = " " * (width - _width(cell))
            cells.append(space + cell if side == "r" else cell + space)
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _width(cell: str) -> int:
    return len(_STYLES.sub("", cell))


class _StderrLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{warning}{record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print the package's log lines while this lasts."""
    logger, lines = logging.getLogger("librobot_vlm_ros"), _StderrLines(logging.INFO)
    before = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before[0])
        logger.propagate = before[1]
