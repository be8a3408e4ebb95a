"""How tokens are chosen, as data: generation config, coordinates, constraints, and results."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class AllExcept:
    """All tokens but these."""

    tokens: tuple[int, ...]


#: Tokens that may stand at a place: a range, these, all but these, or (None) all.
TokenSet = range | tuple[int, ...] | AllExcept | None


def permits(some: TokenSet, token: int) -> bool:
    """Whether the token may stand there."""
    if some is None:
        return True
    return token not in some.tokens if isinstance(some, AllExcept) else token in some


class TokenConstraint(Protocol):
    """Which tokens may follow an answer's beginning, for answers in a notation.

    It must allow whatever a well-formed answer has, so that it never changes one.
    """

    def allowed(self, ids: Sequence[int]) -> TokenSet:
        """Tokens that may follow `ids`, one at least.

        The fewer they are the less is computed, a range for less than as many others.
        """


@dataclass(frozen=True)
class CoordinateBins:
    """Location tokens `first` to `first + count - 1`: bins in order along a side of the image.

    A coordinate's probability is that of all bins at most `radius` away from the one written: what
    is asked is not whether it is this very bin but whether it is about right. (The mass of a sharp
    but smooth answer lies on several bins, so that a single one of them never has much.)
    """

    first: int
    count: int
    radius: int

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and 0 <= token - self.first < self.count


@dataclass(frozen=True)
class NumberTokens:
    """Tokens that coordinates are written with as text: digits, points, and what merges with them.

    Their log-probabilities are kept wherever a number is written, to be read by `scores`.
    """

    #: Sorted.
    tokens: tuple[int, ...]

    def __contains__(self, token: object) -> bool:
        if not isinstance(token, int):
            return False
        at = bisect.bisect_left(self.tokens, token)
        return at < len(self.tokens) and self.tokens[at] == token


@dataclass(frozen=True)
class GenerationConfig:
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
    #: The tokens that coordinates are written with.
    coordinates: CoordinateBins | NumberTokens | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False

    def forced(self, step: int) -> int | None:
        """The token that must stand at place `step`, counted from 0."""
        if step == 0 and self.forced_first is not None:
            return self.forced_first
        return self.forced_last if step == self.max_new_tokens - 1 else None


@dataclass(frozen=True)
class Generated:
    """What a row gave, with each token's log-probability; that of a location token counts all bins
    near it (`CoordinateBins`).

    A token without a choice has NaN, and no mean counts it: the config forces it, or a constraint
    leaves no other. Where a constraint leaves some tokens, the probability is that among those.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    #: Log-probabilities of the config's `NumberTokens` at the steps around numbers.
    numbers: Mapping[int, Sequence[float]] = field(default_factory=dict)
