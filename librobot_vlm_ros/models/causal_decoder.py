"""Images and words in one row of vectors, and a text model that continues it step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import ErrorCode, RequestError

__all__ = ["CausalDecoder", "embed_row", "pad_rows", "weave"]


def weave(ids: Sequence[int], count: int, image_token: int, begin_token: int | None) -> list[int]:
    """Where each place of a row comes from: an index into `ids`, or -1 for a vector of the image.

    An image of `count` vectors stands where `ids` has its token, once or `count` times in a row;
    without one, at the front behind the begin token. Raises RequestError BAD_PARAMETER.
    """
    places = [index for index, token in enumerate(ids) if token == image_token]
    if places:
        first, last = places[0], places[-1] + 1
    else:
        first = last = 1 if count and ids and ids[0] == begin_token else 0
    if places and (len(places) not in {1, count} or last - first != len(places) or not count):
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"the prompt has {len(places)} image tokens, the image gives {count} vectors",
            "write one image token, as many in a row as there are vectors, or none",
        )
    return [*range(first), *[-1] * count, *range(last, len(ids))]


def embed_row(
    table: Any, ids: Sequence[int], order: Sequence[int], features: Tensor | None
) -> Tensor:
    """Vectors [T, D] of a row that `weave` has put in `order`; `features` [count, D] fill it."""
    device = table.weight.device
    tokens = torch.tensor([ids[i] if i >= 0 else 0 for i in order], device=device)
    words: Tensor = table(tokens)
    if features is None:
        return words
    holes = torch.tensor([i < 0 for i in order], device=device)
    return words.masked_scatter(holes[:, None].expand_as(words), features.to(words.dtype))


def pad_rows(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [T, D] as [B, T, D] padded with zeros at `side`, and the mask int64 [B, T]."""
    ones = [torch.ones(row.shape[0], dtype=torch.int64, device=row.device) for row in rows]
    return (
        pad_sequence(list(rows), batch_first=True, padding_side=side),
        pad_sequence(ones, batch_first=True, padding_side=side),
    )


class CausalDecoder:
    """A `decode.Decoder` over prompts as rows of vectors [T, D], padded on the left.

    `first_place`: number of the first position. `prefix`: every place of a prompt sees all of it,
    and the model is told so by `token_type_ids`.
    """

    def __init__(
        self,
        language_model: Any,
        head: Any,
        rows: Sequence[Tensor],
        *,
        first_place: int = 0,
        prefix: bool = False,
    ) -> None:
        from transformers import DynamicCache

        self._first_place = first_place
        self._prefix = prefix

        self._model = language_model
        self._head = head
        self._inputs, self._mask = pad_rows(rows, "left")
        self._cache = DynamicCache()
        self._place = self._mask.sum(dim=1)

    def first(self) -> Tensor:
        """See `decode.Decoder`."""
        inputs, self._inputs = self._inputs, self._inputs[:, :0]
        # Padding takes place 0 too; nothing looks at it.
        types = {"token_type_ids": torch.zeros_like(self._mask)} if self._prefix else {}
        return self._step(inputs, (self._mask.cumsum(dim=1) - 1).clamp(min=0), **types)

    def next(self, tokens: Tensor) -> Tensor:
        """See `decode.Decoder`."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        place = self._place[:, None]
        self._place = self._place + 1
        return self._step(self._model.get_input_embeddings()(tokens[:, None]), place)

    def reorder(self, rows: Tensor) -> None:
        """See `decode.Decoder`."""
        self._cache.reorder_cache(rows)
        self._mask = self._mask.index_select(0, rows)
        self._place = self._place.index_select(0, rows)

    def _step(self, inputs: Tensor, places: Tensor, **types: Tensor) -> Tensor:
        output = self._model(
            inputs_embeds=inputs,
            attention_mask=self._mask,
            position_ids=places + self._first_place,
            past_key_values=self._cache,
            use_cache=True,
            **types,
        )
        logits: Tensor = self._head(output.last_hidden_state[:, -1])
        return logits
