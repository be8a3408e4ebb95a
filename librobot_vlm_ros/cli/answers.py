"""Answers in the terminal, the same for `query` and `ask`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from librobot_vlm_ros.cli.console import table

__all__ = ["embedding_words", "number_or_none", "print_answer"]

Row = tuple[str, float, tuple[float, float, float, float]]


def print_answer(text: str, regions: Sequence[Row], embedding: str, note: str) -> None:
    """Print what came back: `regions` as (label, score, box in pixels); `note` goes to stderr."""
    if text and not regions:
        print(text)
    if regions:
        rows = [
            (label, "-" if math.isnan(score) else f"{score:.2f}", *(f"{edge:.1f}" for edge in box))
            for label, score, box in regions
        ]
        header = ("label", "score", "x_min", "y_min", "x_max", "y_max")
        print(table(rows, header=header, right="lrrrrr"))
    elif not text:
        print(embedding or "nothing found")
    print(f"({note})", file=sys.stderr)


def embedding_words(dtype: str, shape: Sequence[int]) -> str:
    """An embedding is too long to be shown: what it is."""
    return f"embedding {dtype}{list(shape)}"


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
