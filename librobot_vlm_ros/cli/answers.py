"""How `ask` and `query` show an answer: as lines, or as values for JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.console import Console

if TYPE_CHECKING:
    from librobot_vlm_ros.core import Region


def print_answer(text: str, regions: Sequence[Region], embedding: str, note: str) -> None:
    """Print regions, else the text, else the embedding's description; `note` goes to stderr."""
    if regions:
        rows = [
            (
                region.label,
                "-" if math.isnan(region.score) else f"{region.score:.2f}",
                *(f"{edge:.1f}" for edge in region.box),
            )
            for region in regions
        ]
        header = ("label", "score", "x_min", "y_min", "x_max", "y_max")
        Console().table(rows, header=header, right="lrrrrr")
    else:
        print(text or embedding or "nothing found")
    print(f"({note})", file=sys.stderr)


def regions_as_dicts(regions: Sequence[Region]) -> list[dict[str, Any]]:
    """Regions for JSON."""
    return [
        {
            "label": region.label,
            "score": number_or_none(region.score),
            "box": list(region.box),
            "polygon": [list(point) for point in region.polygon],
        }
        for region in regions
    ]


def describe_embedding(dtype: str, shape: Sequence[int]) -> str:
    """What stands for an embedding, which is too long to be shown."""
    return f"embedding {dtype}{list(shape)}"


def number_or_none(value: float) -> float | None:
    """`value`, or None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
