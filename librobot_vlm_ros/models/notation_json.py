"""Boxes in JSON, read one character at a time: see `notation`."""

from __future__ import annotations

from typing import NamedTuple

from librobot_vlm_ros.models.notation import Box, Corners

__all__ = ["JSON_PLACES", "JsonBoxes"]

_KEY = "bbox_2d"
_BLANKS = " \t\n\r"
#: Digits behind the point that a number may have: floats keep the order of such numbers.
JSON_PLACES = 12


class _In(NamedTuple):
    """A place in a text; `stack` holds the brackets that are open, from the outermost on.

    `where`: free, name (of a key, before or at its end), key, colon, value, string, scalar, after;
    of a box's value: box (before it), list (behind its first bracket), corners, between, next,
    behind (the value, where only a comma or a brace can follow).
    """

    where: str
    stack: str = ""
    #: Of a key: what was read of it while it can be the one of boxes, else None.
    key: str | None = None
    #: Of a string: whether a backslash stands last.
    escaped: bool = False
    #: Of a box's value: whether it is a list of boxes.
    several: bool = False
    corners: Corners = Corners()


class JsonBoxes:
    """Qwen3-VL's: ``{"bbox_2d": [x1, y1, x2, y2], "label": ...}``, in lists and other objects.

    In an object the value of the key is four numbers, or a list of such, wherever the object
    stands. Numbers are decimals without sign and exponent. All else is free, also to be no JSON:
    then what follows is read from the next brace on.
    """

    start = _In("free")
    _box = Box(
        ("", ",", "", ",", "", ",", "", "]"),
        blanks=_BLANKS, whole=4, places=JSON_PLACES, zeros=False,
    )  # fmt: skip
    _BOXED = frozenset({"box", "list", "corners", "between", "next", "behind"})

    def step(self, state: _In, char: str) -> _In | None:
        """See `Notation`."""
        if state.where in self._BOXED:
            return self._in_box(state, char)
        found = self._outside(state, char)
        if found is not None:
            return found
        return _In("name", "{") if char == "{" else self.start  # no JSON: begin anew

    def ends(self, state: _In) -> bool:
        """See `Notation`. An object that is cut off is no box, and nothing is in the way of it."""
        return state.where not in self._BOXED

    def closed(self, state: _In) -> bool:
        """See `Notation`."""
        return state.where in self._BOXED

    def fatal(self, state: _In) -> str:
        """See `Notation`."""
        return ":" if state.key is not None else ""

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
            return _In("between" if state.several else "behind", stack)
        if where == "list":
            return None if state.several else state._replace(several=True, corners=Corners())
        if where == "box":
            return _In("list", stack) if char == "[" else None
        if where == "next":
            return _In("list", stack, several=True) if char == "[" else None
        if where == "behind":
            return self._outside(_In("after", stack), char) if char in ",}" else None
        if char == ",":
            return _In("next", stack)
        return _In("behind", stack) if char == "]" else None

    def _outside(self, state: _In, char: str) -> _In | None:
        """The next state; None where it is no JSON."""
        where, stack = state.where, state.stack
        if where == "free":
            return _In("name", "{") if char == "{" else state
        if where in ("string", "key"):
            return self._in_string(state, char)
        if char in _BLANKS:
            return state if where != "scalar" else _In("after", stack)
        if where == "name":
            if char == '"':
                return _In("key", stack, key="")
            return _closed(stack) if char == "}" else None
        if where == "colon":
            if char != ":":
                return None
            return _In("box" if state.key is not None else "value", stack)
        if where == "value":
            return self._value(stack, char)
        if where == "scalar" and (char.isalnum() or char in "+-."):
            return state
        if char == ",":
            return _In("name" if stack[-1] == "{" else "value", stack)
        return _closed(stack) if char == {"{": "}", "[": "]"}[stack[-1]] else None

    def _in_string(self, state: _In, char: str) -> _In | None:
        if state.escaped:
            return state._replace(escaped=False)
        if char < " ":
            return None
        if char == '"':
            if state.where == "string":
                return _In("after", state.stack)
            return _In("colon", state.stack, key=state.key if state.key == _KEY else None)
        if char == "\\":
            return state._replace(escaped=True, key=None)
        if state.key is not None:
            key = state.key + char
            return state._replace(key=key if _KEY.startswith(key) else None)
        return state

    def _value(self, stack: str, char: str) -> _In | None:
        if char == '"':
            return _In("string", stack)
        if char == "{":
            return _In("name", stack + char)
        if char == "[":
            return _In("value", stack + char)
        if char == "]":
            return _closed(stack) if stack[-1] == "[" else None
        return _In("scalar", stack) if char.isalnum() or char == "-" else None


def _closed(stack: str) -> _In:
    """Behind the bracket that closes the innermost one."""
    return _In("after", stack[:-1]) if len(stack) > 1 else _In("free")
