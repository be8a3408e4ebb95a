"""What the rooms below log (downloads, loading, choices of `auto`), on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

__all__ = ["log_on_stderr"]


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
