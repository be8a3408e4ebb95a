"""Token ids to text: as a stream while they come, and as text with the place of every token.

`Decode` is any function from ids to text that keeps control tokens other than begin, end and pad
(location tokens are part of an answer). A word or a letter may be spread over several tokens, so
text is always taken from a decoded run, never glued together from single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["TextStream", "TokenSpans", "geometric_mean"]

Decode = Callable[[Sequence[int]], str]

#: What a decoder shows for a letter of which only some bytes have come.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Text of a growing answer. What was given out is never taken back."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Text before `_start` is final; from `_start` to `_read` it is known and given out, and
        # serves as the context in which the next tokens are decoded (spaces depend on it).
        self._start = 0
        self._read = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids add, "" while a letter is incomplete."""
        self._ids.extend(ids)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith(_INCOMPLETE) or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """The text that was held back for a letter of which the rest has not come."""
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return text[len(known) :]


class TokenSpans:
    """Decoded text of an answer, and the score of any stretch of it.

    `control_ids` are decoded one by one (each is a word of its own); the ids between two of them
    are decoded as one run.
    """

    def __init__(
        self,
        ids: Sequence[int],
        log_probs: Sequence[float],
        decode: Decode,
        control_ids: frozenset[int],
    ) -> None:
        self.text = ""
        self._log_probs = list(log_probs)
        #: (begin, end) of each token in `text`, in characters.
        self.spans: list[tuple[int, int]] = []
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token not in control_ids:
                run.append(token)
                continue
            self._add_run(run, decode)
            run = []
            if token is not None:
                self._add_run([token], decode)

    def _add_run(self, run: Sequence[int], decode: Decode) -> None:
        begin = len(self.text)
        place = 0
        for count in range(1, len(run) + 1):
            end = len(decode(run[:count]).rstrip(_INCOMPLETE))
            self.spans.append((begin + place, begin + max(place, end)))
            place = max(place, end)
        self.text += decode(run) if run else ""

    def score(self, stretches: Sequence[tuple[int, int]]) -> float:
        """Geometric mean of the probabilities of the tokens that meet the stretches of text.

        NaN when no token with a known probability does.
        """
        return geometric_mean(
            [
                value
                for (begin, end), value in zip(self.spans, self._log_probs, strict=True)
                if any(begin < last and end > first for first, last in stretches)
            ]
        )


def geometric_mean(log_probs: Sequence[float]) -> float:
    """exp of the mean; forced tokens (NaN) are left out; NaN when nothing is left."""
    known = [value for value in log_probs if not math.isnan(value)]
    return math.exp(sum(known) / len(known)) if known else math.nan
