"""Prefill and decode steps of decoder-only models through transformers' own module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.models.cache.image_features import FrameEntry, ImageFeatures
from librobot_vlm_ros.models.cache.prefix import PrefixCache, joined_prefixes, prefix_of
from librobot_vlm_ros.models.generation.sampler import columns

__all__ = [
    "Asked",
    "CausalDecoder",
    "deep_inputs",
    "embed_row",
    "pad_places",
    "pad_rows",
    "read_behind",
    "weave",
]


def weave(
    ids: Sequence[int], counts: Sequence[int], image_token: int, begin_token: int | None
) -> list[int]:
    """Where each place of a row comes from: an index into `ids`, or -1 for a vector of an image.

    Images of `counts` vectors stand where `ids` has their token: once for all of them, once an
    image, or once a vector, those of an image in a row. Without one they stand at the front,
    behind the begin token. Raises RequestError BAD_PARAMETER.
    """
    total = sum(counts)
    places = [index for index, token in enumerate(ids) if token == image_token]
    if not places:
        front = 1 if total and ids and ids[0] == begin_token else 0
        return [*range(front), *[-1] * total, *range(front, len(ids))]
    if total and len(places) == 1:
        runs = {places[0]: total}
    elif total and len(places) == len(counts):
        runs = dict(zip(places, counts, strict=True))
    else:
        begins = [sum(counts[:image]) for image in range(len(counts))]
        blocks = [places[begin : begin + n] for begin, n in zip(begins, counts, strict=True)]
        torn = any(block and block[-1] - block[0] != len(block) - 1 for block in blocks)
        if len(places) != total or torn:
            sizes = " and ".join(map(str, counts)) or "no"
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"the prompt has {len(places)} image tokens, the image gives {sizes} vectors",
                "write one image token, as many in a row as there are vectors, or none",
            )
        runs = dict.fromkeys(places, 1)
    return [
        place
        for index in range(len(ids))
        for place in ([-1] * runs[index] if index in runs else [index])
    ]


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


def pad_places(rows: Sequence[Tensor], side: str) -> Tensor:
    """Numbers [T, A] of the places of each row as [A, B, T], padded with zeros at `side`."""
    padded: Tensor = pad_sequence(list(rows), batch_first=True, padding_side=side)
    return padded.permute(2, 0, 1)


def deep_inputs(
    orders: Sequence[Sequence[int]],
    seen: Sequence[ImageFeatures] | None,
    side: str,
    device: torch.device,
) -> dict[str, Any]:
    """What a language model is given that takes image features behind its first layers, too."""
    if not seen or not seen[0].deep:
        return {}
    holes = [torch.tensor([place < 0 for place in order], device=device) for order in orders]
    return {
        "visual_pos_masks": pad_sequence(holes, batch_first=True, padding_side=side),
        "deepstack_visual_embeds": [
            torch.cat(layer) for layer in zip(*(row.deep for row in seen), strict=True)
        ],
    }


class CausalDecoder:
    """A `Decoder` over prompts as rows of vectors [T, D], padded on the left.

    `first_place`: number of the first position. `prefix`: every place of a prompt sees all of it,
    and the model is told so by `token_type_ids`. `places`: numbers int64 [T, A] of a row's places
    on A axes; the answer goes on from the highest. `extra`: given to the model with the prompts.
    `past`: keys and values [rows, kv heads, P, D] by layer of what was read before the rows, which
    `places` leaves out. `then` is given the cache when the prompts have been read.
    """

    def __init__(
        self,
        language_model: Any,
        head: Any,
        rows: Sequence[Tensor],
        *,
        first_place: int = 0,
        prefix: bool = False,
        places: Sequence[Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
        past: Sequence[tuple[Tensor, Tensor]] = (),
        then: Callable[[Any], None] = lambda cache: None,
    ) -> None:
        from transformers import DynamicCache

        self._first_place = first_place
        self._prefix = prefix

        self._model = language_model
        self._head = head
        self._inputs, self.mask = pad_rows(rows, "left")
        #: Keys and values of what was taken in.
        self.cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            self.cache.update(keys, values, layer)
        if past:
            seen = self.mask.new_ones((len(rows), past[0][0].shape[2]))
            self.mask = torch.cat([seen, self.mask], dim=1)
        self._extra = dict(extra or {})
        self._then = then
        if places is None:
            # Padding takes place 0 too; nothing looks at it.
            self._places = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
            self._places = self._places[:, -self._inputs.shape[1] :]
            place = self.mask.sum(dim=1)
        else:
            self._places = pad_places(places, "left")
            place = self._places.amax(dim=(0, 2)) + 1
        #: int64 [rows], position of each row's next token; `mask` [rows, T] is of those before.
        self.place = place + first_place

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        logits: Tensor = self._head(self.read()[:, -1])
        return logits

    def read(self) -> Tensor:
        """Take in the prompts; gives their last states [rows, T, D]."""
        inputs, self._inputs = self._inputs, self._inputs[:, :0]
        extra, self._extra = self._extra, {}
        if self._prefix:
            extra["token_type_ids"] = torch.zeros_like(self.mask)
        hidden = self._step(inputs, self._places + self._first_place, **extra)
        self._then(self.cache)
        return hidden

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        return self.append(tokens[:, None], allowed)

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`."""
        if self._inputs.shape[1]:
            self.read()
        count = tokens.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), count))], dim=1)
        place = self.place[:, None] + torch.arange(count, device=self.place.device)
        self.place = self.place + count
        place = place.expand(*self._places.shape[:-2], -1, count)
        hidden = self._step(self._model.get_input_embeddings()(tokens), place)
        logits: Tensor = self._head(hidden[:, -1])
        return columns(logits, allowed)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask.index_select(0, rows)
        self.place = self.place.index_select(0, rows)

    def forget(self) -> None:
        """Let go of keys and values that were taken over."""
        self.cache = None

    def _step(self, inputs: Tensor, places: Tensor, **extra: Any) -> Tensor:
        output = self._model(
            inputs_embeds=inputs,
            attention_mask=self.mask,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True)
class Asked:
    """A batch of prompts about frames, one of each a row."""

    #: [T, D], and where each place comes from (see `causal_decoder.weave`).
    vectors: Sequence[Tensor]
    orders: Sequence[Sequence[int]]
    #: Token ids of the prompts.
    rows: Sequence[Sequence[int]]
    seen: Sequence[ImageFeatures]
    frames: Sequence[FrameEntry]
    #: Numbers of the places, int64 [T, A]; None counts 0, 1, 2 ...
    numbers: Sequence[Tensor] | None


def read_behind(
    prefixes: PrefixCache, asked: Asked, read: Callable[..., CausalDecoder]
) -> CausalDecoder:
    """A decoder over the prompts that reads each frame, with the words before it, at most once.

    `read` makes a decoder of rows of vectors. Where every row is new, all is read in one go and
    what was read of the frames is kept. Where frames are shared or known and as long as each other,
    what is not known of them is read first, and the questions in one go behind it.
    """
    vectors, orders = asked.vectors, asked.orders
    device = vectors[0].device
    ends = [1 + max(n for n, place in enumerate(order) if place < 0) for order in orders]
    words = [
        tuple(row[place] for place in order[:end] if place >= 0)
        for row, order, end in zip(asked.rows, orders, ends, strict=True)
    ]
    keys = [(id(frame), said) for frame, said in zip(asked.frames, words, strict=True)]
    alike = len(set(ends)) == 1 and all(len(row) > ends[0] for row in vectors)
    known = {
        key: prefix
        for key, frame, said in zip(keys, asked.frames, words, strict=True)
        if alike and (prefix := prefixes.get(frame, said)) is not None
    }
    new = [row for row, key in enumerate(keys) if keys.index(key) == row and key not in known]
    if not alike or len(new) == len(keys):

        def keep(cache: Any) -> None:
            longest = max(map(len, vectors))
            for row in new:
                begin = longest - len(vectors[row])
                prefix = prefix_of(cache, row, begin, ends[row])
                prefixes.put(asked.frames[row], words[row], prefix)

        deep = deep_inputs(orders, asked.seen, "left", device)
        return read(vectors, places=asked.numbers, extra=deep, then=keep)

    end, numbers = ends[0], asked.numbers
    if new:
        deep = deep_inputs(
            [orders[row][:end] for row in new], [asked.seen[row] for row in new], "left", device
        )
        places = None if numbers is None else [numbers[row][:end] for row in new]
        beginning = read([vectors[row][:end] for row in new], places=places, extra=deep)
        beginning.read()
        for place, row in enumerate(new):
            known[keys[row]] = prefix_of(beginning.cache, place, 0, end)
            prefixes.put(asked.frames[row], words[row], known[keys[row]])
    return read(
        [row[end:] for row in vectors],
        places=None if numbers is None else [row[end:] for row in numbers],
        past=joined_prefixes([known[key] for key in keys]),
    )
