"""Scores of regions: one meaning for every family.

A region's score is the geometric mean of the probabilities of its label's tokens and, for each of
its coordinates, of the probability of lying within 1 % of the image's side of what was written.
Tokens without a choice do not count (`Generated`). A score that nothing is known of is NaN.

A coordinate that is one location token has the mass of the bins near it. One that is written as
text has several steps: each counts with the mass of the tokens with which the number can still
come within 1 %, or can end there, behind what was written of it before (zeros may lead only to a
number that is written so); the coordinate's probability is the product over its steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.models.generation.config import CoordinateBins, Generated, NumberTokens
from librobot_vlm_ros.models.generation.streaming import Decode, token_spans

#: Characters (begin, end) of an answer's text.
Span = tuple[int, int]

#: The score of a region, from where its label and coordinates are written: `AnswerText.region`.
Score = Callable[..., float]

_DIGITS = re.compile(r"[0-9.]+")
_ZEROS = re.compile(r"0[0-9]")
#: 0.09 + 0.01 is a little less than 0.1.
_EPSILON = 1e-9
#: Digits that a coordinate may have before its point.
_MOST_DIGITS = 5


class CoordinateRecord:
    """What the model gave the tokens of coordinates, step by step, to be read at the end."""

    def __init__(self, coordinates: CoordinateBins | NumberTokens | None) -> None:
        self._coordinates = coordinates
        self._kept: dict[int, Tensor] = {}
        self._columns: Tensor | None = None

    def keep(self, step: int, raw: Tensor, only: range | Tensor | None = None) -> None:
        """Log-probabilities [..., V], or of the tokens `only` (int64 [n] sorted, or a range)."""
        wanted = self._coordinates
        if wanted is None:
            return
        if isinstance(wanted, CoordinateBins):
            assert not isinstance(only, Tensor)  # locations stand in a row
            begin, end = wanted.first, wanted.first + wanted.count
            if only is None:
                self._kept[step] = raw[..., begin:end].clone()
            else:
                around = (only.start - begin, end - only.stop)
                self._kept[step] = functional.pad(raw, around, value=-math.inf)
            return
        if self._columns is None:
            self._columns = torch.tensor(wanted.tokens, device=raw.device)
        columns = self._columns
        if only is None:
            self._kept[step] = raw.index_select(-1, columns)
            return
        if isinstance(only, range):
            only = torch.arange(only.start, only.stop, device=raw.device)
        at = torch.searchsorted(only, columns).clamp(max=len(only) - 1)
        found = raw.index_select(-1, at)
        self._kept[step] = found.masked_fill(only[at] != columns, -math.inf)

    def forget(self, step: int) -> None:
        """No coordinate is written at that step."""
        self._kept.pop(step, None)

    def generated(
        self, ids: Sequence[int], log_probs: Sequence[float], place: Callable[[int], Any]
    ) -> Generated:
        """An answer; `place(step)` is where its row lies in what was kept of that step.

        Location tokens get the log-probability of all bins near them. NaN stays NaN.
        """
        wanted, values = self._coordinates, list(log_probs)
        if wanted is None or not self._kept:
            return Generated(tuple(ids), tuple(values))
        written = [token in wanted for token in ids]
        if isinstance(wanted, CoordinateBins):
            steps = [
                step
                for step, is_location in enumerate(written)
                if is_location and step in self._kept and not math.isnan(values[step])
            ]
            if steps:
                blocks = torch.stack([self._kept[step][place(step)] for step in steps])
                bins = torch.tensor([ids[step] - wanted.first for step in steps])
                counted = near(blocks, bins.to(blocks.device), wanted)
                for step, value in zip(steps, counted.tolist(), strict=True):
                    values[step] = value
            return Generated(tuple(ids), tuple(values))
        around = [step for step in range(len(ids)) if any(written[max(step - 1, 0) : step + 1])]
        numbers = {
            step: self._kept[step][place(step)].tolist()
            for step in around
            if step in self._kept and not math.isnan(values[step])
        }
        return Generated(tuple(ids), tuple(values), numbers)


def near(blocks: Tensor, marks: Tensor, bins: CoordinateBins) -> Tensor:
    """Log-probability of being about right, [n], of bin marks[i] among the bins blocks[i].

    `blocks`: float32 [n, bins.count], log-probabilities of all bins; `marks`: int64 [n].
    """
    offsets = torch.arange(-bins.radius, bins.radius + 1, device=blocks.device)
    places = marks[:, None] + offsets
    outside = (places < 0) | (places >= bins.count)
    window = blocks.gather(1, places.clamp(0, bins.count - 1)).masked_fill(outside, -math.inf)
    tiny = math.log(torch.finfo(torch.float32).tiny)
    return window.logsumexp(dim=1).clamp(min=tiny, max=0.0)


class AnswerText:
    """An answer's text with the place of every token in it, and scores of the regions in it.

    `decode` is any function from ids to text that keeps control tokens other than begin, end and
    pad; `control_ids` are decoded one by one. `number_texts`: what each of the config's
    `NumberTokens` adds to a text, where coordinates are written so.
    """

    def __init__(
        self,
        generated: Generated,
        decode: Decode,
        control_ids: frozenset[int],
        number_texts: Sequence[str] = (),
    ) -> None:
        self._log_probs, self._numbers = generated.log_probs, generated.numbers
        self._number_texts = number_texts
        self.text, self.spans = token_spans(generated.ids, decode, control_ids)

    def region(
        self,
        label: Span | None,
        coordinates: Sequence[Span],
        radii: Sequence[float] = (),
        most: float = math.inf,
    ) -> float:
        """The score of a region, 0 to 1; NaN when nothing of it is known.

        `label`: where it is written, None where it is not. `coordinates`: where each is written.
        For those written as text, `radii`: 1 % of the image's side in the unit of each, and `most`,
        the largest that any can be.
        """
        found = [
            value
            for value, (begin, end) in zip(self._log_probs, self.spans, strict=True)
            if label is not None and begin < label[1] and end > label[0]
        ]
        for number, span in enumerate(coordinates):
            if self._number_texts:
                found.append(self._number(span, radii[number], most))
            else:
                found += [self._log_probs[at] for at in self._tokens_of(span)]
        return geometric_mean(found)

    def _tokens_of(self, span: Span) -> list[int]:
        return [at for at, (b, e) in enumerate(self.spans) if b < span[1] and e > span[0]]

    def _number(self, span: Span, radius: float, most: float) -> float:
        """Log-probability that the number written at `span` comes within `radius` of it.

        NaN where no step of it had a choice.
        """
        begin, end = span
        text = self.text[begin:end]
        tokens = self._tokens_of(span)
        low, high = float(text) - radius, min(float(text) + radius, most)
        reach = partial(_can_reach, low=low, high=high, zeros=bool(_ZEROS.match(text)))
        steps = [math.nan]
        for at in tokens:
            if at in self._numbers:
                first, _ = self.spans[at]
                written = self.text[begin : max(begin, first)]
                ahead = self.text[first:begin].lstrip()  # signs that share the first token
                steps.append(self._step(self._numbers[at], written, ahead, reach))
        behind = tokens[-1] + 1
        if self.spans[tokens[-1]][1] == end and behind in self._numbers:
            steps.append(self._step(self._numbers[behind], text, "", reach))
        known = [step for step in steps if not math.isnan(step)]
        return sum(known) if known else math.nan

    def _step(
        self, log_probs: Sequence[float], written: str, ahead: str, reach: Callable[..., bool]
    ) -> float:
        """Log-probability of the tokens with which a number, `written` so far, can `reach`."""
        near_by = going_on = 0.0
        for log_prob, text in zip(log_probs, self._number_texts, strict=True):
            if log_prob == -math.inf:
                continue
            text = text if written else text.lstrip()
            if not text.startswith(ahead):
                continue
            digits = _DIGITS.match(text, len(ahead))
            if digits is None:
                continue
            probability = math.exp(log_prob)
            going_on += probability
            if reach(written + digits[0], digits.end() < len(text)):
                near_by += probability
        if written and reach(written, True):
            near_by += max(0.0, 1.0 - going_on)
        return math.log(min(1.0, near_by)) if near_by > 0.0 else -math.inf


def _can_reach(digits: str, ended: bool, *, low: float, high: float, zeros: bool) -> bool:
    """Whether a number that begins so, or is so where it has `ended`, can lie from low to high.

    `zeros`: whether it may go on behind a leading zero, without a point.
    """
    whole, point, part = digits.partition(".")
    if not whole or "." in part:
        return False
    value = float(digits)
    if ended:
        return low - _EPSILON <= value <= high + _EPSILON
    if point:
        return value <= high + _EPSILON and value + 10.0 ** -len(part) > low + _EPSILON
    longest = len(whole) if whole[0] == "0" and not zeros else _MOST_DIGITS
    return any(
        value * 10**more <= high + _EPSILON and (value + 1) * 10**more > low + _EPSILON
        for more in range(longest - len(whole) + 1)
    )


def unknown(*places: Any) -> float:
    """The `Score` of what no probabilities are known of: NaN."""
    return math.nan


def geometric_mean(log_probs: Sequence[float]) -> float:
    """exp of the mean; tokens without a choice (NaN) are left out; NaN when nothing is left."""
    known = [value for value in log_probs if not math.isnan(value)]
    return math.exp(sum(known) / len(known)) if known else math.nan
