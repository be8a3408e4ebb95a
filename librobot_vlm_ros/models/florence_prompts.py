"""What Florence-2 is asked: a task is an English sentence, a region four location tokens.

Sentences as published with the model (microsoft/Florence-2-large, processing_florence2.py, MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from librobot_vlm_ros.core import ErrorCode, RequestError

__all__ = ["BINS", "FLORENCE_TASKS", "FlorenceTask", "build_prompt", "location_bins"]

#: Coordinates are written in thousandths of the image's width and height.
BINS = 1000

Answer = Literal[
    "text", "boxes", "grounding", "proposals", "quads", "polygons", "boxes_or_polygons"
]


@dataclass(frozen=True)
class FlorenceTask:
    """One task: its own name, the sentence that asks for it, and what the answer looks like."""

    native: str
    sentence: str
    answer: Answer
    #: "text" or "region" where `{input}` in the sentence stands for one.
    takes: Literal["", "text", "region"] = ""


FLORENCE_TASKS: Mapping[str, FlorenceTask] = {
    "caption": FlorenceTask("<CAPTION>", "What does the image describe?", "text"),
    "detailed_caption": FlorenceTask(
        "<DETAILED_CAPTION>", "Describe in detail what is shown in the image.", "text"
    ),
    "more_detailed_caption": FlorenceTask(
        "<MORE_DETAILED_CAPTION>",
        "Describe with a paragraph what is shown in the image.",
        "text",
    ),
    "detect": FlorenceTask("<OD>", "Locate the objects with category name in the image.", "boxes"),
    "dense_region_caption": FlorenceTask(
        "<DENSE_REGION_CAPTION>",
        "Locate the objects in the image, with their descriptions.",
        "boxes",
    ),
    "region_proposal": FlorenceTask(
        "<REGION_PROPOSAL>", "Locate the region proposals in the image.", "proposals"
    ),
    "ocr": FlorenceTask("<OCR>", "What is the text in the image?", "text"),
    "ocr_with_region": FlorenceTask(
        "<OCR_WITH_REGION>", "What is the text in the image, with regions?", "quads"
    ),
    "ground": FlorenceTask(
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "Locate the phrases in the caption: {input}",
        "grounding",
        "text",
    ),
    "open_vocabulary_detect": FlorenceTask(
        "<OPEN_VOCABULARY_DETECTION>",
        "Locate {input} in the image.",
        "boxes_or_polygons",
        "text",
    ),
    "segment": FlorenceTask(
        "<REFERRING_EXPRESSION_SEGMENTATION>",
        "Locate {input} in the image with mask",
        "polygons",
        "text",
    ),
    "region_segment": FlorenceTask(
        "<REGION_TO_SEGMENTATION>",
        "What is the polygon mask of region {input}",
        "polygons",
        "region",
    ),
    "region_category": FlorenceTask(
        "<REGION_TO_CATEGORY>", "What is the region {input}?", "text", "region"
    ),
    "region_caption": FlorenceTask(
        "<REGION_TO_DESCRIPTION>", "What does the region {input} describe?", "text", "region"
    ),
    "region_ocr": FlorenceTask(
        "<REGION_TO_OCR>", "What text is in the region {input}?", "text", "region"
    ),
}


def build_prompt(
    task: FlorenceTask, text: str, region: tuple[float, ...] | None, width: int, height: int
) -> list[str | tuple[int, ...]]:
    """The prompt as pieces: a string is words, a tuple of ints is location bins.

    The pieces keep apart what we put in from what a user wrote: location tokens come from a
    region only, never from text. `region` is (x_min, y_min, x_max, y_max) in pixels.
    Raises RequestError EMPTY_PROMPT, BAD_REGION, or BAD_PARAMETER for text that nobody would read.
    """
    before, hole, after = task.sentence.partition("{input}")
    if task.takes == "text":
        if not text.strip():
            raise RequestError(
                ErrorCode.EMPTY_PROMPT, f"{task.native} needs a text: what to look for"
            )
        return [before + text.strip() + after]
    if text.strip():
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"{task.native} takes no text, but got {text.strip()[:80]!r}",
            "leave the prompt empty, or use a task that takes one, such as ground",
        )
    if not hole:
        return [before]
    if region is None:
        raise RequestError(
            ErrorCode.BAD_REGION, f"{task.native} needs a region: x_min, y_min, x_max, y_max"
        )
    return [before, location_bins(region, width, height), after]


def location_bins(region: tuple[float, ...], width: int, height: int) -> tuple[int, ...]:
    """Pixels to bins 0 to 999, x and y in turn: the bin that the pixel coordinate falls into."""
    sizes = (width, height)
    return tuple(
        min(BINS - 1, max(0, int(value * BINS // sizes[place % 2])))
        for place, value in enumerate(region)
    )
