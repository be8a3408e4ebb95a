"""Pixels and vision features of the newest frames, shared by all tasks and questions about them.

A frame is recognised by being the same object, not by its number: numbers start again after a
restart, and an image that comes with a request has none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import Frame


@dataclass
class FrameEntry:
    """One frame; `pixels` and `features` are filled in by the model.

    Features belong to the model's thread alone; pixels may be prefetched by another.
    """

    frame: Frame
    pixels: Any = None
    features: ImageFeatures | None = None
    #: The dtype of the features that a request has asked for before.
    asked: Any = None
    #: Its pixels were begun before a request asked for them, and none has asked since.
    prefetched: bool = False
    _making: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def has_features(self, dtype: Any) -> bool:
        """Whether its features are there, and not those of a dtype that was given up since."""
        return self.features is not None and self.features.vectors.dtype == dtype

    def ready(self, make: Callable[[Any], Any]) -> Any:
        """The pixels, made from the frame's by whoever comes first; the other waits for them."""
        with self._making:
            if self.pixels is None:
                self.pixels = make(self.frame.pixels)
            return self.pixels

    def prepare(self, make: Callable[[Any], Any]) -> None:
        """`ready` before any request; nothing where there is something already."""
        with self._making:
            if self.features is None and self.pixels is None:
                self.prefetched = True  # from here on a request at least waits less long
                self.pixels = make(self.frame.pixels)


class FrameCache:
    """The `capacity` frames used last. Safe to use from several threads."""

    def __init__(self, capacity: int = 8) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, FrameEntry] = OrderedDict()
        self._lock = threading.Lock()
        #: Requests that share the features of their frame, and those that had them computed.
        self.hits = 0
        self.misses = 0
        #: Frames whose pixels had been prefetched when the first request came.
        self.prefetched = 0

    def entry(self, frame: Frame, dtype: Any) -> FrameEntry:
        """The frame's entry for a request that wants features in `dtype`; counts it."""
        entry = self.lookup(frame)
        if entry.asked == dtype:
            self.hits += 1
        else:
            self.misses += 1
        entry.asked = dtype
        self.prefetched += entry.prefetched
        entry.prefetched = False
        return entry

    def lookup(self, frame: Frame) -> FrameEntry:
        """The frame's entry, made where there is none; counts nothing."""
        with self._lock:
            # The entry keeps its frame alive, so no other object can come by the same id.
            entry = self._entries.setdefault(id(frame), FrameEntry(frame))
            self._entries.move_to_end(id(frame))
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
            return entry

    def clear(self) -> None:
        """Forget all frames, as when the weights change."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision side gives for one row of a batch: one image, or several views of it."""

    #: [N, D], the images one after the other.
    vectors: Tensor
    #: Vectors of each image, in order; their sum is N.
    counts: tuple[int, ...]
    #: What the family needs for the position_ids of each image, such as its grid.
    shapes: tuple[Any, ...] = ()
    #: [N, D] each: added to the image's positions behind the first layers of the language model.
    deep: tuple[Tensor, ...] = ()


def concat_features(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Several images as one row."""
    if len(parts) == 1:
        return parts[0]
    return ImageFeatures(
        torch.cat([part.vectors for part in parts]),
        tuple(count for part in parts for count in part.counts),
        tuple(shape for part in parts for shape in part.shapes),
        tuple(torch.cat(layer) for layer in zip(*(part.deep for part in parts), strict=True)),
    )


def pad_features(rows: Sequence[ImageFeatures]) -> Tensor:
    """[B, N, D], rows of fewer vectors padded with zeros at the end."""
    return pad_sequence([row.vectors for row in rows], batch_first=True)
