"""What can be asked of a model, under names common to all families.

Florence-2's own task prompts (`<OD>`, `OD`) and the names people use elsewhere are accepted as
aliases.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from librobot_vlm_ros.core.errors import ErrorCode, RequestError
from librobot_vlm_ros.core.logtext import shortened

TaskOutput = Literal["text", "regions", "embedding"]

_MAX_NAME_CHARS = 64


@dataclass(frozen=True)
class TaskSpec:
    """One task: what it needs and what it gives."""

    name: str
    """Common name, as in requests, results and parameters."""
    needs_text: bool
    """Whether a prompt must come with it (what to look for, or a question)."""
    needs_region: bool
    """Whether a box (x_min, y_min, x_max, y_max) in source pixels must come with it."""
    output: TaskOutput
    """Main part of the answer: text, regions or an embedding tensor."""
    description: str
    aliases: tuple[str, ...] = ()


_ALIASES = {
    "caption": "captioning describe",
    "detailed_caption": "detailed",
    "more_detailed_caption": "more_detailed",
    "detect": "od detection object_detection detect_objects",
    "dense_region_caption": "dense_caption",
    "region_proposal": "proposal proposals",
    "ground": "caption_to_phrase_grounding phrase_grounding grounding locate",
    "open_vocabulary_detect": "open_vocabulary_detection open_vocabulary ovd",
    "segment": "referring_expression_segmentation referring_segmentation segmentation",
    "region_segment": "region_to_segmentation region_segmentation",
    "region_category": "region_to_category classify_region",
    "region_caption": "region_to_description region_description",
    "region_ocr": "region_to_ocr",
    "ocr": "read read_text",
    "ocr_with_region": "ocr_with_regions",
    "answer": "vqa question ask visual_question_answering",
    "embed": "embedding embeddings",
}


def _spec(name: str, output: TaskOutput, needs: str, description: str) -> TaskSpec:
    aliases = tuple(_ALIASES[name].split())
    return TaskSpec(name, needs == "text", needs == "region", output, description, aliases)


_ALL = (
    _spec("caption", "text", "", "one sentence about the image"),
    _spec("detailed_caption", "text", "", "several sentences about the image"),
    _spec("more_detailed_caption", "text", "", "a paragraph about the image"),
    _spec("detect", "regions", "", "labelled boxes of all objects the model knows"),
    _spec("dense_region_caption", "regions", "", "boxes with a phrase each"),
    _spec("region_proposal", "regions", "", "boxes without labels"),
    _spec("ground", "regions", "text", "a box for each phrase of the prompt"),
    _spec("open_vocabulary_detect", "regions", "text", "boxes of everything that the prompt names"),
    _spec("segment", "regions", "text", "a polygon of what the prompt refers to"),
    _spec("region_segment", "regions", "region", "a polygon of the object in the region"),
    _spec("region_category", "text", "region", "the class of the object in the region"),
    _spec("region_caption", "text", "region", "a phrase about the region"),
    _spec("region_ocr", "text", "region", "the text written in the region"),
    _spec("ocr", "text", "", "all text written in the image"),
    _spec("ocr_with_region", "regions", "", "each written text with its quad"),
    _spec("answer", "text", "text", "an answer to the question in the prompt"),
    _spec("embed", "embedding", "", "an embedding of the image"),
)

TASKS: Mapping[str, TaskSpec] = MappingProxyType({spec.name: spec for spec in _ALL})
"""All tasks by common name, in the order of the documentation."""

_BY_ANY_NAME: dict[str, TaskSpec] = {
    name: spec for spec in _ALL for name in (spec.name, *spec.aliases)
}


def get_task(name: str) -> TaskSpec:
    """The task called `name`: a common name or an alias, in any case, with or without `<` and `>`.

    Raises `RequestError` (UNKNOWN_TASK) that names the nearest tasks.
    """
    known = ", ".join(TASKS)
    if not isinstance(name, str):
        raise RequestError(
            ErrorCode.UNKNOWN_TASK,
            f"task is of type {type(name).__name__}, expected a string",
            f"Use one of: {known}.",
        )
    key = ""
    if len(name) <= _MAX_NAME_CHARS:  # a long name is no task: don't search in it
        key = name.strip().strip("<>").strip().lower().replace("-", "_").replace(" ", "_")
        found = _BY_ANY_NAME.get(key)
        if found is not None:
            return found
    near = dict.fromkeys(
        _BY_ANY_NAME[match].name for match in difflib.get_close_matches(key, _BY_ANY_NAME, n=3)
    )
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise RequestError(
        ErrorCode.UNKNOWN_TASK,
        f"unknown task '{shortened(name, _MAX_NAME_CHARS)}'",
        f"{meant}Tasks are: {known}.",
    )
