"""Buffers of a decode step in a few sizes, and on CUDA a graph of the step over each of them.

On a CPU buffers are made for each answer, as large as it asks for. On CUDA they come in powers of
two and are kept, with the graph that was captured over them: replaying it costs one launch where
the step costs hundreds. Where a capture fails, its reason is logged once and the step runs as it
is.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

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
        self._kept: OrderedDict[tuple[int, ...], _Held] = OrderedDict()
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
        held = self._kept.pop(key, None)
        if held is None or held.owner() is not None:  # in use, perhaps by the owner itself
            held = _Held(self.step.buffers(*key))
            self._capture(held)
        held.owner = weakref.ref(owner)
        self._kept[key] = held
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        held.buffers.clear()
        held.buffers.held = held
        return held.buffers

    def run(self, buffers: Any, allowed: range | None = None) -> Tensor:
        """Logits [rows, V] after `buffers.tokens`, or of the tokens `allowed` alone."""
        held = getattr(buffers, "held", None)
        if held is None or held.graph is None:
            logits: Tensor = self.step(buffers, allowed)
            return logits
        held.graph.replay()
        whole: Tensor = held.logits
        return whole if allowed is None else whole[:, allowed.start : allowed.stop]

    def _capture(self, held: _Held) -> None:
        """A graph of one step; what it writes meanwhile is cleared after."""
        if self.refused:
            return
        try:
            # Libraries set themselves up in the first runs, which must not be part of the graph.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.step(held.buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                held.logits = self.step(held.buffers)
            held.graph = graph
        except Exception as problem:
            self.refused = f"{type(problem).__name__}: {problem}"
            _log.warning("decode steps run without a CUDA graph: %s", self.refused)


class _Held:
    """Buffers that are kept, their graph and what it writes its logits to."""

    def __init__(self, buffers: Any) -> None:
        self.buffers = buffers
        self.graph: Any = None
        self.logits: Any = None
        self.owner: Any = lambda: None
