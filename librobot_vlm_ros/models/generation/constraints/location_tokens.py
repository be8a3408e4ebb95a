"""Boxes and outlines of models whose coordinates are tokens: which tokens may follow.

A location is one token, and the tokens of all locations stand in a row. Once a box has begun, only
locations can follow until it is whole, and its far corner does not lie before its near one: so
much less of the output layer has to be computed, and no box comes out that cannot be read. Only an
answer that is cut off by its length can still end inside a box. Well-formed answers are not
changed; what that takes of beams is in `beam_search`.
"""

from __future__ import annotations

from collections.abc import Sequence


class BoxConstraint:
    """Four locations in a row are a box: near corner, far corner, on the same axes in turn.

    `first`, `count`: the tokens of the locations. `size`: locations of a shape; `ordered`: whether
    the second corner must not lie before the first. `unless`: a token that marks another syntax.
    """

    def __init__(
        self,
        first: int,
        count: int,
        *,
        size: int = 4,
        ordered: bool = True,
        unless: int | None = None,
    ) -> None:
        self._locations = range(first, first + count)
        self._size, self._ordered, self._unless = size, ordered, unless

    def allowed(self, ids: Sequence[int]) -> range | None:
        """See `TokenConstraint`."""
        written = _run(ids, self._locations) % self._size
        if not written or (self._unless is not None and self._unless in ids):
            return None
        if self._ordered and written >= 2:
            return range(ids[-2], self._locations.stop)
        return self._locations


class PolygonConstraint:
    """Locations in a row are the corners of a polygon: an even number, three corners at least."""

    def __init__(self, first: int, count: int) -> None:
        self._locations = range(first, first + count)

    def allowed(self, ids: Sequence[int]) -> range | None:
        """See `TokenConstraint`."""
        written = _run(ids, self._locations)
        return self._locations if written % 2 or 0 < written < 6 else None


def _run(ids: Sequence[int], locations: range) -> int:
    """How many locations stand at the end of `ids`."""
    count = 0
    while count < len(ids) and ids[-1 - count] in locations:
        count += 1
    return count
