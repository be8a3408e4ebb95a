"""How `ask` and `query` show an answer: as lines, or as values for JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from librobot_vlm_ros.console import Console

Box = tuple[float, float, float, float]
"""x_min, y_min, x_max, y_max in pixels."""


def print_answer(
    text: str, regions: Sequence[tuple[str, float, Box]], embedding: str, note: str
) -> None:
    """Print regions (label, score, box), else the text, else the embedding's description; `note`
    goes to stderr.
    """
    if regions:
        rows = [
            (label, "-" if math.isnan(score) else f"{score:.2f}", *(f"{edge:.1f}" for edge in box))
            for label, score, box in regions
        ]
        header = ("label", "score", "x_min", "y_min", "x_max", "y_max")
        Console().table(rows, header=header, right="lrrrrr")
    else:
        print(text or embedding or "nothing found")
    print(f"({note})", file=sys.stderr)


def region_as_dict(
    label: str, score: float, box: Box, polygon: Iterable[tuple[float, float]]
) -> dict[str, Any]:
    """A region for JSON."""
    return {
        "label": label,
        "score": number_or_none(score),
        "box": list(box),
        "polygon": [list(point) for point in polygon],
    }


def describe_embedding(dtype: str, shape: Sequence[int]) -> str:
    """What stands for an embedding, which is too long to be shown."""
    return f"embedding {dtype}{list(shape)}"


def number_or_none(value: float) -> float | None:
    """`value`, or None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
