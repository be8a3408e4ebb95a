"""What is printed lines up, and stays plain where nobody watches a terminal."""

from __future__ import annotations

import io
import re

from librobot_vlm_ros.console import Console, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_line_up_and_numbers_to_the_right() -> None:
    shown = table([("a", "1"), ("long one", "1000")], header=("name", "n"), right="lr")
    assert shown.splitlines() == [
        "name         n",
        "--------  ----",
        "a            1",
        "long one  1000",
    ]


def test_an_empty_table_is_nothing() -> None:
    assert table([]) == ""


def test_progress_off_a_terminal_is_a_few_plain_lines() -> None:
    stream = io.StringIO()
    with Console(stream).progress(100, "frames") as progress:
        for number in range(100):
            progress.step(f"frame {number}")
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == ["frames", "0/100"]
    assert lines[-1].split()[:2] == ["frames", "100/100"]
    assert len(lines) < 10
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_redraws_one_line() -> None:
    stream = Terminal()
    with Console(stream).progress(3, "frames") as progress:
        for _ in range(3):
            progress.step()
    assert "\r" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1
    assert "3/3" in stream.getvalue()


def test_a_table_on_a_terminal_shows_cells_as_they_are(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    long = "a [bold]name[/bold] " * 20
    Console(stream).table([(long, "1000")], header=("name", "n"), right="lr")
    shown = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()
    assert shown[0].split() == ["name", "n"]
    assert shown[2].startswith(long)  # neither cut off nor broken nor taken for markup
    assert shown[2].split()[-1] == "1000"


def test_lines_stand_above_the_bar_of_a_terminal() -> None:
    stream = Terminal()
    console = Console(stream)
    with console.progress(2, "frames") as progress:
        progress.step()
        console.line("loaded")
    console.line("done")
    shown = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", stream.getvalue())
    assert "\rloaded\n" in shown
    assert shown.endswith("\ndone\n")


def test_colours_only_where_they_are_wanted(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Console(Terminal()).paint("x", "bold") == "\x1b[1mx\x1b[0m"
    assert Console(io.StringIO()).paint("x", "bold") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(Terminal()).paint("x", "bold") == "x"
