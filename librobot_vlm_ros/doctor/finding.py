"""What the doctor finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Literal["ok", "warning", "problem"]
    value: str
    fix: str = ""


def ok(name: str, value: str) -> Finding:
    """It is well."""
    return Finding(name, "ok", value)


def warning(name: str, value: str, fix: str = "") -> Finding:
    """It works, but not as well as it could."""
    return Finding(name, "warning", value, fix)


def problem(name: str, value: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(name, "problem", value, fix)


def gib(count: float) -> str:
    """Bytes as people read them."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def found_by(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that fails itself is a finding too, and ends nothing."""
    try:
        yield from check()
    except Exception as error:
        yield warning(name, f"could not be looked at: {type(error).__name__}: {error}")
