"""How many CPU threads torch takes: all for much work at once, one for many small steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["is_light", "threads_for"]

#: Weights of a matrix up to which a second thread costs more than it brings, where it is multiplied
#: with a few rows alone (measured up to eight), and far more on a machine that has other work.
_LIGHT = 1 << 20


def is_light(step: Any) -> bool:
    """Whether one CPU thread computes a step (`LlamaStep`, `BartStep`) as fast as several."""
    return step.device.type == "cpu" and step.largest <= _LIGHT


@contextmanager
def threads_for(decoder: Any) -> Iterator[None]:
    """Torch computes in the calling thread alone meanwhile where the decoder's steps are light."""
    if not getattr(decoder, "light", False):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
