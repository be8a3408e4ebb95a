"""What is known of the newest frames: pixels ready for the model, and its vision features.

Several tasks and questions about one frame share them. A frame is recognised by being the same
object, not by its number: numbers start again after a restart, and an image that comes with a
request has none.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from librobot_vlm_ros.core import Frame

__all__ = ["FrameCache", "FrameEntry"]


@dataclass
class FrameEntry:
    """One frame; `pixels` and `features` are filled in by the model."""

    frame: Frame
    pixels: Any = None
    features: Any = None
    #: Of families whose images differ in size: the features with what belongs to them.
    seen: Any = None

    def has_features(self, dtype: Any) -> bool:
        """Whether its features are there, and not those of a dtype that was given up since."""
        return self.features is not None and self.features.dtype == dtype


class FrameCache:
    """The `capacity` frames used last. The model's thread is its only user."""

    def __init__(self, capacity: int = 8) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, FrameEntry] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def entry(self, frame: Frame) -> FrameEntry:
        """The frame's entry, a new one when it is not held."""
        # The entry keeps its frame alive, so no other object can come by the same id.
        found = self._entries.pop(id(frame), None)
        if found is None:
            found = FrameEntry(frame)
        self.hits += found.features is not None
        self.misses += found.features is None
        self._entries[id(frame)] = found
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forget all frames, as when the weights change."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
