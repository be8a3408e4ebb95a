"""Buffers of a decode step in a few sizes, and on CUDA a graph of the step over each of them.

On a CPU buffers are made for each answer, as large as it asks for. On CUDA they come in powers of
two and are kept, with the graph that was captured over them: replaying it costs one launch where
the step costs hundreds. Where a capture fails, its reason is logged once and the step runs as it
is. (Written against torch 2.11's interface; it has not been run on a GPU yet.)
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.models.generation.sampler import columns
from librobot_vlm_ros.models.placement import is_light

__all__ = ["StepPool", "bucket"]

_log = logging.getLogger(__name__)

#: Sets of buffers that are kept on CUDA.
_KEPT = 4
#: Slots that a set of buffers has at least, on CUDA and elsewhere.
_CUDA_SLOTS, _SLOTS = 256, 64


def bucket(number: int, smallest: int) -> int:
    """The power of two times `smallest` that holds `number`."""
    size = smallest
    while size < number:
        size *= 2
    return size


class StepPool:
    """Buffers for a step (`LlamaStep`, `BartStep`) and the way to run it over them."""

    def __init__(self, step: Any) -> None:
        self.step = step
        self.cuda = step.device.type == "cuda"
        self.light = is_light(step)
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        #: Why the step is not run as a graph; "" while it is.
        self.refused = "" if self.cuda else "there is no CUDA device"

    def fits(self, step: Any) -> bool:
        """Whether graphs captured for this pool's step may be replayed in place of `step`."""
        return self.cuda and step.weights() == self.step.weights()

    def take(self, owner: Any, rows: int, capacity: int, prompts: int = 0, width: int = 0) -> Any:
        """Cleared buffers for at least that many rows and slots, `owner`'s alone while it lives.

        `prompts`, `width`: of an encoder's states; rows are padded only where there are none.
        """
        if not self.cuda:
            room = -(-(capacity + capacity // 4) // _SLOTS) * _SLOTS
            return self.step.buffers(rows, room, *([prompts, width] if prompts else []))
        rows = rows if prompts else bucket(rows, 1)
        far = (prompts, -(-width // _SLOTS) * _SLOTS) if prompts else ()
        key = (rows, bucket(capacity, _CUDA_SLOTS), *far)
        buffers = self._kept.pop(key, None)
        if buffers is None or buffers.owner() is not None:  # in use, perhaps by the owner itself
            buffers = self.step.buffers(*key)
            self._capture(buffers)
        buffers.owner = weakref.ref(owner)
        self._kept[key] = buffers
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        buffers.clear()
        return buffers

    def run(self, buffers: Any, allowed: range | Tensor | None = None) -> Tensor:
        """Logits [rows, V] after `buffers.tokens`, or of the tokens `allowed` alone."""
        if buffers.graph is None:
            logits: Tensor = self.step(buffers, allowed)
            return logits
        buffers.graph.replay()
        return columns(buffers.logits, allowed)

    def _capture(self, buffers: Any) -> None:
        """A graph of one step; what it writes meanwhile is cleared after."""
        if self.refused:
            return
        try:
            # Libraries set themselves up in the first runs, which must not be part of the graph.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.step(buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may bring the next frame to the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                buffers.logits = self.step(buffers)
            buffers.graph = graph
        except Exception as problem:
            self.refused = f"{type(problem).__name__}: {problem}"
            _log.warning("decode steps run without a CUDA graph: %s", self.refused)
