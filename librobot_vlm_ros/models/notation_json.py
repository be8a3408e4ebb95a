"""Boxes in JSON, read one character at a time: see `notation`."""

from __future__ import annotations

import string
from typing import NamedTuple

from librobot_vlm_ros.models.notation import Box, Corners

__all__ = ["JSON_PLACES", "JsonBoxes"]

_KEY = "bbox_2d"
_BLANKS = " \t\n\r"
#: Digits behind the point that a number of a box may have: floats keep the order of such numbers.
JSON_PLACES = 12
_DIGITS, _HEX = frozenset(string.digits), frozenset(string.hexdigits)
#: What cannot stand in a string as it is.
_CONTROL = "".join(map(chr, range(32)))
#: What Python's parser takes for a value, less strings, numbers, lists and objects.
_WORDS = {"t": "true", "f": "false", "n": "null", "N": "NaN", "I": "Infinity"}
#: Where a number is to where each kind of character leads; those in _WHOLE may be its end.
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
    """A place in a text; `stack` holds the brackets that are open, from the outermost on.

    `where`: free; name (behind a brace), more (behind a comma: another name), key, colon, first
    (behind a bracket: a value or its end), value, string, word, after a value; a number's places;
    of a box's value: box (before it), list (behind its first bracket), corners, between, next.
    """

    where: str
    stack: str = ""
    #: Of a key: what was read of it while it can be the one of boxes, else None.
    key: str | None = None
    #: Of a string: 5 behind a backslash, 4 to 1 digits of an escape to come.
    escape: int = 0
    #: Of a word: its rest.
    rest: str = ""
    #: Of a box's value: whether it is a list of boxes.
    several: bool = False
    corners: Corners = Corners()


class JsonBoxes:
    """Qwen3-VL's: ``{"bbox_2d": [x1, y1, x2, y2], "label": ...}``, in lists and other objects.

    What begins with a brace is an object of JSON, whole before the answer ends. In it the value of
    the key is four numbers, or a list of such, wherever the object stands. Numbers of a box are
    decimals without sign and exponent. Text outside of objects is free, and so are other keys,
    values, and what a string says. (Of a key that comes twice the parser takes the last value, and
    it reads no object within one that has a box; here all of them are bound.)
    """

    start = _In("free")
    _box = Box(
        ("", ",", "", ",", "", ",", "", "]"),
        blanks=_BLANKS, whole=4, places=JSON_PLACES, zeros=False,
    )  # fmt: skip
    _BOXED = frozenset({"box", "list", "corners", "between", "next"})

    def step(self, state: _In, char: str) -> _In | None:
        """See `Notation`."""
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
        """See `Notation`."""
        return state.where == "free"

    def closed(self, state: _In) -> bool:
        """See `Notation`."""
        return state.where not in ("free", "string", "key") or state.escape > 0

    def fatal(self, state: _In) -> str:
        """See `Notation`."""
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
            if corners.item < len(self._box.template):
                return state._replace(where="corners", corners=corners)
            return _In("between" if state.several else "after", stack)
        if where == "list":
            several = state._replace(several=True, corners=Corners())
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
    """Behind the bracket that closes the innermost one."""
    return _In("after", stack[:-1]) if len(stack) > 1 else _In("free")
