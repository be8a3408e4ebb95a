"""Decoder-only models: image vectors merged into the prompt, prefill and decode by transformers.

`fast/llama.py` takes over after the prefill where it can; this is the path that it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.models.cache.image_features import FrameEntry, ImageFeatures
from librobot_vlm_ros.models.cache.prefix import PrefixCache, copy_prefix, stack_prefixes
from librobot_vlm_ros.models.generation.sampler import columns


def merge_order(
    ids: Sequence[int], counts: Sequence[int], image_token: int, begin_token: int | None
) -> list[int]:
    """Source of each position of the merged prompt: an index into `ids`, or -1 for an image vector.

    Images of `counts` vectors stand where `ids` has their token: one token for all of them, one an
    image, or one a vector, those of an image side by side. Without such a token they stand at the
    front, behind the begin token. Raises RequestError BAD_PARAMETER.
    """
    total = sum(counts)
    found = [index for index, token in enumerate(ids) if token == image_token]
    if not found:
        front = 1 if total and ids and ids[0] == begin_token else 0
        return [*range(front), *[-1] * total, *range(front, len(ids))]
    if total and len(found) == 1:
        vectors = {found[0]: total}
    elif total and len(found) == len(counts):
        vectors = dict(zip(found, counts, strict=True))
    else:
        starts = [sum(counts[:image]) for image in range(len(counts))]
        blocks = [found[start : start + n] for start, n in zip(starts, counts, strict=True)]
        torn = any(block and block[-1] - block[0] != len(block) - 1 for block in blocks)
        if len(found) != total or torn:
            sizes = " and ".join(map(str, counts)) or "no"
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"the prompt has {len(found)} image tokens, the image gives {sizes} vectors",
                "write one image token, as many in a row as there are vectors, or none",
            )
        vectors = dict.fromkeys(found, 1)
    order: list[int] = []
    for index in range(len(ids)):
        order += [-1] * vectors[index] if index in vectors else [index]
    return order


def merge_embeddings(
    table: Any, ids: Sequence[int], order: Sequence[int], features: Tensor | None
) -> Tensor:
    """Input embeddings [T, D] of a prompt in its `merge_order`, with `features` [N, D] merged in.

    `table`: the model's token embedding.
    """
    device = table.weight.device
    tokens = torch.tensor([ids[i] if i >= 0 else 0 for i in order], device=device)
    embeddings: Tensor = table(tokens)
    if features is None:
        return embeddings
    image = torch.tensor([i < 0 for i in order], device=device)[:, None]
    return embeddings.masked_scatter(image.expand_as(embeddings), features.to(embeddings.dtype))


def pad_rows(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [T, D] as [B, T, D] padded with zeros at `side`, and the mask int64 [B, T]."""
    ones = [torch.ones(row.shape[0], dtype=torch.int64, device=row.device) for row in rows]
    return (
        pad_sequence(list(rows), batch_first=True, padding_side=side),
        pad_sequence(ones, batch_first=True, padding_side=side),
    )


def pad_position_ids(rows: Sequence[Tensor], side: str) -> Tensor:
    """position_ids [T, A] of each row, on A axes, as [A, B, T] padded with zeros at `side`."""
    padded: Tensor = pad_sequence(list(rows), batch_first=True, padding_side=side)
    return padded.permute(2, 0, 1)


def deepstack_inputs(
    orders: Sequence[Sequence[int]],
    images: Sequence[ImageFeatures] | None,
    side: str,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of a language model that adds image features behind its first layers, too."""
    if not images or not images[0].deep:
        return {}
    masks = [torch.tensor([source < 0 for source in order], device=device) for order in orders]
    return {
        "visual_pos_masks": pad_sequence(masks, batch_first=True, padding_side=side),
        "deepstack_visual_embeds": [
            torch.cat(layer) for layer in zip(*(row.deep for row in images), strict=True)
        ],
    }


class CausalDecoder:
    """A `Decoder` over prompts as input embeddings [T, D], padded on the left.

    `first_position`: the number that positions start with. `prefix_attention`: every position of a
    prompt sees all of it, and the model is told so by `token_type_ids`. `position_ids`: int64
    [T, A] of each row on A axes; the answer goes on from the highest. `extra`: further arguments
    of the model's prefill. `past`: keys and values [rows, kv heads, P, D] by layer of what stands
    before the rows, which `position_ids` leaves out. `on_prefill` is given the KV cache once the
    prompts are in it.
    """

    def __init__(
        self,
        language_model: Any,
        head: Any,
        rows: Sequence[Tensor],
        *,
        first_position: int = 0,
        prefix_attention: bool = False,
        position_ids: Sequence[Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
        past: Sequence[tuple[Tensor, Tensor]] = (),
        on_prefill: Callable[[Any], None] = lambda cache: None,
    ) -> None:
        from transformers import DynamicCache

        self._model, self._head = language_model, head
        self._inputs, self.mask = pad_rows(rows, "left")
        #: Keys and values so far.
        self.cache: Any = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            self.cache.update(keys, values, layer)
        if past:
            seen = self.mask.new_ones((len(rows), past[0][0].shape[2]))
            self.mask = torch.cat([seen, self.mask], dim=1)
        if position_ids is None:
            # Padding gets position 0, too; nothing attends to it.
            positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self._inputs.shape[1] :]
            following = self.mask.sum(dim=1)
        else:
            positions = pad_position_ids(position_ids, "left")
            following = positions.amax(dim=(0, 2)) + 1
        self._position_ids = positions + first_position
        #: int64 [rows], position of each row's next token; `mask` [rows, T] is of those before.
        self.next_position = following + first_position
        self._extra = dict(extra or {})
        if prefix_attention:
            self._extra["token_type_ids"] = torch.zeros_like(self.mask)
        self._on_prefill = on_prefill

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        logits: Tensor = self._head(self.prefill_hidden()[:, -1])
        return logits

    def prefill_hidden(self) -> Tensor:
        """Prefill the prompts; gives their last hidden states [rows, T, D]."""
        inputs, self._inputs = self._inputs, self._inputs[:, :0]
        extra, self._extra = self._extra, {}
        hidden = self._forward(inputs, self._position_ids, **extra)
        self._on_prefill(self.cache)
        return hidden

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        return self.append(tokens[:, None], allowed)

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`."""
        if self._inputs.shape[1]:
            self.prefill_hidden()
        count = tokens.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), count))], dim=1)
        steps = torch.arange(count, device=tokens.device)
        positions = self.next_position[:, None] + steps
        self.next_position = self.next_position + count
        # The same on every axis.
        positions = positions.expand(*self._position_ids.shape[:-2], -1, count)
        hidden = self._forward(self._model.get_input_embeddings()(tokens), positions)
        logits: Tensor = self._head(hidden[:, -1])
        return columns(logits, allowed)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask.index_select(0, rows)
        self.next_position = self.next_position.index_select(0, rows)

    def _forward(self, inputs: Tensor, position_ids: Tensor, **extra: Any) -> Tensor:
        output = self._model(
            inputs_embeds=inputs,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True)
class PromptBatch:
    """Prompts about frames, one of each a row."""

    #: Input embeddings [T, D], and the `merge_order` that they were made in.
    embeddings: Sequence[Tensor]
    orders: Sequence[Sequence[int]]
    ids: Sequence[Sequence[int]]
    images: Sequence[ImageFeatures]
    frames: Sequence[FrameEntry]
    #: int64 [T, A]; None counts 0, 1, 2 ...
    position_ids: Sequence[Tensor] | None


def prefix_prefill(
    prefixes: PrefixCache, batch: PromptBatch, make: Callable[..., CausalDecoder]
) -> CausalDecoder:
    """A decoder over the prompts that prefills each frame, with the words before it, at most once.

    `make` builds a decoder of rows of embeddings. Where every row's frame is new, everything is
    prefilled in one go and the frames' prefixes are kept. Where frames are shared or known, and
    their prefixes have one length, missing prefixes are prefilled first and all questions go
    behind them.
    """
    orders, device = batch.orders, batch.embeddings[0].device
    ends = [1 + max(at for at, source in enumerate(order) if source < 0) for order in orders]
    words = [
        tuple(ids[source] for source in order[:end] if source >= 0)
        for ids, order, end in zip(batch.ids, orders, ends, strict=True)
    ]
    keys = [(id(frame), before) for frame, before in zip(batch.frames, words, strict=True)]
    alike = len(set(ends)) == 1 and all(len(row) > ends[0] for row in batch.embeddings)
    known = {
        key: prefix
        for key, frame, before in zip(keys, batch.frames, words, strict=True)
        if alike and (prefix := prefixes.get(frame, before)) is not None
    }
    new = [row for row, key in enumerate(keys) if keys.index(key) == row and key not in known]

    if not alike or len(new) == len(keys):

        def keep(cache: Any) -> None:
            longest = max(map(len, batch.embeddings))
            for row in new:
                padding = longest - len(batch.embeddings[row])
                prefix = copy_prefix(cache, row, padding, ends[row])
                prefixes.put(batch.frames[row], words[row], prefix)

        deep = deepstack_inputs(orders, batch.images, "left", device)
        return make(batch.embeddings, position_ids=batch.position_ids, extra=deep, on_prefill=keep)

    end, position_ids = ends[0], batch.position_ids
    if new:
        images = [batch.images[row] for row in new]
        deep = deepstack_inputs([orders[row][:end] for row in new], images, "left", device)
        beginning = make(
            [batch.embeddings[row][:end] for row in new],
            position_ids=None if position_ids is None else [position_ids[row][:end] for row in new],
            extra=deep,
        )
        beginning.prefill_hidden()
        for place, row in enumerate(new):
            known[keys[row]] = copy_prefix(beginning.cache, place, 0, end)
            prefixes.put(batch.frames[row], words[row], known[keys[row]])
    return make(
        [row[end:] for row in batch.embeddings],
        position_ids=None if position_ids is None else [row[end:] for row in position_ids],
        past=stack_prefixes([known[key] for key in keys]),
    )
