"""A notation over characters as a grammar over tokens, whatever a tokenizer makes of the text.

A token may follow where its text leads from the notation's state to one that is not lost: digits
alone or several at once, and punctuation in any of its mergers. What may follow a state is worked
out when it is first met and kept with the tokenizer. Inside of a box no control token can follow
but those that the notation writes, and an answer ends where its parser lets it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from librobot_vlm_ros.models.generation.config import AllExcept, TokenSet
from librobot_vlm_ros.models.generation.constraints.box_syntax import BLANKS, BoxSyntax
from librobot_vlm_ros.models.tokenizer import CausalTokenizer

__all__ = ["SyntaxConstraint", "SyntaxTokens", "syntax_constraint"]

#: States whose tokens are kept at most.
_KEPT = 512
#: How vocabularies write blanks and control characters.
_SPELT = str.maketrans({"▁": " ", **{chr(256 + byte): chr(byte) for byte in range(33)}})
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: What stands first where a notation binds, blanks left out, and words that do.
_BOUND = frozenset('0123456789()[]{},.:"<-')
_BOUND_WORDS = ("true", "false", "null", "NaN", "Infinity")


class _Node:
    """Tokens whose text begins alike."""

    __slots__ = ("children", "tokens")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.tokens: list[int] = []


class SyntaxTokens:
    """What a notation lets follow, in the tokens of one vocabulary.

    `eos`: tokens that end an answer.
    """

    def __init__(self, tokenizer: CausalTokenizer, syntax: BoxSyntax, eos: Sequence[int]) -> None:
        self.syntax = syntax
        self._tokenizer, self._eos = tokenizer, tuple(sorted(eos))
        self._anchor = tokenizer.words("0")
        self._before = tokenizer.decode(self._anchor)
        self._texts: dict[int, str] = {}
        self._allowed: dict[Any, TokenSet] = {}
        self._spelt = {token: _spelt(piece) for piece, token in tokenizer.vocabulary.items()}
        #: Tokens by their first character, until their texts are planted.
        self._first: dict[str, list[int]] = {}
        for token, spelt in self._spelt.items():
            # Words behind a blank are many, and none where a notation binds; nor are other scripts.
            bound = spelt[:1] not in BLANKS or _may_be_bound(spelt.lstrip(BLANKS))
            if spelt and spelt[0].isascii() and bound:
                self._first.setdefault(spelt[0], []).append(token)
        self._root = _Node()
        self._with: dict[str, list[int]] = {}

    def text(self, token: int) -> str:
        """What the token adds to a text; "" for begin, end and pad."""
        text = self._texts.get(token)
        if text is None:
            if token in self._tokenizer.control_ids:
                text = self._tokenizer.decode([token])
            else:
                # Alone, a word would lose the blank before it.
                text = self._tokenizer.decode([*self._anchor, token])[len(self._before) :]
            self._texts[token] = text
        return text

    def after(self, state: Any, token: int) -> Any:
        """The state behind the token; None where it is lost."""
        return self._walk(state, self.text(token))

    def allowed(self, state: Any) -> TokenSet:
        """See `TokenConstraint`. All may follow a state that is lost."""
        if state is None:
            return None
        if state not in self._allowed:
            if len(self._allowed) >= _KEPT:
                self._allowed.clear()
            self._allowed[state] = self._find(state)
        return self._allowed[state]

    def _plant(self, token: int) -> None:
        text, node = self.text(token), self._root
        for char in text:
            node = node.children.setdefault(char, _Node())
        if text and token not in self._eos:
            node.tokens.append(token)

    def _walk(self, state: Any, text: str) -> Any:
        for char in text:
            if state is None:
                return None
            state = self.syntax.step(state, char)
        return state

    def _find(self, state: Any) -> TokenSet:
        ends = self.syntax.ends(state)
        if not self.syntax.closed(state):
            barred = [] if ends else list(self._eos)
            for token in self._having(self.syntax.fatal(state)):
                if self._walk(state, self.text(token)) is None:
                    barred.append(token)
            return AllExcept(tuple(sorted({*barred}))) if barred else None
        found = list(self._eos) if ends else []
        for char in [c for c in self._first if self.syntax.step(state, c) is not None]:
            for token in self._first.pop(char):
                self._plant(token)
        left = [(self._root, state)]
        while left:
            node, at = left.pop()
            for char, child in node.children.items():
                behind = self.syntax.step(at, char)
                if behind is not None:
                    found += child.tokens
                    left.append((child, behind))
        # A tokenizer without the notation's characters cannot write it.
        return tuple(sorted(found)) or None

    def _having(self, chars: str) -> list[int]:
        """Tokens that hold one of these characters."""
        if chars not in self._with:
            wanted = frozenset(chars)
            self._with[chars] = [t for t, s in self._spelt.items() if not wanted.isdisjoint(s)]
        return self._with[chars]


class SyntaxConstraint:
    """A `TokenConstraint` for one answer."""

    def __init__(self, tokens: SyntaxTokens) -> None:
        self._tokens = tokens
        #: States behind the beginnings that were asked for last.
        self._known: dict[tuple[int, ...], Any] = {(): tokens.syntax.start}

    def allowed(self, ids: Sequence[int]) -> TokenSet:
        """See `TokenConstraint`."""
        return self._tokens.allowed(self._state(tuple(ids)))

    def _state(self, ids: tuple[int, ...]) -> Any:
        if ids not in self._known:
            known = len(ids) - 1
            while ids[:known] not in self._known:
                known -= 1
            state = self._known[ids[:known]]
            if len(self._known) > 64:  # the beams of a search and where they came from
                self._known = {(): self._tokens.syntax.start}
            for token in ids[known:]:
                state = None if state is None else self._tokens.after(state, token)
            self._known[ids] = state
        return self._known[ids]


def syntax_constraint(
    tokenizer: CausalTokenizer, syntax: BoxSyntax, eos: Sequence[int]
) -> SyntaxConstraint:
    """A grammar for one answer; what it knows of the tokens is kept with the tokenizer."""
    key = (type(syntax), tuple(eos))
    if key not in tokenizer.notations:
        tokenizer.notations[key] = SyntaxTokens(tokenizer, syntax, eos)
    return SyntaxConstraint(tokenizer.notations[key])


def _may_be_bound(text: str) -> bool:
    """Whether a text may follow where a notation binds; `text` has no blanks in front."""
    if not text or text[0] in _BOUND:
        return True
    return any(word.startswith(text) or text.startswith(word) for word in _BOUND_WORDS)


def _spelt(piece: str) -> str:
    """A piece of a vocabulary as text, near enough to look for characters in it."""
    byte = _BYTE.fullmatch(piece)
    return chr(int(byte[1], 16)) if byte else piece.translate(_SPELT)
