"""Boxes that are written as text, read one character at a time.

A notation says after each character whether what has been written can still become a box that the
family's parser reads, or is lost. It follows the parser exactly: marks count however they were
spelt, blanks stand where the parser lets them, and what stands outside of a box is free.
`notation_grammar` makes a grammar over tokens of it.
"""

from __future__ import annotations

import string
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from librobot_vlm_ros.models.boxes import MOST_BLANKS, SCALE

__all__ = ["BLANKS", "Corners", "ListBoxes", "Notation", "Tail", "TokenBoxes"]

#: What `\s` matches in ASCII.
BLANKS = " \t\n\r\f\v"
_DIGITS = frozenset(string.digits)


class Notation(Protocol):
    """A way to write boxes. States are opaque; the first is `start`."""

    start: Hashable

    def step(self, state: Any, char: str) -> Any:
        """The state behind one more character; None where no box can come of it any more."""

    def ends(self, state: Any) -> bool:
        """Whether an answer may end here."""

    def closed(self, state: Any) -> bool:
        """Whether a box has begun, so that only its own characters can follow."""

    def fatal(self, state: Any) -> str:
        """Where it is not closed: characters of which a text must hold one to be lost from here;
        "" where nothing is lost.
        """


class Corners(NamedTuple):
    """Four numbers on their way. `item`: place in the template; `text`: of the number there."""

    item: int = 0
    text: str = ""
    #: The first corner in `Box`'s unit, as far as it is written: the second must not lie before it.
    near: tuple[int, ...] = ()
    #: Blanks that stand last.
    blanks: int = 0

    def blank(self) -> Corners | None:
        """The state behind one blank more."""
        return self._replace(blanks=self.blanks + 1) if self.blanks < MOST_BLANKS else None


@dataclass
class Box:
    """How four numbers are written: characters, and "" where a number stands; blanks between."""

    template: Sequence[str]
    blanks: str = BLANKS
    #: Digits before and behind the point, and whether the first may be a 0 that adds nothing.
    whole: int = 5
    places: int = 6
    zeros: bool = True

    def __post_init__(self) -> None:
        #: Numbers are counted in the smallest that can be written.
        self._unit = 10**self.places
        self._most = SCALE * self._unit

    def step(self, state: Corners, char: str) -> Corners | None:
        """See `Notation`. A state whose item is `len(template)` is a whole box."""
        if state.item == len(self.template):
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
        return self.step(Corners(state.item + 1, "", near), char)

    def _blank(self, state: Corners, char: str) -> Corners | None:
        return state.blank() if char in self.blanks else None

    def _value(self, text: str) -> int:
        whole, _, part = text.partition(".")
        return int(whole + part.ljust(self.places, "0"))

    def _low(self, state: Corners) -> int:
        """What the number here must be at least."""
        number = self.template[: state.item].count("")
        return state.near[number - 2] if number >= 2 else 0

    def _can_be(self, text: str, low: int) -> bool:
        """Whether `text` is, or can become, a number from `low` to the end of the scale."""
        whole, point, part = text.partition(".")
        if len(whole) > self.whole or len(part) > self.places or "." in part:
            return False
        nought = whole[0] == "0"
        if nought and len(whole) > 1 and not self.zeros:
            return False
        if point:
            least = self._value(text)
            return least <= self._most and least + 10 ** (self.places - len(part)) > low
        # With more digits before the point it begins at ten times the number, and so on.
        least, end = int(whole) * self._unit, (int(whole) + 1) * self._unit
        for _ in range(self.whole - len(whole) + 1):
            if least > self._most:
                return False
            if end > low:
                return True
            if nought and not self.zeros:
                return False
            least, end = least * 10, end * 10
        return False


class Tail:
    """Finds marks in a text by what stands at its end."""

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
    """A state: where, with what else is known."""

    where: str
    tail: str = ""
    box: Corners = Corners()
    #: How many lists of numbers there were in this pair of marks: 0, or 1 for some.
    some: int = 0


class TokenBoxes:
    """Qwen2-VL's: ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``. The last mark may be left out where
    the answer ends, or another mark follows.
    """

    start = _At("free")
    _box = Box(("(", "", ",", "", ")", ",", "(", "", ",", "", ")"))
    _opening = Tail("<|box_start|>")
    _closing = Tail("<|box_", "<|object_ref_")

    def step(self, state: _At, char: str) -> _At | None:
        """See `Notation`."""
        if state.where == "free":
            tail = self._opening.step(state.tail, char)
            return _At("box") if tail in self._opening.marks else _At("free", tail)
        if state.tail or (char == "<" and self._whole(state)):
            tail = self._closing.step(state.tail, char)
            if tail != state.tail + char:
                return None
            if tail in self._closing.marks:
                return _At("free", tail if self._opening.step(tail[:-1], tail[-1]) else "")
            return state._replace(tail=tail)
        box = self._box.step(state.box, char)
        return None if box is None else state._replace(box=box)

    def _whole(self, state: _At) -> bool:
        return state.box.item == len(self._box.template)

    def ends(self, state: _At) -> bool:
        """See `Notation`."""
        return state.where == "free" or (self._whole(state) and not state.tail)

    def closed(self, state: _At) -> bool:
        """See `Notation`."""
        return state.where == "box"

    def fatal(self, state: _At) -> str:
        """See `Notation`."""
        return ">" if state.tail else ""


class ListBoxes:
    """InternVL2's: ``<box>[[x1, y1, x2, y2], ...]</box>``. Between its marks every list that holds
    no list is a box, and there is one at least; other text may stand between the lists.
    """

    start = _At("free")
    _box = Box(("", ",", "", ",", "", ",", "", "]"))
    _opening = Tail("<box>")
    _marks = Tail("<box>", "</box>", "<ref>", "</ref>")

    def step(self, state: _At, char: str) -> _At | None:
        """See `Notation`."""
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
                return state._replace(box=Corners())
            if char in BLANKS:
                box = state.box.blank()
                return None if box is None else state._replace(box=box)
            state = state._replace(where="list")
        box = self._box.step(state.box, char)
        if box is None:
            return None
        whole = box.item == len(self._box.template)
        return _At("inside", some=1) if whole else state._replace(box=box)

    def ends(self, state: _At) -> bool:
        """See `Notation`."""
        return state.where == "free" or (state.where == "inside" and bool(state.some))

    def closed(self, state: _At) -> bool:
        """See `Notation`."""
        return state.where in ("open", "list")

    def fatal(self, state: _At) -> str:
        """See `Notation`."""
        return "[>" if state.where == "inside" or state.tail else ""
