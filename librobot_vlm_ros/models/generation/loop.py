"""The decoding loop: tokens out of a model, one step at a time, for every family.

A family gives a `Decoder` (a prefilled prompt with its KV cache) and a `GenerationConfig`; what
comes back is one `Generated` or one error per row. Each row can be stopped on its own before any
token. Answers equal those of transformers' `generate` with the same settings (tested), and hold
besides the probability that the model itself gave each token, before any rule touched it. Where a
row has no choice (a forced token, a constraint that leaves one), the model is not asked.

On CUDA the host runs one step ahead: the next step is asked for before the token is read that it
starts from, so that the device never waits for the host. The price is one step for nothing at the
end of an answer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from librobot_vlm_ros.core import VlmError
from librobot_vlm_ros.models.generation.beam_search import beam_search, search_in_notation
from librobot_vlm_ros.models.generation.config import (
    AllExcept,
    CoordinateBins,
    Generated,
    GenerationConfig,
    TokenConstraint,
    TokenSet,
)
from librobot_vlm_ros.models.generation.decoder import Decoder, StopRow, TellIds, take_in
from librobot_vlm_ros.models.generation.sampler import Sampler, not_finite
from librobot_vlm_ros.models.placement import threads_for


def generate(
    decoder: Decoder,
    config: GenerationConfig,
    history: Tensor,
    *,
    stop: StopRow = lambda row: None,
    tell: TellIds | None = None,
    seeds: Sequence[int | None] | None = None,
    constraints: Sequence[TokenConstraint | None] = (),
    again: Callable[[Sequence[int]], tuple[Decoder, Tensor]] | None = None,
) -> list[Generated | VlmError]:
    """Generate until every row has ended.

    `history`: int64 [rows, H], tokens before the first new one that the n-gram rule sees.
    `seeds`: one a row, for sampling; None draws one. `constraints`: one a row; samples are free.
    `again`: takes in the prompts of some rows anew, which beams need to keep to constraints;
    without it they are free, too.
    Raises InferenceError NAN_LOGITS when the model gives no usable numbers.
    """
    if config.num_beams > 1:
        if again is not None and any(constraints):
            return search_in_notation(
                decoder, config, history, constraints, again, stop=stop, tell=tell
            )
        return beam_search(decoder, config, history, stop=stop, tell=tell)
    return _Loop(decoder, config, history, seeds, constraints).run(stop, tell)


class _Loop:
    """One batch on its way through `generate`, without beams."""

    def __init__(
        self,
        decoder: Decoder,
        config: GenerationConfig,
        history: Tensor,
        seeds: Sequence[int | None] | None,
        constraints: Sequence[TokenConstraint | None] = (),
    ) -> None:
        self._decoder, self._config = decoder, config
        self._sampler = Sampler(config, history, seeds)
        rows = history.shape[0]
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._log_probs: list[list[float]] = [[] for _ in range(rows)]
        self._open = list(range(rows))
        #: The row of the answers that each row of the decoder writes.
        self._written_by = list(range(rows))
        self._device = history.device
        self._ahead = history.is_cuda
        self._eos = torch.tensor(config.eos, device=history.device)
        #: Rows that have ended, as the device knows them.
        self._ended = torch.zeros(rows, dtype=torch.bool, device=history.device)
        #: Tokens that the decoder has not taken in yet, and whether it has taken in the prompts.
        self._unread: list[Tensor] = []
        self._begun = False
        #: As soon as it is known.
        self._vocabulary = 0
        #: What is undone at the end.
        self._at_end = contextlib.ExitStack()
        free = config.temperature > 0 or not any(constraints)
        self._constraints = () if free else tuple(constraints)

    def run(self, stop: StopRow, tell: TellIds | None) -> list[Generated | VlmError]:
        """See `generate`."""
        with self._at_end:
            return self._run(stop, tell)

    def _run(self, stop: StopRow, tell: TellIds | None) -> list[Generated | VlmError]:
        errors: dict[int, VlmError] = {}
        config, only = self._config, None
        allowed = self._allowed()
        known = self._known(0, allowed)
        if known is None:
            logits = self._ask()
        for step in range(config.max_new_tokens):
            for row in list(self._open):
                error = stop(row)
                if error is not None:
                    errors[row] = error
                    self._open.remove(row)
                    self._ended[self._written_by.index(row)] = True
            if not self._open:
                break
            last = step == config.max_new_tokens - 1
            forced, early = config.forced(step) is not None, False
            if known is not None:
                self._note(torch.tensor(known, device=self._device), step)
                self._take(known, None, step, chosen=(), tell=tell)
            else:
                chosen = set() if forced else self._with_choice(allowed)
                picked = self._sampler.pick(logits, step, allowed, only)
                self._note(picked.tokens, step)
                early = self._ahead and not last and config.forced(step + 1) is None
                if early:
                    logits = self._ask()
                self._take(*picked.read(), step, chosen=chosen, tell=tell)
            if not self._open or last:
                break
            self._shrink()
            allowed = self._allowed()
            if early:
                continue
            known = self._known(step + 1, allowed)
            if known is None:
                only = self._common(step + 1, allowed)
                logits = self._ask(only)
        return [
            errors[row] if row in errors else self._sampler.generated(row, ids, log_probs)
            for row, (ids, log_probs) in enumerate(zip(self._ids, self._log_probs, strict=True))
        ]

    def _shrink(self) -> None:
        """From here on the rows that go on are alone in the decoder.

        A CPU takes longer for more rows. (On CUDA a graph stands ready for as many as there are.)
        """
        if self._ahead or not self._begun or len(self._open) == len(self._written_by):
            return
        still = set(self._open)
        kept = [at for at, row in enumerate(self._written_by) if row in still]
        rows = torch.tensor(kept, device=self._device)
        self._written_by = [self._written_by[at] for at in kept]
        self._ended = self._ended[rows]
        self._unread = [tokens[rows] for tokens in self._unread]
        self._decoder.reorder(rows)
        self._sampler.keep(rows)

    def _note(self, tokens: Tensor, step: int) -> None:
        """Tokens to be taken in; for rows that have ended it is the pad token."""
        if len(self._written_by) > 1:
            tokens = torch.where(self._ended, self._config.pad, tokens)
            self._ended |= torch.isin(tokens, self._eos)
        self._sampler.wrote(tokens, step)
        self._unread.append(tokens)

    def _ask(self, only: range | Tensor | None = None) -> Tensor:
        """The logits behind what is noted."""
        unread, self._unread = self._unread, []
        logits = take_in(self._decoder, unread, only, begun=self._begun)
        if only is None:
            self._vocabulary = logits.shape[-1]
        if not self._begun:
            self._begun = True
            self._at_end.enter_context(threads_for(self._decoder))
        return logits

    def _take(
        self,
        tokens: list[int],
        log_probs: list[float] | None,
        step: int,
        *,
        chosen: Collection[int],
        tell: TellIds | None,
    ) -> None:
        """Write down what was taken; rows that have not `chosen` had no choice.

        `log_probs`: None where the model was not asked. Raises InferenceError NAN_LOGITS.
        """
        coordinates, marks = self._config.coordinates, False
        still = set(self._open)
        for at, (row, token) in enumerate(zip(self._written_by, tokens, strict=True)):
            if row not in still:
                continue
            log_prob = 0.0 if log_probs is None else log_probs[at]
            if math.isnan(log_prob) or log_prob == math.inf:
                raise not_finite()
            self._ids[row].append(token)
            self._log_probs[row].append(log_prob if row in chosen else math.nan)
            if coordinates is not None:  # a number's end says how large it is
                marks = marks or any(t in coordinates for t in self._ids[row][-2:])
            if tell is not None:
                tell(row, [token])
            if token in self._config.eos:
                self._open.remove(row)
        if not marks:
            self._sampler.forget(step)

    def _with_choice(self, allowed: list[TokenSet] | None) -> set[int]:
        """Rows that can choose from more than one token."""
        if allowed is None:
            return set(self._written_by)
        return {
            row
            for row, some in zip(self._written_by, allowed, strict=True)
            if some is None or isinstance(some, AllExcept) or len(some) > 1
        }

    def _allowed(self) -> list[TokenSet] | None:
        """What the constraints let each row choose from now; None where there are none."""
        if not self._constraints:
            return None
        still = set(self._open)
        found: list[TokenSet] = []
        for row in self._written_by:
            constraint = self._constraints[row] if row in still else None
            found.append(None if constraint is None else constraint.allowed(self._ids[row]))
        return found

    def _known(self, step: int, allowed: list[TokenSet] | None) -> list[int] | None:
        """The tokens of all rows at that step where none has a choice: the model isn't asked."""
        forced, rows = self._config.forced(step), self._written_by
        if forced is not None:
            return [forced] * len(rows)
        # A host that runs ahead has asked already; the n-gram rule may forbid the only token.
        if not allowed or self._ahead or self._config.no_repeat_ngram:
            return None
        tokens, still = [self._config.pad] * len(rows), set(self._open)
        for at, (row, some) in enumerate(zip(rows, allowed, strict=True)):
            if row not in still:
                continue
            if some is None or isinstance(some, AllExcept) or len(some) > 1:
                return None
            tokens[at] = some[0]
        return tokens

    def _common(self, step: int, allowed: list[TokenSet] | None) -> range | Tensor | None:
        """Few tokens that every row must choose from at that step; None where there are none."""
        # The n-gram rule is about the whole vocabulary, and so is a forced token.
        whole = self._config.no_repeat_ngram or self._config.forced(step) is not None
        if not allowed or self._ahead or whole or len(self._open) < len(allowed):
            return None
        first = allowed[0]
        if first is None or isinstance(first, AllExcept) or set(allowed) != {first}:
            return None
        # Gathering the weights of many tokens is no cheaper than the whole layer.
        scattered = not isinstance(first, range)
        bins = isinstance(self._config.coordinates, CoordinateBins)
        if scattered and (bins or len(first) * 4 > self._vocabulary):
            return None
        return self._sampler.choices.reach(first)
