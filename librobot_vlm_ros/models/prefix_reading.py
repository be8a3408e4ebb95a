"""Questions about frames, each frame read once: what was read of it before is gone on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from librobot_vlm_ros.models.causal_decoder import CausalDecoder, deep_inputs
from librobot_vlm_ros.models.causal_images import Seen
from librobot_vlm_ros.models.frame_cache import FrameEntry
from librobot_vlm_ros.models.prefix_cache import PrefixCache, joined_prefixes, prefix_of

__all__ = ["Asked", "read_behind"]


@dataclass(frozen=True)
class Asked:
    """A batch of prompts about frames, one of each a row."""

    #: [T, D], and where each place comes from (see `causal_decoder.weave`).
    vectors: Sequence[Tensor]
    orders: Sequence[Sequence[int]]
    #: Token ids of the prompts.
    rows: Sequence[Sequence[int]]
    seen: Sequence[Seen]
    frames: Sequence[FrameEntry]
    #: Numbers of the places, int64 [T, A]; None counts 0, 1, 2 ...
    numbers: Sequence[Tensor] | None


def read_behind(
    prefixes: PrefixCache, asked: Asked, read: Callable[..., CausalDecoder]
) -> CausalDecoder:
    """A decoder over the prompts that reads each frame, with the words before it, at most once.

    `read` makes a decoder of rows of vectors. Where every row is new, all is read in one go and
    what was read of the frames is kept. Where frames are shared or known and as long as each other,
    what is not known of them is read first, and the questions in one go behind it.
    """
    vectors, orders = asked.vectors, asked.orders
    device = vectors[0].device
    ends = [1 + max(n for n, place in enumerate(order) if place < 0) for order in orders]
    words = [
        tuple(row[place] for place in order[:end] if place >= 0)
        for row, order, end in zip(asked.rows, orders, ends, strict=True)
    ]
    keys = [(id(frame), said) for frame, said in zip(asked.frames, words, strict=True)]
    alike = len(set(ends)) == 1 and all(len(row) > ends[0] for row in vectors)
    known = {
        key: prefix
        for key, frame, said in zip(keys, asked.frames, words, strict=True)
        if alike and (prefix := prefixes.get(frame, said)) is not None
    }
    new = [row for row, key in enumerate(keys) if keys.index(key) == row and key not in known]
    if not alike or len(new) == len(keys):

        def keep(cache: Any) -> None:
            longest = max(map(len, vectors))
            for row in new:
                begin = longest - len(vectors[row])
                prefix = prefix_of(cache, row, begin, ends[row])
                prefixes.put(asked.frames[row], words[row], prefix)

        deep = deep_inputs(orders, asked.seen, "left", device)
        return read(vectors, places=asked.numbers, extra=deep, then=keep)

    end, numbers = ends[0], asked.numbers
    if new:
        deep = deep_inputs(
            [orders[row][:end] for row in new], [asked.seen[row] for row in new], "left", device
        )
        places = None if numbers is None else [numbers[row][:end] for row in new]
        beginning = read([vectors[row][:end] for row in new], places=places, extra=deep)
        beginning.read()
        for place, row in enumerate(new):
            known[keys[row]] = prefix_of(beginning.cache, place, 0, end)
            prefixes.put(asked.frames[row], words[row], known[keys[row]])
    return read(
        [row[end:] for row in vectors],
        places=None if numbers is None else [row[end:] for row in numbers],
        past=joined_prefixes([known[key] for key in keys]),
    )
