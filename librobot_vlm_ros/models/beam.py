"""Beam search with the meaning that transformers gives to it (same answers, tested).

Every prompt keeps `num_beams` open hypotheses and the best `num_beams` finished ones. What all of
them agree on can no longer change: that common beginning is what a listener is told of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from librobot_vlm_ros.core import VlmError
from librobot_vlm_ros.models.choosing import (
    apply_rules,
    near,
    not_finite,
    suppressed,
    token_log_probs,
)
from librobot_vlm_ros.models.decode import (
    Decoder,
    DecodeRules,
    Generated,
    Scale,
    StopRow,
    TellIds,
)

__all__ = ["beam_search"]

_WORST = -1.0e9


@dataclass
class _Beams:
    """Hypotheses of all prompts. Shapes [B, n, ...]; unwritten places hold the pad token."""

    tokens: Tensor
    #: Log-probability of each token; marks on a scale as `near` counts them.
    log_probs: Tensor
    scores: Tensor

    def pick(self, index: Tensor) -> _Beams:
        """The hypotheses at `index`, int64 [B, m]."""
        wide = index[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return _Beams(
            self.tokens.gather(1, wide),
            self.log_probs.gather(1, wide),
            self.scores.gather(1, index),
        )

    def merge(self, other: _Beams) -> _Beams:
        return _Beams(
            torch.cat([self.tokens, other.tokens], 1),
            torch.cat([self.log_probs, other.log_probs], 1),
            torch.cat([self.scores, other.scores], 1),
        )


def beam_search(
    decoder: Decoder,
    rules: DecodeRules,
    history: Tensor,
    *,
    stop: StopRow,
    tell: TellIds | None,
) -> list[Generated | VlmError]:
    """See `decode.decode`; `history` is int64 [B, H]."""
    batch, beams, device = history.shape[0], rules.num_beams, history.device
    keep = max(2, 1 + len(rules.eos)) * beams
    eos = torch.tensor(rules.eos, device=device)
    offset = torch.arange(batch, device=device)[:, None] * beams
    top = torch.arange(keep, device=device)[None, :] < beams

    running = _empty(batch, beams, rules, device)
    running.scores[:, 0] = 0.0  # all beams start equal: only the first one may branch
    finished = _empty(batch, beams, rules, device)
    is_finished = torch.zeros((batch, beams), dtype=torch.bool, device=device)
    can_improve = torch.ones((batch, 1), dtype=torch.bool, device=device)

    unused = suppressed(rules, device)
    errors: dict[int, VlmError] = {}
    listener = _Listener(tell, batch)
    logits = decoder.first().repeat_interleave(beams, dim=0)
    parents = torch.arange(batch, device=device).repeat_interleave(beams)
    past = history.repeat_interleave(beams, dim=0)
    closed: set[int] = set()
    for step in range(rules.max_new_tokens):
        for row in range(batch):
            if row not in closed and (error := stop(row)) is not None:
                errors[row] = error
                closed.add(row)
        if len(closed) == batch:
            break
        open_beams = [
            row * beams + b for row in range(batch) if row not in closed for b in range(beams)
        ]
        raw = token_log_probs(logits, unused)
        # One NaN makes the whole row NaN.
        if not torch.isfinite(raw[open_beams].amax(dim=1)).all():
            raise not_finite()
        written = torch.cat([past, running.tokens[:, :, :step].flatten(0, 1)], dim=1)
        scores = apply_rules(raw, written, rules, step)
        vocabulary = scores.shape[-1]
        total = scores.view(batch, beams, vocabulary) + running.scores[:, :, None]
        best, place = total.flatten(1).topk(keep, dim=1)
        parent, token = place // vocabulary, place % vocabulary

        grown = running.pick(parent)
        grown.scores = best
        grown.tokens[:, :, step] = token
        if rules.forced(step) is None:
            chosen = raw.view(batch, -1).gather(1, place)
            if rules.scale is not None:
                chosen = _credited(chosen, raw[(parent + offset).flatten()], token, rules.scale)
        else:
            chosen = torch.full_like(best, math.nan)
        grown.log_probs[:, :, step] = chosen

        ended = torch.isin(token, eos) | (step == rules.max_new_tokens - 1)
        next_index = (best + ended * _WORST).topk(beams, dim=1).indices
        full = is_finished.all(dim=1, keepdim=True) & rules.early_stopping
        may_finish = ended & top
        # A hypothesis that is not finished, or comes when nothing can be gained, ranks last.
        barred = full.float() + (~can_improve).float() + (~may_finish).float()
        value = best / (step + 1) ** rules.length_penalty + barred * _WORST
        merged = finished.merge(_Beams(grown.tokens, grown.log_probs, value))
        order = merged.scores.topk(beams, dim=1).indices
        finished = merged.pick(order)
        is_finished = torch.cat([is_finished, may_finish], dim=1).gather(1, order)

        grown.scores = best + ended * _WORST
        running = grown.pick(next_index)
        hypothetical = running.scores[:, :1] / (step + 1) ** rules.length_penalty
        worst = torch.where(is_finished, finished.scores.amin(dim=1, keepdim=True), _WORST)
        can_improve = can_improve & (hypothetical > worst).any(dim=-1, keepdim=True)
        exhausted = ended.all(dim=1) if step == rules.max_new_tokens - 1 else ~can_improve[:, 0]
        done = exhausted | (is_finished.all(dim=1) & rules.early_stopping)
        for row in done.nonzero()[:, 0].tolist():
            closed.add(row)
        listener.hear(step + 1, running, finished, is_finished, closed)
        if len(closed) == batch:
            break
        from_beam = (parent.gather(1, next_index) + offset).flatten()
        # Before the first step there was one row a prompt, from now on there are `beams`.
        parents = parents[from_beam] if step == 0 else from_beam
        decoder.reorder(parents)
        logits = decoder.next(running.tokens[:, :, step].flatten())
    answers: list[Generated | VlmError] = []
    for row in range(batch):
        if row in errors:
            answers.append(errors[row])
            continue
        answer = _row(finished, row, 0)
        listener.finish(row, list(answer.ids))
        answers.append(answer)
    return answers


def _credited(chosen: Tensor, raw: Tensor, token: Tensor, scale: Scale) -> Tensor:
    """`chosen` [B, n] with the marks counted as `near` does; `raw` [B * n, V] is of each one."""
    marks = token - scale.first
    on_scale = (marks >= 0) & (marks < scale.count)
    blocks = raw[:, scale.first : scale.first + scale.count]
    counted = near(blocks, marks.clamp(0, scale.count - 1).flatten(), scale)
    return torch.where(on_scale, counted.view_as(chosen), chosen)


def _empty(batch: int, count: int, rules: DecodeRules, device: torch.device) -> _Beams:
    shape = (batch, count, rules.max_new_tokens)
    return _Beams(
        torch.full(shape, rules.pad, dtype=torch.int64, device=device),
        torch.full(shape, -math.inf, dtype=torch.float32, device=device),
        torch.full(shape[:2], _WORST, dtype=torch.float32, device=device),
    )


def _row(beams: _Beams, row: int, place: int) -> Generated:
    """The hypothesis up to its last written token; -inf marks places never written."""
    log_probs = beams.log_probs[row, place].tolist()
    length = next((n for n, value in enumerate(log_probs) if value == -math.inf), len(log_probs))
    return Generated(tuple(beams.tokens[row, place, :length].tolist()), tuple(log_probs[:length]))


class _Listener:
    """Tells each row's token ids as soon as no open or finished hypothesis disagrees with them."""

    def __init__(self, tell: Callable[[int, list[int]], None] | None, batch: int) -> None:
        self._tell = tell
        self._told = [0] * batch

    def hear(
        self, length: int, running: _Beams, finished: _Beams, is_finished: Tensor, closed: set[int]
    ) -> None:
        if self._tell is None:
            return
        for row in range(len(self._told)):
            if row in closed:
                continue
            hypotheses = running.tokens[row, :, :length].tolist()
            for place in is_finished[row].nonzero()[:, 0].tolist():
                hypotheses.append(list(_row(finished, row, place).ids))
            start = self._told[row]
            agreed = []
            for column in zip(*(h[start:] for h in hypotheses), strict=False):
                if len(set(column)) > 1:
                    break
                agreed.append(column[0])
            if agreed:
                self._told[row] += len(agreed)
                self._tell(row, agreed)

    def finish(self, row: int, ids: list[int]) -> None:
        """Tell the rest of the answer."""
        if self._tell is not None and len(ids) > self._told[row]:
            self._tell(row, ids[self._told[row] :])
