"""A region's score means the same in every family, computed here from the logits by counting.

The score is the geometric mean of the probabilities of the label's tokens and, for each coordinate,
of the probability of lying within 1 % of the image's side. What a family writes is given by hand;
logits are random but for the token to be written, which is the likeliest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import GenerationParams
from librobot_vlm_ros.models.generation.config import AllExcept, Generated
from librobot_vlm_ros.models.generation.loop import generate

#: The frame of `ask` is 80 x 48. Numbers near a power of ten, near others' beginnings, and plain.
NUMBERS = ("95", "100", "405", "1000")


class Table:
    """A decoder whose logits at each step are those of a table, whatever was written."""

    def __init__(self, table: torch.Tensor, rows: int = 1) -> None:
        self.table, self.step, self.rows = table, 0, rows

    def prefill(self) -> torch.Tensor:
        return self._row(None)

    def decode(self, tokens: torch.Tensor, allowed: Any = None) -> torch.Tensor:
        self.step += 1
        return self._row(allowed)

    def reorder(self, rows: torch.Tensor, within: bool = False) -> None:
        self.rows = len(rows)

    def _row(self, allowed: Any) -> torch.Tensor:
        logits = self.table[self.step].expand(self.rows, -1).clone()
        if isinstance(allowed, range):
            return logits[:, allowed.start : allowed.stop]
        return logits if allowed is None else logits[:, allowed]


def written(vlm: Any) -> tuple[list[int], str, list[str]]:
    """Ids of an answer with one box, its label's text, and its coordinates as they are spelt."""
    say, known = vlm.tokenizer.words, getattr(vlm.tokenizer, "vocabulary", {})
    if vlm.family == "florence-2":
        first = vlm.tokenizer.first_location
        ids = [*say("red cube"), *(first + number for number in (95, 100, 405, 990))]
        return ids, "red cube", ["<loc_95>", "<loc_100>", "<loc_405>", "<loc_990>"]
    if vlm.family == "paligemma":
        box = [f"<loc{number:04}>" for number in (95, 100, 405, 1020)]
        return [*(known[mark] for mark in box), *say(" cup")], "cup", box
    if vlm.family == "qwen2-vl":
        left, top, right, bottom = NUMBERS
        corners = say(f"({left},{top}),({right},{bottom})")
        label = [known["<|object_ref_start|>"], *say("cup"), known["<|object_ref_end|>"]]
        return [*label, known["<|box_start|>"], *corners, known["<|box_end|>"]], "cup", [*NUMBERS]
    if vlm.family == "qwen3-vl":
        text = f'[{{"bbox_2d": [{", ".join(NUMBERS)}], "label": "cup"}}]'
        return say(text), "cup", [*NUMBERS]
    if vlm.family == "internvl2":
        label = [known["<ref>"], *say("cup"), known["</ref>"]]
        corners = say(f"[[{', '.join(NUMBERS)}]]")
        return [*label, known["<box>"], *corners, known["</box>"]], "cup", [*NUMBERS]
    numbers = ["0.09", "0.3", "0.41", "1.0"]
    return say(f"[{', '.join(numbers)}]"), "", numbers


def task_of(vlm: Any) -> str:
    return "detect" if "detect" in vlm.tasks else "ground"


def logits_for(vlm: Any, ids: list[int], seed: int) -> torch.Tensor:
    """Random logits [L, V] under which `ids` are the likeliest answer; digits are likely, too."""
    random = torch.Generator().manual_seed(seed)
    size = vlm.config.text_config.vocab_size
    table = torch.randn((len(ids) + 4, size), generator=random) * 2
    if vlm.family not in ("florence-2", "paligemma"):
        digits = [t for t, text in texts_of(vlm).items() if re.fullmatch(r"[0-9]", text)]
        table[:, digits] += 3
    else:
        first = ids[0] if vlm.family == "paligemma" else ids[-1]
        table[:, first - 30 : first + 30] += 3
    for step, token in enumerate(
        [*ids, vlm.processor.generation_config(GenerationParams()).eos[0]]
    ):
        table[step, token] = table[step].max() + 0.3
    return table


def texts_of(vlm: Any) -> dict[int, str]:
    """What each token adds to a text behind a 0."""
    tokenizer = vlm.tokenizer
    before = tokenizer.words("0")
    return {
        token: tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
        for token in tokenizer.vocabulary.values()
        if token not in tokenizer.control_ids
    }


def probabilities(vlm: Any, table: torch.Tensor, ids: list[int]) -> list[dict[int, float]]:
    """Of every step: the tokens that may stand there, with their probabilities among those."""
    constraint, found = vlm.processor.constraint(task_of(vlm)), []
    for step in range(len(ids)):
        allowed = None if constraint is None else constraint.allowed(ids[:step])
        tokens = set(range(table.shape[1])) - set(vlm.processor.suppressed())
        if isinstance(allowed, AllExcept):
            tokens -= set(allowed.tokens)
        elif allowed is not None:
            tokens = set(allowed)
        order = sorted(tokens)
        chances = torch.softmax(table[step][order].double(), dim=0).tolist()
        found.append(dict(zip(order, chances, strict=True)))
    return found


def places(vlm: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The answer's text, and where each token lies in it."""
    ends = [len(vlm.decode_text(ids[:count])) for count in range(len(ids) + 1)]
    return vlm.decode_text(ids), list(itertools.pairwise(ends))


def spellings(value: str, radius: float, step: float) -> set[str]:
    """Every way to write a number within `radius` of `value`: as an integer or a decimal."""
    low, high = float(value) - radius - 1e-9, float(value) + radius + 1e-9
    found = set()
    for number in range(round((1000 if radius > 1 else 1) / step) + 1):  # none lies outside
        if low <= number * step <= high:
            decimal = f"{number * step:.3f}"
            while decimal.endswith("0") and not decimal.endswith("."):
                found.add(decimal)
                decimal = decimal[:-1]
            found |= {decimal, decimal.removesuffix(".")}
    return found


def number_chance(
    vlm: Any, ids: list[int], chances: list[dict[int, float]], span: tuple[int, int], radius: float
) -> float | None:
    """The probability that a number written as text comes within `radius`, by counting."""
    text, spans = places(vlm, ids)
    texts, begin, end = texts_of(vlm), *span
    wanted = spellings(text[begin:end], radius, 0.001 if radius < 1 else 0.5)
    steps = [n for n, (b, e) in enumerate(spans) if b < end and e > begin]
    if spans[steps[-1]][1] == end and steps[-1] + 1 < len(ids):
        steps.append(steps[-1] + 1)
    product, counted = 1.0, False
    for at in steps:
        if len(chances[at]) == 1:
            continue
        counted = True
        so_far = text[begin : max(begin, spans[at][0])] if spans[at][0] < end else text[begin:end]
        lead = text[spans[at][0] : begin].lstrip() if spans[at][0] < begin else ""
        good = 0.0
        for token, chance in chances[at].items():
            added = texts.get(token, "")
            added = added if so_far else added.lstrip()
            digits = (
                re.match(r"[0-9.]+", added.removeprefix(lead)) if added.startswith(lead) else None
            )
            if digits is None:
                good += chance if so_far in wanted else 0.0
            elif digits[0] != added.removeprefix(lead):
                good += chance if so_far + digits[0] in wanted else 0.0
            else:
                start = so_far + digits[0]
                good += chance if any(spelt.startswith(start) for spelt in wanted) else 0.0
        product *= min(good, 1.0)
    return product if counted else None


def expected_score(vlm: Any, ids: list[int], table: torch.Tensor) -> float:
    """The score by its definition."""
    chances = probabilities(vlm, table, ids)
    _, label, coordinates = written(vlm)
    text, spans = places(vlm, ids)
    factors: list[float] = []
    if label:
        begin = text.index(label)
        for step, (b, e) in enumerate(spans):
            if b < begin + len(label) and e > begin and len(chances[step]) > 1:
                factors.append(chances[step][ids[step]])
    at = 0
    for number, spelt in enumerate(coordinates):
        begin = text.index(spelt, at)
        at = begin + len(spelt)
        if spelt.startswith("<loc"):
            (step,) = [n for n, span in enumerate(spans) if span == (begin, at)]
            if len(chances[step]) > 1:
                token, bins = ids[step], vlm.processor.coordinates()
                window = range(
                    max(bins.first, token - 10), min(bins.first + bins.count, token + 11)
                )
                factors.append(sum(chances[step].get(near, 0.0) for near in window))
            continue
        side = (80, 48)[number % 2]
        radius = 10.0 if float(coordinates[-1]) > 1 else side / 80 / 100
        chance = number_chance(vlm, ids, chances, (begin, at), radius)
        if chance is not None:
            factors.append(chance)
    return math.exp(sum(map(math.log, factors)) / len(factors))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_score_is_the_mean_over_label_and_coordinates(
    load_family: Any, ask: Any, seed: int, beams: int
) -> None:
    vlm = load_family()
    if vlm.family == "florence-2":  # rules against repeats would forbid what is to be written
        vlm.processor.settings = dataclasses.replace(
            vlm.processor.settings, no_repeat_ngram_size=0, forced_bos_token_id=None
        )
    ids, _, _ = written(vlm)
    table = logits_for(vlm, ids, seed)
    config = vlm.processor.generation_config(
        GenerationParams(max_new_tokens=len(ids) + 3, num_beams=beams)
    )
    history = torch.zeros((1, 0), dtype=torch.int64)
    (row,) = generate(
        Table(table),
        config,
        history,
        constraints=[vlm.processor.constraint(task_of(vlm))],
        again=lambda rows: (Table(table, len(rows)), history[rows]),
    )
    assert isinstance(row, Generated)
    assert list(row.ids[: len(ids)]) == ids
    answer = vlm.processor.read(ask(task_of(vlm), prompt="cup"), row)
    (region,) = answer.regions
    assert 0 < region.score < 1
    assert region.score == pytest.approx(expected_score(vlm, ids, table), rel=1e-4)


def test_a_sure_answer_scores_one_and_one_of_two_far_apart_half(load_family: Any, ask: Any) -> None:
    vlm = load_family()
    ids, _, coordinates = written(vlm)
    if coordinates[0].startswith("<loc"):
        pytest.skip("its coordinates are one token each")
    digits = {text: token for token, text in texts_of(vlm).items() if text in "0123456789"}
    sure = torch.full((len(ids) + 1, vlm.config.text_config.vocab_size), -50.0)
    for step, token in enumerate([*ids, vlm.processor.ends()[0]]):
        sure[step, token] = 0.0
    torn = sure.clone()
    text, spans = places(vlm, ids)
    begin = text.index(coordinates[2])  # 405 or 0.41: its last digit, or its first, could be others
    steps = [n for n, (b, e) in enumerate(spans) if b < begin + len(coordinates[2]) and e > begin]
    torn[steps[0] if vlm.family != "llava-1.5" else steps[-1], digits["9"]] = 0.0
    history = torch.zeros((1, 0), dtype=torch.int64)
    scores = []
    for table in (sure, torn):
        config = vlm.processor.generation_config(GenerationParams(max_new_tokens=len(ids) + 1))
        config = dataclasses.replace(config, suppressed=())
        table[:, digits["9"]] -= 1e-3  # the written token stays the likelier
        (row,) = generate(Table(table), config, history)
        (region,) = vlm.processor.read(ask(task_of(vlm), prompt="cup"), row).regions
        scores.append(region.score)
    count = 4 + (len(vlm.tokenizer.words("cup")) if vlm.family != "llava-1.5" else 0)
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert scores[1] == pytest.approx(0.5 ** (1 / count), rel=1e-2)
