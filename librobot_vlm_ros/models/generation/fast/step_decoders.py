"""Decoders on the functional steps: buffers filled, grown and reordered, the step run over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.models.generation.causal_decoder import CausalDecoder
from librobot_vlm_ros.models.generation.fast.graph_runner import StepPool

__all__ = ["BartStepDecoder", "CausalStepDecoder"]


class _StepDecoder:
    """What both decoders share. `_rows`: rows in use, at most those of the buffers."""

    _pool: StepPool
    _buffers: Any = None
    _rows: int
    #: Tokens in the cache, and how many of them stand for every row of a prompt alike.
    _length: int
    _common: int
    #: Which prompt each row belongs to.
    _prompt: Tensor

    @property
    def light(self) -> bool:
        """See `threads.threads_for`."""
        return self._pool.light

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        buffers = self._ready()
        buffers.tokens[: self._rows].copy_(tokens)
        logits = self._pool.run(buffers, allowed)
        self._length += 1
        return logits[: self._rows]

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`. The steps are of one token; the output layer is left out
        for all but the last.
        """
        self._begin()
        for known in tokens[:, :-1].unbind(dim=1):
            self.decode(known, range(0))
        return self.decode(tokens[:, -1], allowed)

    def _begin(self) -> None:
        """Take in the prompts, unless that has been done."""
        raise NotImplementedError

    def _ready(self) -> Any:
        """Buffers with room for one token more."""
        raise NotImplementedError

    def _reorder_within(self, rows: Tensor, within: bool) -> bool:
        """Move what was written among the rows of each prompt; False when rows change prompts."""
        if not within and not torch.equal(self._prompt[rows], self._prompt):
            return False
        # What a prompt's rows have in common need not be moved.
        kv = self._buffers.kv[..., self._common : self._length, :]
        kv[:, :, : self._rows].copy_(kv.index_select(2, rows))
        return True


class CausalStepDecoder(_StepDecoder):
    """A `Decoder` that reads the prompts through `prompts` and writes with a `LlamaStep`."""

    def __init__(self, pool: StepPool, prompts: CausalDecoder) -> None:
        self._pool = pool
        self._prompts = prompts
        self._length = 0

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        logits = self._prompts.prefill()
        self._take_over()
        return logits

    def _begin(self) -> None:
        if self._length == 0:
            self._prompts.read()
            self._take_over()

    def _take_over(self) -> None:
        mask = self._prompts.mask
        self._rows, self._length = mask.shape
        self._common = self._length
        self._prompt = torch.arange(self._rows, device=mask.device)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        if self._buffers is None:
            self._prompt = self._prompt[rows]
            self._load(rows)
            return
        if len(rows) == self._rows and self._reorder_within(rows, within):
            return
        old, step = self._buffers, self._pool.step
        count, length = len(rows), self._length
        fresh = self._pool.take(self, count, length + 1)
        kept = old.kv[..., :length, :].index_select(2, rows)
        fresh.kv[:, :, :count, :, :length].copy_(kept)
        fresh.mask[:count, ..., :length].copy_(old.mask[..., :length].index_select(0, rows))
        self._place = self._place[rows]
        step.place(fresh, _padded(self._place, fresh.rows), self._common)
        fresh.slot.fill_(length)
        self._prompt, self._rows, self._buffers = self._prompt[rows], count, fresh

    def _ready(self) -> Any:
        if self._buffers is None:
            self._load(None)
        elif self._length == self._buffers.capacity:
            old = self._buffers
            fresh = self._pool.take(self, self._rows, self._length + 1)
            fresh.kv[:, :, : self._rows, :, : self._length].copy_(old.kv[:, :, : self._rows])
            fresh.mask[: self._rows, ..., : self._length].copy_(old.mask[: self._rows])
            self._pool.step.place(fresh, _padded(self._place, fresh.rows), self._common)
            fresh.slot.fill_(self._length)
            self._buffers = fresh
        return self._buffers

    def _load(self, rows: Tensor | None) -> None:
        """The prompts' keys and values into buffers, those of rows[r] into row r."""
        prompts = self._prompts
        self._place = prompts.place if rows is None else prompts.place[rows]
        mask = prompts.mask if rows is None else prompts.mask[rows]
        self._rows = mask.shape[0]
        buffers = self._pool.take(self, self._rows, self._length + 1)
        for layer, kept in enumerate(prompts.cache.layers):
            for which, part in enumerate((kept.keys, kept.values)):
                part = part if rows is None else part.index_select(0, rows)
                buffers.kv[layer, which, : self._rows, :, : self._length].copy_(part)
        buffers.mask[: self._rows, 0, 0, : self._length].masked_fill_(mask != 0, 0.0)
        self._pool.step.place(buffers, _padded(self._place, buffers.rows), self._length)
        buffers.slot.fill_(self._length)
        self._buffers = buffers
        prompts.forget()


class BartStepDecoder(_StepDecoder):
    """A `Decoder` over encoder states `hidden` [B, T, D], `mask` [B, T] or None."""

    def __init__(
        self, pool: StepPool, hidden: Tensor, mask: Tensor | None, start_token: int
    ) -> None:
        self._pool = pool
        self._states: tuple[Tensor, Tensor | None] | None = (hidden, mask)
        #: Prompts whose encoder states the buffers hold, and the places of each.
        self._prompts, self._width = hidden.shape[:2]
        self._start = start_token
        self._rows = hidden.shape[0]
        self._length = self._common = 0
        self._prompt = torch.arange(self._rows, device=hidden.device)

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self.decode(torch.full_like(self._prompt, self._start))

    def _begin(self) -> None:
        if self._length == 0:
            self.decode(torch.full_like(self._prompt, self._start), range(0))

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        if len(rows) == self._rows and self._reorder_within(rows, within):
            return
        prompt, seen = self._prompt[rows], None
        # Several rows of each prompt, side by side and as many of each, share its encoder states.
        each = torch.arange(self._prompts, device=prompt.device)
        each = each.repeat_interleave(len(rows) // self._prompts)
        if len(each) != len(rows) or not torch.equal(each, prompt):
            seen, prompt = prompt, torch.arange(len(rows), device=prompt.device)
        self._move(len(rows), rows, self._length + 1, seen)
        self._prompt = prompt

    def _ready(self) -> Any:
        if self._buffers is None or self._length == self._buffers.capacity:
            self._move(self._rows, None, self._length + 1)
        return self._buffers

    def _move(
        self, count: int, rows: Tensor | None, capacity: int, seen: Tensor | None = None
    ) -> None:
        """To fresh buffers, what was written by rows[r] into row r.

        `seen`: the encoder states that prompt p is to have are now those of prompt seen[p].
        """
        old, length = self._buffers, self._length
        self._prompts = self._prompts if seen is None else len(seen)
        fresh = self._pool.take(self, count, capacity, self._prompts, self._width)
        if self._states is not None:
            self._pool.step.look(fresh, *self._states)
            self._states = None
        else:
            kv = old.kv[..., :length, :]
            kv = kv[:, :, : self._rows] if rows is None else kv.index_select(2, rows)
            fresh.kv[:, :, :count, :, :length].copy_(kv)
            fresh.mask[:count, ..., :length] = 0.0
            fresh.look_as(old, seen)
        fresh.slot.fill_(length)
        self._buffers, self._rows = fresh, count


def _padded(numbers: Tensor, rows: int) -> Tensor:
    """int64 [n] with zeros up to `rows`."""
    return functional.pad(numbers, (0, rows - len(numbers)))
