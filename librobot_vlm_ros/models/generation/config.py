"""How tokens are chosen, as data: rules, scales, grammars, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "AllExcept",
    "CoordinateBins",
    "Generated",
    "GenerationConfig",
    "TokenConstraint",
    "TokenSet",
    "permits",
]


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
    """Tokens `first` to `first + count - 1`: marks in order, neighbours mean nearly the same.

    What is asked of such a token is not whether it is this very mark but whether it is about right:
    its probability is that of all marks at most `radius` away. (The mass of a sharp but smooth
    answer lies on several marks, so that a single one of them never has much.)
    """

    first: int
    count: int
    radius: int


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
    #: Tokens that are marks on a scale, such as locations.
    scale: CoordinateBins | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False

    def forced(self, step: int) -> int | None:
        """The token that must stand at place `step`, counted from 0."""
        if step == 0 and self.forced_first is not None:
            return self.forced_first
        return self.forced_last if step == self.max_new_tokens - 1 else None


@dataclass(frozen=True)
class Generated:
    """What a row gave, with each token's log-probability; marks on a scale as `near` counts them.

    A token that the rules force has NaN: the model did not choose it, and no mean counts it. Where
    a grammar allowed some tokens only, the probability is that among those: 0.0 of the only one,
    which a mean counts as certain. In a well-formed answer it is: what the notation decides has a
    probability near 1 without a grammar, too.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
