"""The decoding loop: tokens out of a model, one step at a time, for every family.

A family gives a `Decoder` (a prompt already taken in, with its KV cache) and `DecodeRules`; what
comes back is one `Generated` or one error per row. Each row can be stopped on its own before any
token. Answers equal those of transformers' `generate` with the same settings (tested), and hold
besides the probability that the model itself gave each token, before any rule touched it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.core import ErrorCode, InferenceError, VlmError

__all__ = [
    "DecodeRules",
    "Decoder",
    "Generated",
    "Scale",
    "apply_rules",
    "credited",
    "decode",
    "token_log_probs",
]

#: Asked before each token: why row r must stop, or None.
StopRow = Callable[[int], VlmError | None]
#: Told of new token ids of row r, in order, each once.
TellIds = Callable[[int, list[int]], None]


class Decoder(Protocol):
    """A batch of prompts inside a model. Rows are numbered from 0; logits are [rows, V]."""

    def first(self) -> Tensor:
        """Logits of the first token, one row a prompt."""

    def next(self, tokens: Tensor) -> Tensor:
        """Take one token a row (int64 [rows]) and give the logits of the one after it."""

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from what was row rows[r]; there may be more rows than before."""


@dataclass(frozen=True)
class Scale:
    """Tokens `first` to `first + count - 1`: marks in order, neighbours mean nearly the same.

    What is asked of such a token is not whether it is this very mark but whether it is about right:
    its probability is that of all marks at most `radius` away. (The mass of a sharp but smooth
    answer lies on several marks, so that a single one of them never has much.)
    """

    first: int
    count: int
    radius: int


@dataclass(frozen=True)
class DecodeRules:
    """How tokens are chosen. Beams and sampling exclude each other."""

    eos: tuple[int, ...]
    pad: int
    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    #: No sequence of this many tokens occurs twice; 0 switches the rule off.
    no_repeat_ngram: int = 0
    forced_first: int | None = None
    #: Token that stands last when max_new_tokens is reached.
    forced_last: int | None = None
    #: Tokens that are no part of the language (image placeholders): never chosen, probability 0.
    suppressed: tuple[int, ...] = ()
    #: Tokens that are marks on a scale, such as locations.
    scale: Scale | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False

    def forced(self, step: int) -> int | None:
        """The token that must stand at place `step`, counted from 0."""
        if step == 0 and self.forced_first is not None:
            return self.forced_first
        return self.forced_last if step == self.max_new_tokens - 1 else None


@dataclass(frozen=True)
class Generated:
    """What a row gave, with each token's log-probability as `credited` counts it.

    A forced token has NaN: the model did not choose it.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]


def decode(
    decoder: Decoder,
    rules: DecodeRules,
    history: Tensor,
    *,
    stop: StopRow = lambda row: None,
    tell: TellIds | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Generated | VlmError]:
    """Generate until every row has ended.

    `history`: int64 [rows, H], tokens before the first new one that the n-gram rule sees.
    `seeds`: one a row, for sampling; None draws one.
    Raises InferenceError NAN_LOGITS when the model gives no usable numbers.
    """
    if rules.num_beams > 1:
        from librobot_vlm_ros.models.beam import beam_search

        return beam_search(decoder, rules, history, stop=stop, tell=tell)
    rows = history.shape[0]
    device = history.device
    generators = _generators(seeds or [None] * rows, device) if rules.temperature > 0 else None
    ids: list[list[int]] = [[] for _ in range(rows)]
    log_probs: list[list[float]] = [[] for _ in range(rows)]
    errors: dict[int, VlmError] = {}
    open_rows = list(range(rows))
    tokens = history
    logits = decoder.first()
    for step in range(rules.max_new_tokens):
        for row in list(open_rows):
            error = stop(row)
            if error is not None:
                errors[row] = error
                open_rows.remove(row)
        if not open_rows:
            break
        raw = token_log_probs(logits, rules, open_rows)
        forced = rules.forced(step)
        scores = apply_rules(raw, tokens, rules, step)
        chosen = _choose(scores, rules, generators)
        values = credited(raw, rules).gather(1, chosen[:, None])[:, 0].tolist()
        still_open = []
        fed = chosen.tolist()
        for row in range(rows):
            if row not in open_rows:
                fed[row] = rules.pad
                continue
            token = fed[row]
            ids[row].append(token)
            log_probs[row].append(math.nan if forced is not None else values[row])
            if tell is not None:
                tell(row, [token])
            if token not in rules.eos:
                still_open.append(row)
        open_rows = still_open
        if not open_rows or step == rules.max_new_tokens - 1:
            break
        fed_tensor = torch.tensor(fed, dtype=torch.int64, device=device)
        if rules.no_repeat_ngram:
            tokens = torch.cat([tokens, fed_tensor[:, None]], dim=1)
        logits = decoder.next(fed_tensor)
    return [
        errors[row] if row in errors else Generated(tuple(ids[row]), tuple(log_probs[row]))
        for row in range(rows)
    ]


def token_log_probs(logits: Tensor, rules: DecodeRules, rows: Sequence[int]) -> Tensor:
    """The model's own log-probabilities, float32 [rows, V], suppressed tokens at -inf.

    Raises InferenceError NAN_LOGITS when one of `rows` holds a NaN or nothing finite.
    """
    logits = logits.to(torch.float32, copy=True)
    if rules.suppressed:
        logits[:, list(rules.suppressed)] = -math.inf
    log_probs = torch.log_softmax(logits, dim=-1)
    # One NaN or +inf makes the whole row NaN, so the sum of the best tells without a second pass.
    best = log_probs.amax(dim=-1)
    if not torch.isfinite(best[list(rows)]).all():
        raise InferenceError(
            ErrorCode.NAN_LOGITS,
            "the model gave numbers that are not finite (NaN or infinity)",
            "load it with dtype float32 or bfloat16",
        )
    return log_probs


def credited(log_probs: Tensor, rules: DecodeRules) -> Tensor:
    """Log-probabilities as they count for scores: marks on a scale with their neighbours."""
    scale = rules.scale
    if scale is None:
        return log_probs
    end = scale.first + scale.count
    mass = functional.pad(log_probs[:, scale.first : end].exp().cumsum(dim=-1), (1, 0))
    place = torch.arange(scale.count, device=log_probs.device)
    upper = (place + scale.radius + 1).clamp(max=scale.count)
    lower = (place - scale.radius).clamp(min=0)
    near = (mass[:, upper] - mass[:, lower]).clamp(min=torch.finfo(mass.dtype).tiny, max=1.0)
    return torch.cat([log_probs[:, : scale.first], near.log(), log_probs[:, end:]], dim=1)


def apply_rules(log_probs: Tensor, tokens: Tensor, rules: DecodeRules, step: int) -> Tensor:
    """Scores after the rules: a new tensor where a rule applies, else `log_probs` itself.

    `tokens`: int64 [rows, T], what was written so far with its history.
    """
    forced = rules.forced(step)
    if forced is not None:
        scores = torch.full_like(log_probs, -math.inf)
        scores[:, forced] = 0.0
        return scores
    size = rules.no_repeat_ngram
    if size and tokens.shape[1] >= size:
        seen = tokens.unfold(1, size, 1)
        tail = tokens[:, tokens.shape[1] - size + 1 :]
        repeats = (seen[:, :, :-1] == tail[:, None, :]).all(dim=-1)
        row, place = repeats.nonzero(as_tuple=True)
        log_probs = log_probs.clone()
        log_probs[row, seen[row, place, -1]] = -math.inf
    return log_probs


def _choose(scores: Tensor, rules: DecodeRules, generators: list[torch.Generator] | None) -> Tensor:
    """One token a row, int64 [rows]: the best, or one drawn from the nucleus."""
    if generators is None:
        return scores.argmax(dim=-1)
    probabilities = torch.softmax(scores / rules.temperature, dim=-1)
    if rules.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p; the first always stays.
        outside = ordered.cumsum(dim=-1) - ordered >= rules.top_p
        ordered = ordered.masked_fill(outside, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    drawn = [
        torch.multinomial(probabilities[row], 1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(drawn)


def _generators(seeds: Sequence[int | None], device: torch.device) -> list[torch.Generator]:
    """A generator a row, so that a row's answer does not depend on its neighbours."""
    generators = []
    for seed in seeds:
        generator = torch.Generator(device=device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        generators.append(generator)
    return generators
