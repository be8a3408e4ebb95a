"""Token masks of a syntax over characters, whatever a tokenizer makes of the text.

A token may follow where its text leads from the syntax's state to one that is not lost: digits
alone or several at once, and punctuation in any of its mergers. The tokens that may follow a state
are worked out when it is first met and kept with the tokenizer. Inside of a box no control token
can follow but those that the syntax writes, and an answer ends where its parser lets it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from librobot_vlm_ros.models.generation.config import AllExcept, TokenSet
from librobot_vlm_ros.models.generation.constraints.box_syntax import BLANKS, BoxSyntax
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer

#: States whose tokens are kept at most.
_KEPT = 512
#: How vocabularies write blanks and control characters.
_SPELT = str.maketrans({"▁": " ", **{chr(256 + byte): chr(byte) for byte in range(33)}})
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: What a token begins with, blanks left out, that may follow within a box; and words that may.
_BOUND = frozenset('0123456789()[]{},.:"<-')
_BOUND_WORDS = ("true", "false", "null", "NaN", "Infinity")


class SyntaxConstraint:
    """A `TokenConstraint` for one answer."""

    def __init__(self, tokens: SyntaxTokens) -> None:
        self._tokens = tokens
        #: States after the beginnings that were asked for last.
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
    """A constraint for one answer; what it knows of the tokens is kept with the tokenizer.

    `eos`: tokens that end an answer.
    """
    key = (type(syntax), tuple(eos))
    if key not in tokenizer.constraint_cache:
        tokenizer.constraint_cache[key] = SyntaxTokens(tokenizer, syntax, eos)
    return SyntaxConstraint(tokenizer.constraint_cache[key])


class _Node:
    """Of a tree of texts: tokens whose text ends here, and those that go on."""

    __slots__ = ("children", "tokens")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.tokens: list[int] = []


class SyntaxTokens:
    """Which tokens of one vocabulary a syntax lets follow each of its states."""

    def __init__(self, tokenizer: CausalTokenizer, syntax: BoxSyntax, eos: Sequence[int]) -> None:
        self.syntax = syntax
        self._tokenizer, self._eos = tokenizer, tuple(sorted(eos))
        self._anchor = tokenizer.words("0")
        self._before = tokenizer.decode(self._anchor)
        self._texts: dict[int, str] = {}
        self._allowed: dict[Any, TokenSet] = {}
        self._spelt = {token: _spelt(piece) for piece, token in tokenizer.vocabulary.items()}
        #: Tokens by their first character, until their texts are put into the tree.
        self._first: dict[str, list[int]] = {}
        for token, spelt in self._spelt.items():
            # Words after a blank are many, and none may follow in a box; nor do other scripts.
            bound = spelt[:1] not in BLANKS or _may_be_bound(spelt.lstrip(BLANKS))
            if spelt and spelt[0].isascii() and bound:
                self._first.setdefault(spelt[0], []).append(token)
        self._root = _Node()
        self._with: dict[str, list[int]] = {}

    def text(self, token: int) -> str:
        """What the token adds to a text; "" for begin, end and pad."""
        if token not in self._texts:
            if token in self._tokenizer.control_ids:
                self._texts[token] = self._tokenizer.decode([token])
            else:
                # Alone, a word would lose the blank before it.
                text = self._tokenizer.decode([*self._anchor, token])
                self._texts[token] = text[len(self._before) :]
        return self._texts[token]

    def after(self, state: Any, token: int) -> Any:
        """The state after the token; None where it is lost."""
        for char in self.text(token):
            if state is None:
                break
            state = self.syntax.step(state, char)
        return state

    def allowed(self, state: Any) -> TokenSet:
        """The tokens that may follow a state; all where it is lost."""
        if state is None:
            return None
        if state not in self._allowed:
            if len(self._allowed) >= _KEPT:
                self._allowed.clear()
            inside = self.syntax.closed(state)
            self._allowed[state] = self._inside(state) if inside else self._outside(state)
        return self._allowed[state]

    def _outside(self, state: Any) -> TokenSet:
        """All but the tokens after which the text is lost."""
        barred = set() if self.syntax.ends(state) else set(self._eos)
        for token in self._having(self.syntax.fatal(state)):
            if self.after(state, token) is None:
                barred.add(token)
        return AllExcept(tuple(sorted(barred))) if barred else None

    def _inside(self, state: Any) -> TokenSet:
        """The tokens that keep to the box, by walking the tree of texts along with the syntax."""
        found = list(self._eos) if self.syntax.ends(state) else []
        for char in [c for c in self._first if self.syntax.step(state, c) is not None]:
            for token in self._first.pop(char):
                self._plant(token)
        left = [(self._root, state)]
        while left:
            node, here = left.pop()
            for char, child in node.children.items():
                after = self.syntax.step(here, char)
                if after is not None:
                    found += child.tokens
                    left.append((child, after))
        # A tokenizer without the syntax's characters cannot write it.
        return tuple(sorted(found)) or None

    def _plant(self, token: int) -> None:
        text, node = self.text(token), self._root
        for char in text:
            node = node.children.setdefault(char, _Node())
        if text and token not in self._eos:
            node.tokens.append(token)

    def _having(self, chars: str) -> list[int]:
        """Tokens that hold one of these characters."""
        if chars not in self._with:
            wanted = frozenset(chars)
            self._with[chars] = [t for t, s in self._spelt.items() if not wanted.isdisjoint(s)]
        return self._with[chars]


def _may_be_bound(text: str) -> bool:
    """Whether a text, without blanks in front, may follow within a box."""
    if not text or text[0] in _BOUND:
        return True
    return any(word.startswith(text) or text.startswith(word) for word in _BOUND_WORDS)


def _spelt(piece: str) -> str:
    """A piece of a vocabulary as text, near enough to look for characters in it."""
    byte = _BYTE.fullmatch(piece)
    return chr(int(byte[1], 16)) if byte else piece.translate(_SPELT)
