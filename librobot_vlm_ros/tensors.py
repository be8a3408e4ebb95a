"""From an `Embedding` message to a NumPy array, without a copy and without ROS.

```python
from librobot_vlm_ros.tensors import EmbeddingSpace, to_array

def on_embedding(self, message):
    self.space = self.space or EmbeddingSpace.of(message)
    vector = to_array(message, self.space)  # raises when another model wrote it
```

Vectors of two models, or of two revisions of one, mean different things though their shapes may be
equal: an `EmbeddingSpace` refuses what is not of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core import ErrorCode, make_error

__all__ = ["EmbeddingSpace", "to_array"]

_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class EmbeddingSpace:
    """Whose vectors these are. Two are comparable exactly when they are equal."""

    model: str
    """Registered name of the model."""
    revision: str
    """Which weights."""
    pooling: str
    """How tokens became one vector; "none" is a vector per token."""
    dimension: int
    """Length D of a vector."""

    @classmethod
    def of(cls, message: Any) -> EmbeddingSpace:
        """The space that a message belongs to. Raises `VlmError` as `to_array` does."""
        array = to_array(message)
        return cls(message.info.model, message.info.revision, message.pooling, array.shape[-1])

    def check(self, message: Any) -> None:
        """Raises `VlmError` WRONG_TYPE when the message is of another space."""
        other = EmbeddingSpace(
            message.info.model,
            message.info.revision,
            message.pooling,
            message.shape[-1] if len(message.shape) else 0,
        )
        if other != self:
            raise make_error(
                ErrorCode.WRONG_TYPE,
                f"embedding of {other}, expected {self}",
                "Compare vectors of one model, revision and pooling only.",
            )

    def __str__(self) -> str:
        pooling = "per token" if self.pooling == "none" else f"{self.pooling} pooling"
        return f"{self.model} ({self.revision}), {pooling}, {self.dimension} values"


def to_array(message: Any, space: EmbeddingSpace | None = None) -> npt.NDArray[np.floating]:
    """The tensor of an `Embedding` message: float32 or float16, [D], or [T, D] per token.

    A read-only view of the message's own bytes, good as long as the message is. With `space`,
    another model's tensor is refused.

    Raises `VlmError`: the message's own error when it carries one, WRONG_TYPE for another space or
    an unknown dtype, SHAPE_MISMATCH when shape and number of bytes do not agree.
    """
    if message.error_code:
        raise make_error(message.error_code, message.error_msg)
    if space is not None:
        space.check(message)
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise make_error(
            ErrorCode.WRONG_TYPE,
            f"embedding of dtype '{message.dtype}', expected {' or '.join(_DTYPES)}",
        )
    shape = tuple(int(length) for length in message.shape)
    expected = math.prod(shape) * dtype.itemsize
    if not 1 <= len(shape) <= 2 or expected == 0 or len(message.data) != expected:
        raise make_error(
            ErrorCode.SHAPE_MISMATCH,
            f"embedding of shape {list(shape)} and dtype {message.dtype} has {len(message.data)} "
            f"bytes, expected {expected} and 1 or 2 dimensions",
        )
    array = np.frombuffer(message.data, dtype).reshape(shape)
    array.flags.writeable = False
    return array
