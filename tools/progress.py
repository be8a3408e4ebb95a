"""Commands that take minutes: announced, timed, their last word shown, their output in a file."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Timer

#: Seconds between two lines of progress where lines cannot be overwritten (logs, pipes).
HEARTBEAT_S = 20.0

_NETWORK = re.compile(
    r"timed? ?out|connection (reset|aborted|refused|broken)|temporary failure|incompleteread|"
    r"max retries|name resolution|remote end closed|\b50[0234]\b (server )?error|"
    r"failed to establish|protocolerror|ssl: unexpected",
    re.IGNORECASE,
)


class CommandError(Exception):
    """A command ended with an error; `tail` holds the end of what it wrote."""

    def __init__(self, command: Sequence[str], code: int, log: Path, tail: str) -> None:
        super().__init__(f"{Path(command[0]).name} ended with {code}")
        self.code = code
        self.log = log
        self.tail = tail

    @property
    def looks_like_network(self) -> bool:
        """Whether trying again may help."""
        return _NETWORK.search(self.tail) is not None


def elapsed(seconds: float) -> str:
    """`7 s`, `1 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Ticker:
    """Shows that something is going on: one overwritten line on a terminal, a line now and then
    elsewhere.
    """

    def __init__(self, stream: object = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._live = bool(getattr(self._stream, "isatty", lambda: False)())
        self._begun = time.monotonic()
        self._said = self._begun
        self._text = ""
        self._timer: Timer | None = None

    def __enter__(self) -> Ticker:
        self._schedule()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._live:
            self._write("\r\033[K")

    def say(self, text: str) -> None:
        """What is going on now."""
        self._text = text

    def _schedule(self) -> None:
        self._timer = Timer(0.5 if self._live else HEARTBEAT_S, self._tick)
        self._timer.daemon = True
        self._timer.start()

    def _tick(self) -> None:
        line = f"      {elapsed(time.monotonic() - self._begun):>11}  {self._text[:80]}"
        self._write(f"\r\033[K{line}" if self._live else f"{line}\n")
        self._schedule()

    def _write(self, text: str) -> None:
        self._stream.write(text)  # type: ignore[attr-defined]
        self._stream.flush()  # type: ignore[attr-defined]


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    summarise: Callable[[str], str | None],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run `command` with its output in `log`, showing what `summarise` makes of its lines.

    Raises CommandError with the last lines.
    """
    lines: list[str] = []
    with (
        log.open("w", encoding="utf-8") as sink,
        Ticker() as ticker,
        subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sink.write(line)
                lines = [*lines[-59:], line]
                said = summarise(line.strip())
                if said:
                    ticker.say(said)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
    if code != 0:
        raise CommandError(command, code, log, "".join(lines))
