"""Prompt templates: a family's sentence for a task, with the user's words or region in it."""

from __future__ import annotations

from collections.abc import Mapping

from librobot_vlm_ros.core import ErrorCode, RequestError


def question(tasks: Mapping[str, str], task: str, text: str, region: str = "") -> str:
    """The sentence of `tasks`, its `{text}` and `{region}` filled.

    `region`: as the family writes a box, "" for none. Raises RequestError EMPTY_PROMPT, BAD_REGION,
    or BAD_PARAMETER for text that nobody would read.
    """
    sentence = tasks[task]
    if "{text}" in sentence:
        if not text:
            raise RequestError(ErrorCode.EMPTY_PROMPT, f"{task} needs a text")
        return sentence.replace("{text}", text)
    if text:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"{task} takes no text, but got {text[:80]!r}",
            "leave the prompt empty, or use the task answer",
        )
    if "{region}" in sentence and not region:
        raise RequestError(
            ErrorCode.BAD_REGION, f"{task} needs a region: x_min, y_min, x_max, y_max"
        )
    return sentence.replace("{region}", region)
