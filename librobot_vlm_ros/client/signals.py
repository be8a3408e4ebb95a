"""Ctrl-C and SIGTERM as exceptions, raised where they arrive whole.

Python runs a signal's handler between any two of its instructions, also in those that rclpy's C++
code calls: messages are made and read there. An exception that begins in one comes out as another
("SystemError: returned a result with an exception set", measured in 3 of 60 demos ended by
SIGTERM), and nobody who waits for it knows it again. Such code runs inside `held()`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Terminated", "catch", "held"]


class Terminated(BaseException):
    """SIGTERM came; raised so that every `finally` on the way out is run."""


_RAISED: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}
_holding = False
_waiting: BaseException | None = None


def catch() -> Callable[[], None]:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM `Terminated`; call the result to undo it.

    Does nothing outside of the main thread, where Python lets nobody handle signals, and leaves a
    SIGINT that whoever started us had ignored.
    """
    before = {}
    for number in _RAISED:
        if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
            continue
        try:
            before[number] = signal.signal(number, _came)
        except ValueError:
            break

    def undo() -> None:
        for number, handler in before.items():
            if handler is not None:  # None: set from C, and not to be set from here
                signal.signal(number, handler)

    return undo


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes in here is raised at the end; keep it short. For one thread only."""
    global _holding
    if _holding:
        yield
        return
    _holding = True
    try:
        yield
    finally:
        _holding = False
        _raise_waiting()


def _came(number: int, _frame: object) -> None:
    global _waiting
    # SIGTERM outlives a Ctrl-C that came with it: it is the more urgent way to end.
    if _waiting is None or number == signal.SIGTERM:
        _waiting = _RAISED[number]()
    if not _holding:
        _raise_waiting()


def _raise_waiting() -> None:
    global _waiting
    error, _waiting = _waiting, None
    if error is not None:
        raise error
