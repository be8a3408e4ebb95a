"""What the doctor finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Literal["ok", "warning", "problem"]
    value: str
    fix: str = ""


def found_by(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; one that fails itself is a finding too, and ends nothing."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        found.append(
            Finding(name, "warning", f"could not be looked at: {type(error).__name__}: {error}")
        )
    return found


def gib(count: float) -> str:
    """Bytes as people read them."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
