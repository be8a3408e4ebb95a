"""Figures in words, the same in pictures, report and terminal."""

from __future__ import annotations

__all__ = ["duration"]


def duration(seconds: float) -> str:
    """`212 ms`, or `29.6 s` from ten seconds on."""
    return f"{seconds:.1f} s" if seconds >= 10.0 else f"{seconds * 1e3:.0f} ms"
