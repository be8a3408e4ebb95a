"""The syntaxes in which models write boxes as text, as automata over characters.

A syntax says after each character whether the text can still become a box that the family's parser
reads, or is lost. It follows the parser exactly: marks count however they were spelt, blanks stand
where the parser lets them, and what stands outside of a box is free. `syntax_constraint` makes
token masks of it.
"""

from __future__ import annotations

import string
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

#: What stands for the whole width or height of an image.
SCALE = 1000
#: Blanks that may stand in a row within a box: a model that finds no way on must not write them
#: until its answer is cut off.
MOST_BLANKS = 64
#: What `\s` matches in ASCII.
BLANKS = " \t\n\r\f\v"
_DIGITS = frozenset(string.digits)


class BoxSyntax(Protocol):
    """A way to write boxes: an automaton with opaque states, the first of which is `start`."""

    @property
    def start(self) -> Hashable:
        """The state before the first character."""

    def step(self, state: Any, char: str) -> Any:
        """The state after one more character; None where no box can come of it any more."""

    def ends(self, state: Any) -> bool:
        """Whether an answer may end here."""

    def closed(self, state: Any) -> bool:
        """Whether a box has begun, so that only its own characters can follow."""

    def fatal(self, state: Any) -> str:
        """Where it is not closed: characters of which a text must hold one to be lost from here;
        "" where nothing is lost.
        """


class _Corners(NamedTuple):
    """The four numbers of a box, as far as they are written."""

    #: Where in the template, and the text of the number there.
    item: int = 0
    text: str = ""
    #: The first corner in units of `_Box`: the second must not lie before it.
    near: tuple[int, ...] = ()
    #: Blanks that stand last.
    blanks: int = 0

    def blank(self) -> _Corners | None:
        """The state after one more blank."""
        return self._replace(blanks=self.blanks + 1) if self.blanks < MOST_BLANKS else None


@dataclass
class _Box:
    """How four numbers are written: characters, "" where a number stands, blanks in between."""

    template: Sequence[str]
    blanks: str = BLANKS
    #: Digits before and after the point, and whether leading zeros are read.
    digits: int = 5
    decimals: int = 6
    leading_zeros: bool = True

    def __post_init__(self) -> None:
        #: Numbers are counted in the smallest that can be written.
        self._unit: int = 10**self.decimals
        self._most = SCALE * self._unit

    def step(self, state: _Corners, char: str) -> _Corners | None:
        """See `BoxSyntax`."""
        if self.complete(state):
            return self._blank(state, char)
        wanted = self.template[state.item]
        if wanted:
            if char != wanted:
                return self._blank(state, char)
            return state._replace(item=state.item + 1, blanks=0)
        low = self._low(state)
        if char in _DIGITS or (char == "." and state.text):
            text = state.text + char
            can = self._can_be(text, low)
            return state._replace(text=text, blanks=0) if can else None
        if not state.text:
            return self._blank(state, char)
        if state.text.endswith(".") or not low <= self._value(state.text) <= self._most:
            return None
        near = state.near
        if len(near) < 2:
            near = (*near, self._value(state.text))
        return self.step(_Corners(state.item + 1, "", near), char)

    def complete(self, state: _Corners) -> bool:
        """Whether all of the box is written."""
        return state.item == len(self.template)

    def _blank(self, state: _Corners, char: str) -> _Corners | None:
        return state.blank() if char in self.blanks else None

    def _value(self, text: str) -> int:
        whole, _, part = text.partition(".")
        return int(whole + part.ljust(self.decimals, "0"))

    def _low(self, state: _Corners) -> int:
        """What the number here must be at least."""
        number = self.template[: state.item].count("")
        return state.near[number - 2] if number >= 2 else 0

    def _can_be(self, text: str, low: int) -> bool:
        """Whether `text` is, or can become, a number from `low` to the end of the scale."""
        whole, point, part = text.partition(".")
        if len(whole) > self.digits or len(part) > self.decimals or "." in part:
            return False
        nought = whole[0] == "0"
        if nought and len(whole) > 1 and not self.leading_zeros:
            return False
        if point:
            least = self._value(text)
            step: int = 10 ** (self.decimals - len(part))
            return least <= self._most and least + step > low
        # With more digits before the point it begins at ten times the number, and so on.
        least, end = int(whole) * self._unit, (int(whole) + 1) * self._unit
        for _ in range(self.digits - len(whole) + 1):
            if least > self._most:
                return False
            if end > low:
                return True
            if nought and not self.leading_zeros:
                return False
            least, end = least * 10, end * 10
        return False


class _Tail:
    """Finds marks in a text by how it ends."""

    def __init__(self, *marks: str) -> None:
        self.marks = frozenset(marks)
        self._begun = frozenset(mark[:n] for mark in marks for n in range(1, len(mark)))

    def step(self, tail: str, char: str) -> str:
        """The longest end of the text that is a mark, or the beginning of one."""
        tail += char
        while tail and tail not in self.marks and tail not in self._begun:
            tail = tail[1:]
        return tail


class _At(NamedTuple):
    """A state of the syntaxes with marks."""

    #: free; box (of `TokenBoxes`); inside a pair of marks, open (after a bracket), list.
    where: str
    #: The beginning of a mark that stands last.
    tail: str = ""
    box: _Corners = _Corners()
    #: Whether this pair of marks has a list of numbers already.
    some: bool = False


class TokenBoxes:
    """Qwen2-VL's: ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``. The last mark may be left out where
    the answer ends, or another mark follows.
    """

    start = _At("free")
    _box = _Box(("(", "", ",", "", ")", ",", "(", "", ",", "", ")"))
    _opening = _Tail("<|box_start|>")
    _closing = _Tail("<|box_", "<|object_ref_")

    def step(self, state: _At, char: str) -> _At | None:
        """See `BoxSyntax`."""
        if state.where == "free":
            tail = self._opening.step(state.tail, char)
            return _At("box") if tail in self._opening.marks else _At("free", tail)
        if state.tail or (char == "<" and self._box.complete(state.box)):
            tail = self._closing.step(state.tail, char)
            if tail != state.tail + char:
                return None
            if tail in self._closing.marks:
                return _At("free", tail if self._opening.step(tail[:-1], tail[-1]) else "")
            return state._replace(tail=tail)
        box = self._box.step(state.box, char)
        return None if box is None else state._replace(box=box)

    def ends(self, state: _At) -> bool:
        """See `BoxSyntax`."""
        return state.where == "free" or (self._box.complete(state.box) and not state.tail)

    def closed(self, state: _At) -> bool:
        """See `BoxSyntax`."""
        return state.where == "box"

    def fatal(self, state: _At) -> str:
        """See `BoxSyntax`."""
        return ">" if state.tail else ""


class ListBoxes:
    """InternVL2's: ``<box>[[x1, y1, x2, y2], ...]</box>``. Between its marks every list that holds
    no list is a box, and there is one at least; other text may stand between the lists.
    """

    start = _At("free")
    _box = _Box(("", ",", "", ",", "", ",", "", "]"))
    _opening = _Tail("<box>")
    _marks = _Tail("<box>", "</box>", "<ref>", "</ref>")

    def step(self, state: _At, char: str) -> _At | None:
        """See `BoxSyntax`."""
        if state.where == "free":
            tail = self._opening.step(state.tail, char)
            return _At("inside") if tail in self._opening.marks else _At("free", tail)
        if state.where == "inside":
            if char == "[":
                return _At("open", some=state.some)
            tail = self._marks.step(state.tail, char)
            if tail not in self._marks.marks:
                return state._replace(tail=tail)
            if not state.some:
                return None
            return _At("inside" if tail == "<box>" else "free")
        if state.where == "open":
            if char == "[":
                return state._replace(box=_Corners())
            if char in BLANKS:
                box = state.box.blank()
                return None if box is None else state._replace(box=box)
            state = state._replace(where="list")
        box = self._box.step(state.box, char)
        if box is None:
            return None
        return _At("inside", some=True) if self._box.complete(box) else state._replace(box=box)

    def ends(self, state: _At) -> bool:
        """See `BoxSyntax`."""
        return state.where == "free" or (state.where == "inside" and state.some)

    def closed(self, state: _At) -> bool:
        """See `BoxSyntax`."""
        return state.where in ("open", "list")

    def fatal(self, state: _At) -> str:
        """See `BoxSyntax`."""
        return "[>" if state.where == "inside" or state.tail else ""


_KEY = "bbox_2d"
_BLANKS = " \t\n\r"
#: Digits after the point that a number of a box may have: floats keep the order of such numbers.
JSON_PLACES = 12
_HEX = frozenset(string.hexdigits)
#: What cannot stand in a string as it is.
_CONTROL = "".join(map(chr, range(32)))
#: What Python's parser takes for a value, less strings, numbers, lists and objects.
_WORDS = {"t": "true", "f": "false", "n": "null", "N": "NaN", "I": "Infinity"}
#: Where each kind of character leads within a number; it may end in a state of _WHOLE.
_NUMBER = {
    "sign": {"0": "nought", "1": "whole"},
    "nought": {".": "point", "e": "power"},
    "whole": {"0": "whole", "1": "whole", ".": "point", "e": "power"},
    "point": {"0": "part", "1": "part"},
    "part": {"0": "part", "1": "part", "e": "power"},
    "power": {"+": "signed", "0": "powers", "1": "powers"},
    "signed": {"0": "powers", "1": "powers"},
    "powers": {"0": "powers", "1": "powers"},
}
_WHOLE = frozenset({"nought", "whole", "part", "powers"})


class _In(NamedTuple):
    """A state of `JsonBoxes`."""

    #: free; name (after a brace), more (after a comma: another name), key, colon, first (after a
    #: bracket: a value or its end), value, string, word, after a value; those of `_NUMBER`; of a
    #: box's value: box (before it), list (after its first bracket), corners, between, next.
    where: str
    #: The brackets that are open, from the outermost on.
    stack: str = ""
    #: Of a key: what was read of it while it can be the one of boxes, else None.
    key: str | None = None
    #: Of a string: 5 after a backslash, 4 to 1 digits of an escape to come.
    escape: int = 0
    #: Of a word: its rest.
    rest: str = ""
    #: Of a box's value: whether it is a list of boxes.
    several: bool = False
    corners: _Corners = _Corners()


class JsonBoxes:
    """Qwen3-VL's: ``{"bbox_2d": [x1, y1, x2, y2], "label": ...}``, in lists and other objects.

    What begins with a brace is an object of JSON, whole before the answer ends. In it the value of
    the key is four numbers, or a list of such, wherever the object stands. Numbers of a box are
    decimals without sign and exponent. Text outside of objects is free, and so are other keys,
    values, and what a string says. (Of a key that comes twice the parser takes the last value, and
    it reads no object within one that has a box; here all of them are bound.)
    """

    start = _In("free")
    _box = _Box(
        ("", ",", "", ",", "", ",", "", "]"),
        blanks=_BLANKS, digits=4, decimals=JSON_PLACES, leading_zeros=False,
    )  # fmt: skip
    _BOXED = frozenset({"box", "list", "corners", "between", "next"})

    def step(self, state: _In, char: str) -> _In | None:
        """See `BoxSyntax`."""
        where, stack = state.where, state.stack
        if where in self._BOXED:
            return self._in_box(state, char)
        if where == "free":
            return _In("name", "{") if char == "{" else state
        if where in ("string", "key"):
            return self._in_string(state, char)
        if where == "word":
            return _word(stack, state.rest[1:]) if char == state.rest[0] else None
        if where in _NUMBER:
            return self._in_number(state, char)
        if char in _BLANKS:
            return state
        if where in ("name", "more"):
            if char == '"':
                return _In("key", stack, key="")
            return _closed(stack) if char == "}" and where == "name" else None
        if where == "colon":
            found = _In("box" if state.key is not None else "value", stack)
            return found if char == ":" else None
        if where in ("first", "value"):
            if char == "]" and where == "first":
                return _closed(stack)
            return self._value(stack, char)
        if char == ",":
            return _In("more" if stack[-1] == "{" else "value", stack)
        return _closed(stack) if char == {"{": "}", "[": "]"}[stack[-1]] else None

    def ends(self, state: _In) -> bool:
        """See `BoxSyntax`."""
        return state.where == "free"

    def closed(self, state: _In) -> bool:
        """See `BoxSyntax`."""
        return state.where not in ("free", "string", "key") or state.escape > 0

    def fatal(self, state: _In) -> str:
        """See `BoxSyntax`."""
        return "" if state.where == "free" else f'"\\{_CONTROL}'

    def _in_box(self, state: _In, char: str) -> _In | None:
        where, stack = state.where, state.stack
        if where != "corners" and char in _BLANKS:
            corners = state.corners.blank()
            return None if corners is None else state._replace(corners=corners)
        if where == "corners" or (where == "list" and char != "["):
            corners = self._box.step(state.corners, char)
            if corners is None:
                return None
            if not self._box.complete(corners):
                return state._replace(where="corners", corners=corners)
            return _In("between" if state.several else "after", stack)
        if where == "list":
            several = state._replace(several=True, corners=_Corners())
            return None if state.several else several
        if where == "box":
            return _In("list", stack) if char == "[" else None
        if where == "next":
            return _In("list", stack, several=True) if char == "[" else None
        if char == ",":
            return _In("next", stack)
        return _In("after", stack) if char == "]" else None

    def _in_string(self, state: _In, char: str) -> _In | None:
        if state.escape == 5:
            if char == "u":
                return state._replace(escape=4)
            return state._replace(escape=0) if char in '"\\/bfnrt' else None
        if state.escape:
            return state._replace(escape=state.escape - 1) if char in _HEX else None
        if char < " ":
            return None
        if char == '"':
            if state.where == "string":
                return _In("after", state.stack)
            return _In("colon", state.stack, key=state.key if state.key == _KEY else None)
        if char == "\\":
            return state._replace(escape=5, key=None)
        if state.key is not None:
            key = state.key + char
            return state._replace(key=key if _KEY.startswith(key) else None)
        return state

    def _in_number(self, state: _In, char: str) -> _In | None:
        if state.where == "sign" and char == "I":
            return _word(state.stack, "nfinity")
        kind = "1" if char in _DIGITS and char != "0" else {"E": "e", "-": "+"}.get(char, char)
        further = _NUMBER[state.where].get(kind)
        if further is not None:
            return state._replace(where=further)
        return self.step(_In("after", state.stack), char) if state.where in _WHOLE else None

    def _value(self, stack: str, char: str) -> _In | None:
        if char in '"{[':
            opened = {'"': "string", "{": "name", "[": "first"}
            return _In(opened[char], stack if char == '"' else stack + char)
        if char in _WORDS:
            return _word(stack, _WORDS[char][1:])
        if char == "-":
            return _In("sign", stack)
        number = "nought" if char == "0" else "whole"
        return _In(number, stack) if char in _DIGITS else None


def _word(stack: str, rest: str) -> _In:
    return _In("word", stack, rest=rest) if rest else _In("after", stack)


def _closed(stack: str) -> _In:
    """The state after the bracket that closes the innermost one."""
    return _In("after", stack[:-1]) if len(stack) > 1 else _In("free")
