"""Keys and values of what stands before a question: the system's words and the frame.

In a model that reads in order they are the same for every question about a frame. They are kept
with the frame's entry and go with it; a question that comes later reads its own words only.
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

__all__ = ["Prefix", "PrefixCache", "joined_prefixes", "prefix_of"]

#: Keys and values by layer, each [kv heads, P, D].
Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """A beginning of P places that has been read."""

    layers: Layers
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for layer in self.layers for part in layer)


def prefix_of(cache: Any, row: int, begin: int, length: int) -> Prefix:
    """`length` places of a row of transformers' cache, from place `begin` on, copied."""
    layers = tuple(
        (
            layer.keys[row, :, begin : begin + length].clone(),
            layer.values[row, :, begin : begin + length].clone(),
        )
        for layer in cache.layers
    )
    return Prefix(layers, length)


def joined_prefixes(rows: Sequence[Prefix]) -> tuple[tuple[Tensor, Tensor], ...]:
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
        self._held: OrderedDict[tuple[int, tuple[int, ...]], tuple[Any, Any, Prefix]] = (
            OrderedDict()
        )
        self.hits = 0

    def get(self, frame: FrameEntry, words: tuple[int, ...]) -> Prefix | None:
        """What was read of these words and this frame's features, as they are now."""
        key = id(frame), words
        entry, features, prefix = self._held.get(key, (lambda: None, None, None))
        if prefix is None or entry() is not frame or features() is not frame.features:
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
