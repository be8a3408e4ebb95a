"""Answers in a notation: malformed boxes cannot come out, well-formed answers stay as they are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import GenerationParams
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.generation.config import CoordinateBins, Generated, GenerationConfig
from librobot_vlm_ros.models.generation.constraints.location_tokens import (
    BoxConstraint,
    PolygonConstraint,
)
from librobot_vlm_ros.models.generation.loop import generate
from librobot_vlm_ros.models.testing import paligemma as conformance_paligemma

#: Tokens 10 to 19 are the locations; 2 ends an answer, 3 to 9 are words.
BOXES = BoxConstraint(10, 10)
RULES = GenerationConfig(eos=(2,), pad=1, max_new_tokens=12, coordinates=CoordinateBins(10, 10, 1))


class Script:
    """A decoder that wants to write a script, and notes which logits it was asked for."""

    def __init__(self, *tokens: int, second: int = 15, rows: int = 1) -> None:
        self.tokens, self.second, self.rows = tokens, second, rows
        self.place = 0
        self.asked: list[range | None] = []

    def prefill(self) -> torch.Tensor:
        return self._logits()

    def decode(self, tokens: torch.Tensor, allowed: range | None = None) -> torch.Tensor:
        self.asked.append(allowed)
        self.place += 1
        logits = self._logits()
        return logits if allowed is None else logits[:, allowed.start : allowed.stop]

    def reorder(self, rows: torch.Tensor, within: bool = False) -> None:
        self.rows = len(rows)

    def _logits(self) -> torch.Tensor:
        logits = torch.zeros(self.rows, 20)
        logits[:, self.second] = 3.0
        logits[:, self.tokens[min(self.place, len(self.tokens) - 1)]] = 6.0
        return logits


def run(script: Script, grammar: Any, rules: GenerationConfig = RULES) -> list[Generated]:
    history = torch.zeros((script.rows, 1), dtype=torch.int64)
    found = generate(script, rules, history, constraints=[grammar] * script.rows)
    assert all(isinstance(row, Generated) for row in found)
    return found


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], None),
        ([5], None),
        ([5, 12], range(10, 20)),
        ([5, 12, 13], range(12, 20)),
        ([5, 12, 13, 14], range(13, 20)),
        ([5, 12, 13, 14, 15], None),
        ([5, 12, 13, 14, 15, 19], range(10, 20)),
        ([5, 12, 5], None),
    ],
)
def test_a_box_that_has_begun_is_finished_the_right_way_round(
    ids: list[int], expected: range | None
) -> None:
    assert BOXES.allowed(ids) == expected


def test_other_shapes() -> None:
    quad = BoxConstraint(10, 10, size=8, ordered=False)
    assert [quad.allowed([19] * n) is None for n in range(9)] == [n % 8 == 0 for n in range(9)]
    outline = PolygonConstraint(10, 10)
    assert [n for n in range(10) if outline.allowed([12] * n) is None] == [0, 6, 8]
    mixed = BoxConstraint(10, 10, unless=9)
    assert mixed.allowed([5, 12])
    assert mixed.allowed([5, 9, 12]) is None


def test_a_well_formed_answer_is_not_changed_and_less_is_computed_for_it() -> None:
    words = (5, 12, 13, 14, 15, 6, 11, 11, 11, 11, 2)
    free, bound = Script(*words), Script(*words)
    (expected,) = run(free, None)
    (found,) = run(bound, BOXES)
    assert found.ids == expected.ids == words
    assert free.asked == [None] * 10
    assert bound.asked == [
        *(None, range(10, 20), range(12, 20), range(13, 20), None, None),
        *(range(10, 20), range(11, 20), range(11, 20), None),
    ]
    for mine, other in zip(found.log_probs, expected.log_probs, strict=True):
        assert mine >= other - 1e-5  # what the grammar rules out has no share
        assert mine == pytest.approx(other, abs=0.3)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ((5, 12, 6, 14, 15, 2), (5, 12, 15, 14, 15, 2)),  # a word inside a box
        ((5, 12, 13, 2, 2), (5, 12, 13, 15, 15, 2)),  # an end inside a box
        ((5, 17, 13, 11, 14, 2), (5, 17, 13, 17, 14, 2)),  # inside out
    ],
)
def test_a_malformed_box_becomes_a_box(script: tuple[int, ...], expected: tuple[int, ...]) -> None:
    (found,) = run(Script(*script), BOXES)
    assert found.ids == expected


def test_rows_of_a_batch_have_grammars_of_their_own() -> None:
    script = Script(5, 12, 6, 2, rows=2)
    history = torch.zeros((2, 1), dtype=torch.int64)
    free, bound = generate(script, RULES, history, constraints=[None, BOXES])
    assert free.ids == (5, 12, 6, 2)
    assert bound.ids[:4] == (5, 12, 15, 15)
    # While both rows are there, neither's range is that of all; then the one left has its own.
    assert script.asked[:3] == [None] * 3
    assert script.asked[3] == range(15, 20)


def test_the_rule_against_repeats_holds_inside_a_box() -> None:
    rules = dataclasses.replace(RULES, no_repeat_ngram=1)
    (free,) = run(Script(5, 12, 12, 12, 2, second=14), None, rules)
    (bound,) = run(Script(5, 12, 12, 12, 2, second=14), BoxConstraint(10, 10, ordered=False), rules)
    assert len(set(bound.ids)) == len(bound.ids)
    assert all(10 <= token < 20 for token in bound.ids[1:5])
    assert free.ids != bound.ids


def locations_in_runs(ids: tuple[int, ...], first: int, count: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for token in ids:
        if first <= token < first + count:
            runs[-1].append(token - first)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def right_way_round(run: list[int]) -> bool:
    """Whether no whole box in a run of locations is inside out."""
    boxes = [run[at : at + 4] for at in range(0, len(run) - 3, 4)]
    return all(box[0] <= box[2] and box[1] <= box[3] for box in boxes)


def noted(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    read = vlm.processor.read

    def note(request: Any, generated: Generated) -> Any:
        rows.append(generated.ids)
        assert not any(value == math.inf for value in generated.log_probs)
        return read(request, generated)

    monkeypatch.setattr(vlm.processor, "read", note)
    return rows


def test_florence_writes_whole_boxes_only(
    vlm, ask, make_frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = vlm.tokenizer.first_location
    with torch.no_grad():  # locations often, so that a random model writes boxes of all kinds
        vlm.module.get_input_embeddings().weight[first : first + 1000] *= 1.5
    rows = noted(vlm, monkeypatch)
    params = GenerationParams(max_new_tokens=60)
    tasks = ("detect", "region_proposal", "open_vocabulary_detect")
    asked = [
        ask(task, on=make_frame(seed), prompt="duck" if "open" in task else "", params=params)
        for seed in range(3)
        for task in tasks
    ]
    vlm.run(asked)
    bound, broken = list(rows), 0
    rows.clear()
    monkeypatch.setattr(vlm.processor, "constraint", lambda task: None)
    vlm.run(asked)
    for mine, free in zip(bound, rows, strict=True):
        runs = locations_in_runs(mine, first, 1000)
        assert all(map(right_way_round, runs))
        assert all(len(run) % 4 == 0 for run in (runs if len(mine) < 60 else runs[:-1]))
        unbound = locations_in_runs(free, first, 1000)
        if all(len(run) % 4 == 0 and right_way_round(run) for run in unbound):
            assert mine == free
        else:
            broken += 1
    assert broken  # or the test would show nothing


def test_paligemma_writes_whole_boxes_only(tmp_path, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance_paligemma.write_official(tmp_path / "tiny")
    vlm = create_vlm("paligemma-3b", pretrained=str(tmp_path / "tiny"), device="cpu")
    first = vlm.tokenizer.vocabulary["<loc0000>"]
    rows = noted(vlm, monkeypatch)
    params = GenerationParams(max_new_tokens=40)
    request = ask("open_vocabulary_detect", prompt="duck", params=params)
    kept = vlm.processor.constraint(request.task)
    assert kept.allowed([first + 3, first + 9]) == range(first + 3, first + 1024)
    assert vlm.processor.constraint(ask("caption").task) is None
    vlm.run([request])
    runs = locations_in_runs(rows[0], first, 1024)
    assert all(map(right_way_round, runs))
    assert all(len(run) % 4 == 0 for run in runs[:-1])
