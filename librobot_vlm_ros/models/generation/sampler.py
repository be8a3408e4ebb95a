"""Sample one token per row without a host sync, under a `GenerationConfig` and token masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, InferenceError
from librobot_vlm_ros.models.generation.config import (
    AllExcept,
    Generated,
    GenerationConfig,
    TokenSet,
)
from librobot_vlm_ros.models.generation.scores import CoordinateRecord


class Choices:
    """Applies them to probabilities. Nothing as wide as the vocabulary is made on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def index(self, tokens: tuple[int, ...]) -> Tensor:
        """The tokens int64 [n] on the device; states of a notation come again and again."""
        if tokens not in self._indices:
            self._indices[tokens] = torch.tensor(tokens, device=self._device)
        return self._indices[tokens]

    def bar(self, logits: Tensor, allowed: Sequence[TokenSet]) -> None:
        """Set logits [rows, V] of the tokens to -inf that a row is barred from one by one."""
        for line, some in zip(logits, allowed, strict=True):
            if isinstance(some, AllExcept):
                line.index_fill_(0, self.index(some.tokens), -math.inf)

    def restrict(self, raw: Tensor, allowed: Sequence[TokenSet]) -> Tensor:
        """Log-probabilities [rows, V] among what each row may choose from, other tokens at -inf;
        overwrites `raw`, which is of logits that went through `bar`.
        """
        for line, some in zip(raw, allowed, strict=True):
            if some is None or isinstance(some, AllExcept):
                continue
            among = torch.log_softmax(columns(line, self.reach(some)), dim=0)
            line.fill_(-math.inf)
            if isinstance(some, range):
                line[some.start : some.stop] = among
            else:
                line.index_copy_(0, self.index(some), among)
        return raw

    def reach(self, some: range | tuple[int, ...]) -> range | Tensor:
        """The same as what logits can be asked for."""
        return some if isinstance(some, range) else self.index(some)


def columns(logits: Tensor, only: range | Tensor | None) -> Tensor:
    """Of logits [..., V] those of these tokens, [..., n]."""
    if only is None:
        return logits
    if isinstance(only, range):
        return logits[..., only.start : only.stop]
    return logits.index_select(-1, only)


#: What each row may choose from.
Allowed = Sequence[TokenSet]


class Sent:
    """Numbers on their way to the host, some tensors [m].

    The device is waited for up to where they were sent from only, not for what was asked of it
    since.
    """

    def __init__(self, *rows: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._rows: Sequence[Tensor] = rows
        if rows[0].is_cuda:
            values = torch.stack([row.double() for row in rows])  # which holds every token id
            host = torch.empty(values.shape, dtype=torch.float64, pin_memory=True)
            host.copy_(values, non_blocking=True)
            self._rows = host.unbind(0)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[list[float]]:
        """A list for each of the rows."""
        if self._event is not None:
            self._event.synchronize()
        return [row.tolist() for row in self._rows]


@dataclass
class Picked:
    """Tokens int64 [rows] with their log-probabilities, still on the device."""

    tokens: Tensor
    log_probs: Tensor

    def __post_init__(self) -> None:
        self._sent = Sent(self.tokens, self.log_probs)

    def read(self) -> tuple[list[int], list[float]]:
        """Both on the host. NaN where the model's numbers were not finite."""
        tokens, log_probs = self._sent.read()
        return [int(token) for token in tokens], log_probs


class Sampler:
    """Chooses for a batch, greedily or from the nucleus.

    `history`: int64 [rows, H], tokens before the first new one that the n-gram rule sees.
    """

    def __init__(
        self, config: GenerationConfig, history: Tensor, seeds: Sequence[int | None] | None
    ) -> None:
        self._config = config
        rows, before = history.shape
        self._generators = None
        if config.temperature > 0:
            self._generators = _generators(seeds or [None] * rows, history.device)
        self._suppressed = suppressed(config, history.device)
        self.choices = Choices(history.device)
        self._before = before
        if config.no_repeat_ngram:
            self._written = history.new_full((rows, before + config.max_new_tokens), config.pad)
            self._written[:, :before] = history
        #: The rows of the batch that are still there.
        self._rows = list(range(rows))
        self._record = CoordinateRecord(config.coordinates)
        #: What `_rows` was at each step that the record keeps.
        self._rows_at: dict[int, list[int]] = {}

    def pick(
        self,
        logits: Tensor,
        step: int,
        allowed: Allowed | None = None,
        only: range | Tensor | None = None,
    ) -> Picked:
        """One token a row; may overwrite `logits`.

        `allowed`: what each row may choose from. `only`: the logits are those of these tokens.
        """
        config = self._config
        if allowed is not None and only is None:
            self.choices.bar(logits, allowed)
        raw = token_log_probs(logits, None if only is not None else self._suppressed)
        if allowed is not None and only is None:
            raw = self.choices.restrict(raw, allowed)
        self._record.keep(step, raw, only)
        self._rows_at[step] = self._rows
        forced = config.forced(step)
        if forced is not None:
            tokens = torch.full_like(raw[:, 0], forced, dtype=torch.int64)
            return Picked(tokens, raw.amax(dim=1))
        scores = raw
        if config.no_repeat_ngram:
            scores = apply_rules(raw, self._written[:, : self._before + step], config, step)
        tokens = _choose(scores, config, self._generators)
        log_probs = raw.gather(1, tokens[:, None])[:, 0]
        if isinstance(only, range):
            tokens = tokens + only.start
        elif only is not None:
            tokens = only[tokens]
        return Picked(tokens, log_probs)

    def wrote(self, tokens: Tensor, step: int) -> None:
        """Tokens int64 [rows] now stand at place `step` of the answers."""
        if self._config.no_repeat_ngram:
            self._written[:, self._before + step] = tokens

    def keep(self, rows: Tensor) -> None:
        """Go on with those places of the batch alone, int64 [n]."""
        kept: list[int] = rows.tolist()
        self._rows = [self._rows[at] for at in kept]
        if self._config.no_repeat_ngram:
            self._written = self._written[rows]
        if self._generators is not None:
            self._generators = [self._generators[at] for at in kept]

    def forget(self, step: int) -> None:
        """No coordinate is written at that step."""
        self._record.forget(step)

    def generated(self, row: int, ids: Sequence[int], log_probs: Sequence[float]) -> Generated:
        """The answer of a row, its coordinates counted as `CoordinateRecord` does."""
        return self._record.generated(ids, log_probs, lambda step: self._rows_at[step].index(row))


def suppressed(config: GenerationConfig, device: torch.device) -> Tensor | None:
    """The suppressed tokens int64 [n]; None where there are none."""
    return torch.tensor(config.suppressed, device=device) if config.suppressed else None


def token_log_probs(logits: Tensor, suppressed: Tensor | None) -> Tensor:
    """The model's own log-probabilities, float32 [rows, V], suppressed tokens at -inf.

    May overwrite `logits`. One NaN or +inf makes the whole row NaN.
    """
    logits = logits.float()
    if suppressed is not None:
        logits.index_fill_(1, suppressed, -math.inf)
    return torch.log_softmax(logits, dim=-1)


def not_finite() -> InferenceError:
    """What a row gets whose numbers are NaN."""
    return InferenceError(
        ErrorCode.NAN_LOGITS,
        "the model gave numbers that are not finite (NaN or infinity)",
        "load it with dtype float32 or bfloat16",
    )


def apply_rules(log_probs: Tensor, tokens: Tensor, config: GenerationConfig, step: int) -> Tensor:
    """Scores after the rules: a new tensor where one applies, else `log_probs` itself.

    `tokens`: int64 [rows, T], what was written so far with its history.
    """
    forced = config.forced(step)
    if forced is not None:
        scores = torch.full_like(log_probs, -math.inf)
        scores[:, forced] = 0.0
        return scores
    size = config.no_repeat_ngram
    if size and tokens.shape[1] >= size:
        seen = tokens.unfold(1, size, 1)
        tail = tokens[:, tokens.shape[1] - size + 1 :]
        repeats = (seen[:, :, :-1] == tail[:, None, :]).all(dim=-1)
        penalty = torch.zeros_like(repeats, dtype=log_probs.dtype).masked_fill_(repeats, -math.inf)
        return log_probs.scatter_add(1, seen[:, :, -1], penalty)
    return log_probs


def _choose(
    scores: Tensor, config: GenerationConfig, generators: list[torch.Generator] | None
) -> Tensor:
    """One token a row, int64 [rows]: the best, or one drawn from the nucleus."""
    if generators is None:
        return scores.argmax(dim=-1)
    probabilities = torch.softmax(scores / config.temperature, dim=-1)
    if config.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p; the first always stays.
        outside = ordered.cumsum(dim=-1) - ordered >= config.top_p
        ordered = ordered.masked_fill(outside, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    # A row of NaN would fail the draw; it is chosen at random and found out by its probability.
    probabilities = probabilities.nan_to_num(nan=1.0)
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
