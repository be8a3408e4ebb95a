"""What a grammar lets a row choose from, on the device where the choice is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from librobot_vlm_ros.models.decode_rules import Except, Some

__all__ = ["Choices", "columns"]


class Choices:
    """Applies them to probabilities. Nothing as wide as the vocabulary is made on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def index(self, tokens: tuple[int, ...]) -> Tensor:
        """The tokens int64 [n] on the device; states of a notation come again and again."""
        if tokens not in self._indices:
            self._indices[tokens] = torch.tensor(tokens, device=self._device)
        return self._indices[tokens]

    def bar(self, logits: Tensor, allowed: Sequence[Some]) -> None:
        """Set logits [rows, V] of the tokens to -inf that a row is barred from one by one."""
        for line, some in zip(logits, allowed, strict=True):
            if isinstance(some, Except):
                line.index_fill_(0, self.index(some.tokens), -math.inf)

    def restrict(self, raw: Tensor, allowed: Sequence[Some]) -> Tensor:
        """Log-probabilities [rows, V] among what each row may choose from, other tokens at -inf;
        overwrites `raw`, which is of logits that went through `bar`.
        """
        for line, some in zip(raw, allowed, strict=True):
            if some is None or isinstance(some, Except):
                continue
            among = torch.log_softmax(columns(line, self.reach(some)), dim=0)
            line.fill_(-math.inf)
            if isinstance(some, range):
                line[some.start : some.stop] = among
            else:
                line.index_copy_(0, self.index(some), among)
        return raw

    def reach(self, some: range | tuple[int, ...]) -> range | Tensor:
        """The same as what logits can be asked for."""
        return some if isinstance(some, range) else self.index(some)


def columns(logits: Tensor, only: range | Tensor | None) -> Tensor:
    """Of logits [..., V] those of these tokens, [..., n]."""
    if only is None:
        return logits
    if isinstance(only, range):
        return logits[..., only.start : only.stop]
    return logits.index_select(-1, only)
