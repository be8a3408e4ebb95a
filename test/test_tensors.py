"""Embeddings as arrays: no copy, and never two models mixed. No ROS needed."""

from __future__ import annotations

import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from librobot_vlm_ros.core import ErrorCode, VlmError
from librobot_vlm_ros.tensors import EmbeddingSpace, to_array


def message(values: np.ndarray, **fields: Any) -> Any:
    info = SimpleNamespace(model="florence-2-base", revision="abc")
    made = {
        "info": info,
        "pooling": "mean" if values.ndim == 1 else "none",
        "dtype": values.dtype.name,
        "shape": list(values.shape),
        "data": array.array("B", values.tobytes()),
        "error_code": 0,
        "error_msg": "",
    }
    return SimpleNamespace(**{**made, **fields})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_the_array_is_a_view_of_the_message(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    made = message(values)
    result = to_array(made)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, values)
    assert np.shares_memory(result, np.frombuffer(made.data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        result[0] = 1


def code_of(made: Any, space: EmbeddingSpace | None = None) -> ErrorCode:
    with pytest.raises(VlmError) as caught:
        to_array(made, space)
    return caught.value.code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"dtype": "float64"}, ErrorCode.WRONG_TYPE),
        ({"dtype": ""}, ErrorCode.WRONG_TYPE),
        ({"shape": [9]}, ErrorCode.SHAPE_MISMATCH),
        ({"shape": []}, ErrorCode.SHAPE_MISMATCH),
        ({"shape": [0]}, ErrorCode.SHAPE_MISMATCH),
        ({"shape": [2, 2, 2]}, ErrorCode.SHAPE_MISMATCH),
        ({"data": array.array("B", b"123")}, ErrorCode.SHAPE_MISMATCH),
        ({"error_code": 402, "error_msg": "NaN"}, ErrorCode.NAN_LOGITS),
    ],
)
def test_a_message_that_is_no_tensor_is_refused(fields: dict[str, Any], code: ErrorCode) -> None:
    assert code_of(message(np.zeros(8, np.float32), **fields)) == code


def test_another_models_embedding_is_refused() -> None:
    space = EmbeddingSpace.of(message(np.zeros(8, np.float32)))
    assert to_array(message(np.ones(8, np.float32)), space).shape == (8,)
    other = SimpleNamespace(model="florence-2-large", revision="abc")
    newer = SimpleNamespace(model="florence-2-base", revision="abd")
    for made in (
        message(np.zeros(8, np.float32), info=other),
        message(np.zeros(8, np.float32), info=newer),
        message(np.zeros(9, np.float32)),
        message(np.zeros((1, 8), np.float32)),
    ):
        assert code_of(made, space) == ErrorCode.WRONG_TYPE
