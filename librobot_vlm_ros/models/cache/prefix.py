"""Keys and values of what stands before a question: the system's words and the frame.

In a decoder-only model they are the same for every question about a frame. They are kept with the
frame's entry and go with it; the prefill of a later question is then its own words only.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.models.cache.image_features import FrameEntry


@dataclass(frozen=True)
class Prefix:
    """Keys and values by layer, each [kv heads, P, D], of the first P positions of a prompt."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for layer in self.layers for part in layer)


def copy_prefix(cache: Any, row: int, start: int, length: int) -> Prefix:
    """`length` positions of a row of transformers' cache, from `start` on, copied."""
    return Prefix(
        tuple(
            (
                layer.keys[row, :, start : start + length].clone(),
                layer.values[row, :, start : start + length].clone(),
            )
            for layer in cache.layers
        )
    )


def stack_prefixes(rows: Sequence[Prefix]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Prefixes of one length as a batch: keys and values [rows, kv heads, P, D] by layer."""
    if all(row is rows[0] for row in rows):
        return tuple(
            (keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1))
            for keys, values in rows[0].layers
        )
    return tuple(
        (torch.stack([k for k, _ in layer]), torch.stack([v for _, v in layer]))
        for layer in zip(*(row.layers for row in rows), strict=True)
    )


class PrefixCache:
    """The prefixes used last, `limit_bytes` of them together at most."""

    def __init__(self, limit_bytes: int = 512 * 2**20) -> None:
        self._limit = limit_bytes
        #: By id of the frame's entry and token ids: weak references to the entry and to the
        #: features that were read, and what was read.
        self._held: OrderedDict[tuple[int, tuple[int, ...]], tuple[Any, Any, Prefix]]
        self._held = OrderedDict()
        self.hits = 0

    def get(self, frame: FrameEntry, words: tuple[int, ...]) -> Prefix | None:
        """What was read of these words and this frame's features, as they are now."""
        key = id(frame), words
        if key not in self._held:
            return None
        entry, features, prefix = self._held[key]
        if entry() is not frame or features() is not frame.features:
            return None
        self._held.move_to_end(key)
        self.hits += 1
        return prefix

    def put(self, frame: FrameEntry, words: tuple[int, ...], prefix: Prefix) -> None:
        """Keep it while the frame's entry lives; the oldest go where it gets too much."""
        key = id(frame), words
        held = self._held
        entry = weakref.ref(frame, lambda _: held.pop(key, None))
        held[key] = entry, weakref.ref(frame.features), prefix
        held.move_to_end(key)
        while sum(kept.nbytes for _, _, kept in held.values()) > self._limit:
            held.popitem(last=False)

    def __len__(self) -> int:
        return len(self._held)
