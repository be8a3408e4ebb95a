"""tokenizer.json as the library `tokenizers` reads it, with its panics as errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError

__all__ = ["read_fast", "unbroken"]


def read_fast(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file. Raises ModelError TOKENIZER_MISMATCH.

    What the file says of padding and truncation is how somebody once trained: transformers does not
    follow it either, and prompts here are neither filled up nor cut off.
    """
    from tokenizers import Tokenizer

    try:
        backend = unbroken(Tokenizer.from_file, str(path))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH, f"{path.name} cannot be read: {error}"
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def unbroken(call: Callable[..., Any], *words: Any, **options: Any) -> Any:
    """`call(...)` of the library. Raises ModelError TOKENIZER_MISMATCH where it panics, which is no
    `Exception` and would end the thread.
    """
    try:
        return call(*words, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"tokenizer.json makes the library tokenizers break off: {error}",
            "use the tokenizer that came with the weights",
        ) from None
