"""Progress of a long job in the log: a line every few seconds with MB and percent.

The node's log shows it, and so do the commands of `librobot-vlm` (they print the log's lines).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

_log = logging.getLogger(__name__)

_PERIOD_S = 3.0


class LoggedProgress:
    """Bytes done of a total. The first line comes after a few seconds: short jobs say nothing."""

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._now = now
        self._started = self._told = now()
        self._done = self._total = 0

    def at(self, done: int, total: int) -> None:
        """So many bytes are done; `total` 0 where it is not known."""
        self._done, self._total = done, max(done, total)
        if self._now() - self._told >= _PERIOD_S:
            self._told = self._now()
            share = (
                f" of {self._total / 1e6:,.0f} MB ({done / self._total:.0%})" if total else " MB"
            )
            _log.info("%s: %s%s", self._what, f"{done / 1e6:,.0f}", share)

    def finish(self) -> None:
        """Say how much it was and how long it took, if it was long enough to be told of."""
        if self._told > self._started:
            spent = self._now() - self._started
            _log.info("%s: %s MB in %.0f s", self._what, f"{self._done / 1e6:,.0f}", spent)


@contextlib.contextmanager
def bars_to_log(what: str) -> Iterator[type[Any] | None]:
    """A class for `tqdm_class=` of the hub's client whose bars draw nothing and log the bytes.

    The client has one or two bars of bytes for all files together (received, written): the one that
    is further counts. Bars that count files are left out. None where nobody reads the log: the
    client then draws its own bars.
    """
    if not _log.isEnabledFor(logging.INFO):
        yield None
        return
    from tqdm import tqdm

    progress = LoggedProgress(what)
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # the client's own bars have it, tqdm's don't
            super().__init__(*args, **{**options, "disable": False})
            if self.unit == "B":
                bars.append(self)

        def display(self, *args: Any, **options: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if bars:
                done = max(bar.n for bar in bars)
                progress.at(int(done), int(max(bar.total or 0 for bar in bars)))
            return shown

        def close(self) -> None:
            self.disable = True  # the base class would draw the last state
            super().close()

    yield Bar
    progress.finish()
