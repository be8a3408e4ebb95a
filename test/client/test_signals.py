"""What Ctrl-C and SIGTERM do to a command, and where."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from librobot_vlm_ros.client import signals


@pytest.fixture(autouse=True)
def caught() -> Iterator[None]:
    undo = signals.install()
    yield
    undo()


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)],
)
def test_a_signal_is_raised_at_once(number: int, error: type[BaseException]) -> None:
    with pytest.raises(error):
        signal.raise_signal(number)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)],
)
def test_a_held_signal_is_raised_at_the_end_and_once(
    number: int, error: type[BaseException]
) -> None:
    steps = []

    def work() -> None:
        with signals.delayed():
            signal.raise_signal(number)
            with signals.delayed():
                steps.append("inner")
            steps.append("outer")

    with pytest.raises(error):
        work()
    assert steps == ["inner", "outer"]
    with signals.delayed():
        pass


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_of_both_signals_sigterm_is_raised(numbers: tuple[int, int]) -> None:
    def work() -> None:
        with signals.delayed():
            for number in numbers:
                signal.raise_signal(number)

    with pytest.raises(signals.Terminated):
        work()


def test_an_error_of_held_code_gives_way_to_the_signal_and_stays_its_context() -> None:
    def work() -> None:
        with signals.delayed():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("mangled")

    with pytest.raises(signals.Terminated) as raised:
        work()
    assert isinstance(raised.value.__context__, ValueError)


def test_undone_the_handlers_are_those_of_before() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals.install()()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
