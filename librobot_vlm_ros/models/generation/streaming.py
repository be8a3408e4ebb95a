"""Token ids to text: as a stream while they come, and as text with the place of every token.

`Decode` is any function from ids to text that keeps control tokens other than begin, end and pad
(location tokens are part of an answer). A word or a letter may be spread over several tokens, so
text is always taken from a decoded run, never glued together from single tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def token_spans(
    ids: Sequence[int], decode: Decode, control_ids: frozenset[int]
) -> tuple[str, list[tuple[int, int]]]:
    """Decoded text of an answer, and (begin, end) of each token in it, in characters.

    `control_ids` are decoded one by one (each is a word of its own); the ids between two of them
    are decoded as one run.
    """
    text, spans = "", []
    run: list[int] = []

    def add(ids: Sequence[int]) -> None:
        nonlocal text
        begin = place = 0
        for count in range(1, len(ids) + 1):
            end = len(decode(ids[:count]).rstrip(_INCOMPLETE))
            begin, place = place, max(place, end)
            spans.append((len(text) + begin, len(text) + place))
        text += decode(ids) if ids else ""

    for token in ids:
        if token not in control_ids:
            run.append(token)
            continue
        add(run)
        run = []
        add([token])
    add(run)
    return text, spans
