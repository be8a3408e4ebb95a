"""A family's sentence for a task, with the user's words in it."""

from __future__ import annotations

from collections.abc import Mapping

from librobot_vlm_ros.core import ErrorCode, RequestError

__all__ = ["question"]


def question(tasks: Mapping[str, str], task: str, text: str) -> str:
    """The sentence of `tasks`, `{text}` in it filled with `text`.

    Raises RequestError EMPTY_PROMPT or BAD_PARAMETER.
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
    return sentence
