"""Beams in a notation: whole boxes, and the published search's answer wherever it is well formed.

Hypotheses that break a grammar still shape a search: they take places among the beams and raise
what others must reach. A search that leaves them out may therefore end at another answer though
that of the free one was well formed. So the free search comes first, and only a row whose answer
breaks its grammar is searched a second time, bound to it. That costs such a row twice the time, and
the others nothing. What is told of rows with a grammar is told at the end: text is never taken
back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from librobot_vlm_ros.core import VlmError
from librobot_vlm_ros.models.beam import beam_search
from librobot_vlm_ros.models.decode import Decoder, StopRow, TellIds
from librobot_vlm_ros.models.decode_rules import DecodeRules, Generated, Grammar, permits

__all__ = ["Again", "fits", "search_in_notation"]

#: The prompts of these rows anew: a decoder and its history, as `decode` takes them.
Again = Callable[[Sequence[int]], tuple[Decoder, Tensor]]


def search_in_notation(
    decoder: Decoder,
    rules: DecodeRules,
    history: Tensor,
    grammars: Sequence[Grammar | None],
    again: Again,
    *,
    stop: StopRow,
    tell: TellIds | None,
) -> list[Generated | VlmError]:
    """See `decode.decode`; one grammar a row."""

    def tell_free(row: int, ids: list[int]) -> None:
        if tell is not None and grammars[row] is None:
            tell(row, ids)

    found = beam_search(
        decoder, rules, history, stop=stop, tell=tell_free if tell is not None else None
    )
    bound = {
        row: grammar
        for row, (grammar, answer) in enumerate(zip(grammars, found, strict=True))
        if grammar is not None and isinstance(answer, Generated)
    }
    broken = [row for row, grammar in bound.items() if not fits(grammar, found[row], rules)]
    if broken:
        second, past = again(broken)
        answers = beam_search(
            second,
            rules,
            past,
            stop=lambda place: stop(broken[place]),
            tell=None,
            grammars=[grammars[row] for row in broken],
        )
        for row, answer in zip(broken, answers, strict=True):
            found[row] = answer
    for row in bound:
        answer = found[row]
        if tell is not None and isinstance(answer, Generated) and answer.ids:
            tell(row, list(answer.ids))
    return found


def fits(grammar: Grammar, answer: Generated | VlmError, rules: DecodeRules) -> bool:
    """Whether an answer keeps to its grammar; tokens that the rules force are not its own."""
    assert isinstance(answer, Generated)
    ids = answer.ids
    return all(
        rules.forced(place) == token or permits(grammar.allowed(ids[:place]), token)
        for place, token in enumerate(ids)
    )
