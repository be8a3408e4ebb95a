"""A real decoder whose output layer leans towards an answer that was written beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["Scripted"]

#: More than any two logits differ by.
_LEAN = 1.0e4


class Scripted:
    """A `AppendingDecoder`: everything is computed by `decoder`, then token n of each row's
    script gains. Behind its end nothing does.
    """

    def __init__(self, decoder: Any, scripts: Sequence[Sequence[int]]) -> None:
        self._decoder, self._scripts = decoder, list(scripts)
        self._place = 0
        #: Calls of the model, and columns that its output layer computed in them.
        self.calls = self.columns = 0

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self._leant(self._decoder.prefill(), None)

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        self._place += 1
        return self._leant(self._decoder.decode(tokens, allowed), allowed)

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`."""
        self._place += tokens.shape[1]
        return self._leant(self._decoder.append(tokens, allowed), allowed)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        self._decoder.reorder(rows, within)
        self._scripts = [self._scripts[row] for row in rows.tolist()]

    def _leant(self, logits: Tensor, allowed: range | Tensor | None) -> Tensor:
        self.calls += 1
        self.columns += logits.shape[-1]
        for row, script in enumerate(self._scripts):
            if self._place >= len(script):
                continue
            token = script[self._place]
            if isinstance(allowed, Tensor):
                logits[row] += _LEAN * (allowed == token)
            elif allowed is None or token in allowed:
                logits[row, token - (0 if allowed is None else allowed.start)] += _LEAN
        return logits
