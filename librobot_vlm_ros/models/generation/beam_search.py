"""Beam search with the meaning that transformers gives to it (same answers, tested).

Every prompt keeps `num_beams` open hypotheses and the best `num_beams` finished ones. What all of
them agree on can no longer change: that common beginning is what a listener is told of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from librobot_vlm_ros.core import VlmError
from librobot_vlm_ros.models.generation.config import (
    AllExcept,
    Generated,
    GenerationConfig,
    TokenConstraint,
    TokenSet,
    permits,
)
from librobot_vlm_ros.models.generation.decoder import Decoder, StopRow, TellIds, take_in
from librobot_vlm_ros.models.generation.sampler import (
    Choices,
    Sent,
    apply_rules,
    not_finite,
    suppressed,
    token_log_probs,
)
from librobot_vlm_ros.models.generation.scores import CoordinateRecord
from librobot_vlm_ros.models.placement import threads_for

_WORST = -1.0e9


@dataclass
class _Beams:
    """Hypotheses of all prompts, [B, n, ...].

    A token stands as its place among all that were to choose from: beam it goes on from *
    vocabulary + token; -1 where none is written yet.
    """

    places: Tensor
    scores: Tensor

    def pick(self, index: Tensor) -> _Beams:
        """The hypotheses at `index`, int64 [B, m]."""
        wide = index[:, :, None].expand(-1, -1, self.places.shape[2])
        return _Beams(self.places.gather(1, wide), self.scores.gather(1, index))

    def merge(self, other: _Beams) -> _Beams:
        return _Beams(
            torch.cat([self.places, other.places], 1), torch.cat([self.scores, other.scores], 1)
        )


class _Diary:
    """What the model gave each token, step by step, to be read for the answers alone."""

    def __init__(self, config: GenerationConfig) -> None:
        #: Places [B, keep] and their log-probabilities, NaN where there was no choice.
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._record = CoordinateRecord(config.coordinates)

    def write(self, raw: Tensor, place: Tensor, no_choice: Tensor) -> None:
        """`raw` [B, beams, V], of which `place` [B, keep] were taken.

        `no_choice`: bool [B, beams], hypotheses that one token only could follow.
        """
        taken = raw.flatten(1).gather(1, place)
        bound = no_choice.gather(1, place // raw.shape[-1])
        self._record.keep(len(self._steps), raw)
        self._steps.append((place, taken.masked_fill(bound, math.nan)))

    def read(self, row: int, places: Sequence[int], vocabulary: int) -> Generated:
        """The answer that was written at these places."""
        ids = [place % vocabulary for place in places]
        log_probs: list[float] = []
        if places:
            steps = self._steps[: len(places)]
            known = torch.stack([at[row] for at, _ in steps]).tolist()
            values = torch.stack([value[row] for _, value in steps]).tolist()
            for place, some, of_those in zip(places, known, values, strict=True):
                log_probs.append(of_those[some.index(place)])
        return self._record.generated(
            ids, log_probs, lambda step: (row, places[step] // vocabulary)
        )


def beam_search(
    decoder: Decoder,
    config: GenerationConfig,
    history: Tensor,
    *,
    stop: StopRow,
    tell: TellIds | None,
    constraints: Sequence[TokenConstraint | None] = (),
    bound: bool = True,
) -> list[Generated | VlmError]:
    """See `generate`; `history` is int64 [B, H].

    `constraints`: probabilities are those among what they allow. Where the search is `bound` to
    them, hypotheses that break them are left out; it may end at another answer than without them,
    also where that is well formed (see `search_in_notation`).
    """
    first = config.forced(0)
    logits = decoder.prefill() if first is None else _behind(decoder, first, history)
    with threads_for(decoder):
        return _search(
            decoder, logits, config, history, stop, tell, constraints, bound, ahead=history.is_cuda
        )


def _search(
    decoder: Decoder,
    logits: Tensor,
    config: GenerationConfig,
    history: Tensor,
    stop: StopRow,
    tell: TellIds | None,
    constraints: Sequence[TokenConstraint | None] = (),
    bound: bool = True,
    *,
    ahead: bool,
) -> list[Generated | VlmError]:
    """`logits` [B, V] of the first token, or behind it where it is forced.

    `ahead`: each step is asked for before the state of the one before it is read, see `decode`.
    """
    batch, beams, device = history.shape[0], config.num_beams, history.device
    keep = max(2, 1 + len(config.eos)) * beams
    eos = torch.tensor(config.eos, device=device)
    offset = torch.arange(batch, device=device)[:, None] * beams
    top = torch.arange(keep, device=device)[None, :] < beams

    running = _empty(batch, beams, config, device)
    running.scores[:, 0] = 0.0  # all beams start equal: only the first one may branch
    finished = _empty(batch, beams, config, device)
    is_finished = torch.zeros((batch, beams), dtype=torch.bool, device=device)
    can_improve = torch.ones((batch, 1), dtype=torch.bool, device=device)

    unused = suppressed(config, device)
    errors: dict[int, VlmError] = {}
    listener, diary = _Listener(tell, batch), _Diary(config)
    choices, behind = Choices(device), None
    if config.forced(0) is not None:  # nothing is to be asked at the first step
        behind, logits = logits, torch.zeros_like(logits)
    logits = logits.repeat_interleave(beams, dim=0)
    parents = torch.arange(batch, device=device).repeat_interleave(beams)
    past = history.repeat_interleave(beams, dim=0)
    closed: set[int] = set()
    vocabulary = logits.shape[-1]
    for step in range(config.max_new_tokens):
        for row in range(batch):
            if row not in closed and (error := stop(row)) is not None:
                errors[row] = error
                closed.add(row)
        if len(closed) == batch:
            break
        raw = token_log_probs(logits, unused)
        written = past
        if config.no_repeat_ngram:
            before = running.places[:, :, :step].flatten(0, 1) % vocabulary
            written = torch.cat([past, before], dim=1)
        scores = apply_rules(raw, written, config, step)
        forced = config.forced(step) is not None
        no_choice = torch.full((batch, beams), forced, device=device)
        if any(constraints) and not forced:
            allowed = _allowed(running.places[:, :, :step] % vocabulary, constraints)
            choices.bar(logits, allowed)
            # The search goes by the model's own numbers; told are those among what may follow.
            raw = choices.restrict(token_log_probs(logits, unused), allowed)
            if bound:
                scores = scores.masked_fill(raw.isneginf(), -math.inf)
            single = [
                some is not None and not isinstance(some, AllExcept) and len(some) == 1
                for some in allowed
            ]
            no_choice = torch.tensor(single, device=device).view(batch, beams)
        total = scores.view(batch, beams, vocabulary) + running.scores[:, :, None]
        best, place = total.flatten(1).topk(keep, dim=1)
        parent, token = place // vocabulary, place % vocabulary

        grown = running.pick(parent)
        grown.scores = best
        grown.places[:, :, step] = place
        diary.write(raw.view(batch, beams, vocabulary), place, no_choice)

        ended = torch.isin(token, eos) | (step == config.max_new_tokens - 1)
        next_index = (best + ended * _WORST).topk(beams, dim=1).indices
        full = is_finished.all(dim=1, keepdim=True) & config.early_stopping
        may_finish = ended & top
        # A hypothesis that is not finished, or comes when nothing can be gained, ranks last.
        barred = full.float() + (~can_improve).float() + (~may_finish).float()
        value = best / (step + 1) ** config.length_penalty + barred * _WORST
        merged = finished.merge(_Beams(grown.places, value))
        order = merged.scores.topk(beams, dim=1).indices
        finished = merged.pick(order)
        is_finished = torch.cat([is_finished, may_finish], dim=1).gather(1, order)

        grown.scores = best + ended * _WORST
        running = grown.pick(next_index)
        hypothetical = running.scores[:, :1] / (step + 1) ** config.length_penalty
        worst = torch.where(is_finished, finished.scores.amin(dim=1, keepdim=True), _WORST)
        can_improve = can_improve & (hypothetical > worst).any(dim=-1, keepdim=True)
        exhausted = ended.all(dim=1) if step == config.max_new_tokens - 1 else ~can_improve[:, 0]
        done = exhausted | (is_finished.all(dim=1) & config.early_stopping)
        # One NaN makes the whole row NaN, and it is what the search finds best.
        broken = raw.view(batch, -1).amax(dim=1) if forced else best[:, 0]
        state, last = Sent(done, broken), step == config.max_new_tokens - 1
        from_beam = (parent.gather(1, next_index) + offset).flatten()
        # Before the first step there was one row a prompt, from now on there are `beams`.
        parents = parents[from_beam] if step == 0 else from_beam
        token = (running.places[:, :, step] % vocabulary).flatten()
        if ahead and not last:  # what is finished does not change any more
            logits = _following(decoder, parents, token, step, behind)
        for row, (is_done, best_one) in enumerate(zip(*state.read(), strict=True)):
            if row not in closed and math.isnan(best_one):
                raise not_finite()
            if is_done:
                closed.add(row)
        listener.hear(step + 1, running, finished, is_finished, closed, vocabulary)
        if len(closed) == batch or last:
            break
        if not ahead:
            logits = _following(decoder, parents, token, step, behind)
    answers: list[Generated | VlmError] = []
    for row in range(batch):
        if row in errors:
            answers.append(errors[row])
            continue
        answer = diary.read(row, _written(finished.places[row, 0]), vocabulary)
        listener.finish(row, list(answer.ids))
        answers.append(answer)
    return answers


def _behind(decoder: Decoder, token: int, history: Tensor) -> Tensor:
    """Logits behind a token that all prompts begin with."""
    return take_in(decoder, [torch.full_like(history[:, 0], token)], begun=False)


def _following(
    decoder: Decoder, parents: Tensor, tokens: Tensor, step: int, behind: Tensor | None
) -> Tensor:
    """Logits of the next step; `behind` are those of the second one where they are known."""
    decoder.reorder(parents, within=step > 0)
    if step == 0 and behind is not None:
        return behind.index_select(0, parents)
    return decoder.decode(tokens)


def _allowed(ids: Tensor, constraints: Sequence[TokenConstraint | None]) -> list[TokenSet]:
    """What may follow each hypothesis `ids` [B, beams, T], in the order of their rows."""
    return [
        None if constraint is None else constraint.allowed(written)
        for row, constraint in zip(ids.tolist(), constraints, strict=True)
        for written in row
    ]


def _empty(batch: int, count: int, config: GenerationConfig, device: torch.device) -> _Beams:
    shape = (batch, count, config.max_new_tokens)
    return _Beams(
        torch.full(shape, -1, dtype=torch.int64, device=device),
        torch.full(shape[:2], _WORST, dtype=torch.float32, device=device),
    )


def _written(places: Tensor) -> list[int]:
    """Those of a hypothesis, [T], up to its last token."""
    return [place for place in places.tolist() if place >= 0]


class _Listener:
    """Tells each row's token ids as soon as no open or finished hypothesis disagrees with them."""

    def __init__(self, tell: Callable[[int, list[int]], None] | None, batch: int) -> None:
        self._tell = tell
        self._told = [0] * batch

    def hear(
        self,
        length: int,
        running: _Beams,
        finished: _Beams,
        is_finished: Tensor,
        closed: set[int],
        vocabulary: int,
    ) -> None:
        if self._tell is None:
            return
        for row in range(len(self._told)):
            if row in closed:
                continue
            hypotheses = running.places[row, :, :length].tolist()
            for number in is_finished[row].nonzero()[:, 0].tolist():
                hypotheses.append(_written(finished.places[row, number]))
            start = self._told[row]
            agreed = []
            for column in zip(*(h[start:] for h in hypotheses), strict=False):
                tokens = {place % vocabulary for place in column}
                if len(tokens) > 1:
                    break
                agreed.append(tokens.pop())
            if agreed:
                self._told[row] += len(agreed)
                self._tell(row, agreed)

    def finish(self, row: int, ids: list[int]) -> None:
        """Tell the rest of the answer."""
        if self._tell is not None and len(ids) > self._told[row]:
            self._tell(row, ids[self._told[row] :])


#: The prompts of these rows anew: a decoder and its history, as `decode` takes them.
Again = Callable[[Sequence[int]], tuple[Decoder, Tensor]]


def search_in_notation(
    decoder: Decoder,
    config: GenerationConfig,
    history: Tensor,
    constraints: Sequence[TokenConstraint | None],
    again: Again,
    *,
    stop: StopRow,
    tell: TellIds | None,
) -> list[Generated | VlmError]:
    """See `generate`; one constraint a row."""

    def tell_free(row: int, ids: list[int]) -> None:
        if tell is not None and constraints[row] is None:
            tell(row, ids)

    found = beam_search(
        decoder,
        config,
        history,
        stop=stop,
        tell=tell_free if tell is not None else None,
        constraints=constraints,
        bound=False,
    )
    bound = {
        row: constraint
        for row, (constraint, answer) in enumerate(zip(constraints, found, strict=True))
        if constraint is not None and isinstance(answer, Generated)
    }
    broken = [row for row, constraint in bound.items() if not fits(constraint, found[row], config)]
    if broken:
        second, past = again(broken)
        answers = beam_search(
            second,
            config,
            past,
            stop=lambda place: stop(broken[place]),
            tell=None,
            constraints=[constraints[row] for row in broken],
        )
        for row, answer in zip(broken, answers, strict=True):
            found[row] = answer
    for row in bound:
        answer = found[row]
        if tell is not None and isinstance(answer, Generated) and answer.ids:
            tell(row, list(answer.ids))
    return found


def fits(
    constraint: TokenConstraint, answer: Generated | VlmError, config: GenerationConfig
) -> bool:
    """Whether an answer keeps to its constraint; tokens that `config` forces are not its own."""
    assert isinstance(answer, Generated)
    ids = answer.ids
    return all(
        config.forced(place) == token or permits(constraint.allowed(ids[:place]), token)
        for place, token in enumerate(ids)
    )
