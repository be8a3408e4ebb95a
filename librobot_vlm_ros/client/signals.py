"""Ctrl-C and SIGTERM as exceptions, raised only where they are not mangled on the way.

Python runs a signal's handler between any two of its instructions, also in those that rclpy's C++
code calls to make and read messages. An exception that is raised there comes out as another
("SystemError: returned a result with an exception set", measured in 3 of 60 demos ended by
SIGTERM), which no `except` expects. Such code runs inside `delayed()`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM came; raised so that every `finally` on the way out is run."""


_RAISED: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}
_delaying = False
_pending: BaseException | None = None


def install() -> Callable[[], None]:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM `Terminated`; call the result to undo it.

    Does nothing outside of the main thread, where Python lets nobody handle signals, and leaves a
    SIGINT that whoever started us had ignored.
    """
    before = {}
    for number in _RAISED:
        if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
            continue
        try:
            before[number] = signal.signal(number, _handle)
        except ValueError:
            break

    def undo() -> None:
        for number, handler in before.items():
            if handler is not None:  # None: set from C, and not to be set from here
                signal.signal(number, handler)

    return undo


@contextmanager
def delayed() -> Iterator[None]:
    """A signal that comes in here is raised at the end; keep it short. For one thread only."""
    global _delaying
    if _delaying:
        yield
        return
    _delaying = True
    try:
        yield
    finally:
        _delaying = False
        _raise_pending()


def _handle(number: int, _frame: object) -> None:
    global _pending
    # SIGTERM outlives a Ctrl-C that came with it: it is the more urgent way to end.
    if _pending is None or number == signal.SIGTERM:
        _pending = _RAISED[number]()
    if not _delaying:
        _raise_pending()


def _raise_pending() -> None:
    global _pending
    error, _pending = _pending, None
    if error is not None:
        raise error
