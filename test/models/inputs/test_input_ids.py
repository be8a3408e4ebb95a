"""Token ids from a caller are refused where a table has no row for them, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import ErrorCode, ImageError, RequestError
from librobot_vlm_ros.models import AbstractVLM
from librobot_vlm_ros.models.inputs.input_ids import token_rows

BAD: dict[str, Any] = {
    "beyond the vocabulary": torch.tensor([[20, 10**6]]),
    "negative": torch.tensor([[20, -3]]),
    "not a table": torch.tensor([20, 21]),
    "not integers": torch.tensor([[20.0, 21.0]]),
    "ragged": [[20, 21], [22]],
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_what_is_no_table_of_token_ids_is_refused(kind: str) -> None:
    with pytest.raises(RequestError, match="token ids") as caught:
        token_rows(BAD[kind], None, 100)
    assert caught.value.code == ErrorCode.BAD_PARAMETER


def test_rows_come_without_padding_and_with_what_else_is_allowed() -> None:
    ids, mask = torch.tensor([[0, 7, 8], [5, 6, -100]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert token_rows(ids, mask, 9, (-100,)) == [[7, 8], [5, 6, -100]]
    with pytest.raises(RequestError, match=r"attention_mask is \[1, 3\]"):
        token_rows(ids, mask[:1], 9)


def test_every_family_refuses_them(
    load_family: Callable[..., AbstractVLM], batch: dict[str, Any]
) -> None:
    vlm = load_family()
    images, ids = batch["images"], batch["input_ids"]
    far = ids.clone()
    far[1, 2] = 10**6
    for call in (
        lambda: vlm.generate(images, far, max_new_tokens=1),
        lambda: vlm(images=images, input_ids=far),
        lambda: vlm(images=images, input_ids=ids, labels=far),
        lambda: vlm.encode_text(far),
    ):
        with pytest.raises(RequestError, match="token ids hold 1000000") as caught:
            call()
        assert caught.value.code == ErrorCode.BAD_PARAMETER
    with pytest.raises(RequestError) as caught:
        vlm.generate(None, ids, attention_mask=torch.zeros_like(ids), max_new_tokens=1)
    assert caught.value.code == ErrorCode.EMPTY_PROMPT
    with pytest.raises(ImageError) as image:
        vlm.encode_image(torch.zeros(0, 3, 28, 28))
    assert image.value.code == ErrorCode.BAD_IMAGE
