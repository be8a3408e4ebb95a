"""Tokens without a choice: the model isn't asked for them, and nothing of the answer changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import EngineError, ErrorCode, GenerationParams
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.families.florence2.processor import PUBLISHED
from librobot_vlm_ros.models.generation.config import (
    AllExcept,
    CoordinateBins,
    Generated,
    GenerationConfig,
    TokenSet,
)
from librobot_vlm_ros.models.generation.constraints.location_tokens import BoxConstraint
from librobot_vlm_ros.models.generation.decoder import take_in
from librobot_vlm_ros.models.generation.loop import _Loop, generate

RULES = GenerationConfig(eos=(2,), pad=1, max_new_tokens=8)


class Counted:
    """Writes a script (a token's successor), and notes what it was asked for."""

    def __init__(self, successors: Sequence[int], rows: int = 1, start: int = 0) -> None:
        self.successors = torch.tensor(successors)
        self.start = torch.full((rows,), start)
        self.asked: list[list[int]] = []

    def prefill(self) -> torch.Tensor:
        return self.decode(self.start)

    def decode(
        self, tokens: torch.Tensor, allowed: range | torch.Tensor | None = None
    ) -> torch.Tensor:
        self.asked.append(tokens.tolist())
        wanted = torch.nn.functional.one_hot(self.successors[tokens], len(self.successors))
        logits = wanted.float() * 9
        return logits if allowed is None else logits[:, torch.as_tensor(list(allowed))]

    def reorder(self, rows: torch.Tensor, within: bool = False) -> None:
        pass


class Extending(Counted):
    """Takes several tokens at once."""

    def append(self, tokens: torch.Tensor, allowed: Any = None) -> torch.Tensor:
        for column in tokens[:, :-1].unbind(1):
            self.asked.append(column.tolist())
        found = self.decode(tokens[:, -1], allowed)
        self.asked[-tokens.shape[1] :] = [tokens.tolist()]
        return found


class Leaves:
    """After these tokens only those may follow."""

    def __init__(self, **after: TokenSet) -> None:
        self.after = {int(name[1:]): some for name, some in after.items()}

    def allowed(self, ids: Sequence[int]) -> TokenSet:
        return self.after.get(ids[-1]) if ids else None


def run(
    decoder: Counted, grammar: Any = None, rules: GenerationConfig = RULES, **options: Any
) -> Any:
    rows = len(decoder.start)
    history = torch.zeros((rows, 1), dtype=torch.int64)
    constraints = grammar if isinstance(grammar, list) else [grammar] * rows
    return generate(decoder, rules, history, constraints=constraints, **options)


#: 3 -> 4 -> 5 -> 6 -> 2
CHAIN = (3, 0, 0, 4, 5, 6, 2)


def test_a_token_that_is_the_only_one_is_not_asked_for() -> None:
    decoder = Extending(CHAIN)
    told: list[int] = []
    (row,) = run(decoder, Leaves(_3=(4,), _4=range(5, 6)), tell=lambda _, ids: told.extend(ids))
    assert row.ids == (3, 4, 5, 6, 2)
    assert told == list(row.ids)
    assert decoder.asked == [[0], [[3, 4, 5]], [6]]
    # What had no choice says nothing about how sure the model is.
    assert [math.isnan(value) for value in row.log_probs] == [False, True, True, False, False]
    plain = Counted(CHAIN)
    (same,) = run(plain, Leaves(_3=(4,), _4=range(5, 6)))
    assert same == row
    assert plain.asked == [[0], [3], [4], [5], [6]]


def test_the_first_and_the_last_forced_token_cost_nothing() -> None:
    rules = dataclasses.replace(RULES, forced_first=3, forced_last=2, max_new_tokens=4)
    decoder = Counted(CHAIN)
    (row,) = run(decoder, rules=rules)
    assert row.ids == (3, 4, 5, 2)
    assert [math.isnan(value) for value in row.log_probs] == [True, False, False, True]
    assert decoder.asked == [[0], [3], [4]]
    decoder = Extending(CHAIN)
    assert run(decoder, rules=rules)[0].ids == row.ids
    assert decoder.asked == [[[3]], [4]]


def test_an_answer_that_is_forced_throughout_needs_no_model() -> None:
    decoder = Counted(CHAIN)
    rules = dataclasses.replace(RULES, forced_first=3, max_new_tokens=3)
    (row,) = run(decoder, Leaves(_3=(4,), _4=(2,)), rules)
    assert row.ids == (3, 4, 2)
    assert decoder.asked == []


def test_rows_without_a_choice_go_on_together_or_not_at_all() -> None:
    decoder = Extending(CHAIN, rows=2)
    found = run(decoder, [Leaves(_3=(4,)), Leaves(_3=(5,))])
    assert [row.ids for row in found] == [(3, 4, 5, 6, 2), (3, 5, 6, 2)]
    assert decoder.asked == [[0, 0], [[3, 4], [3, 5]], [5, 6], [6]]
    decoder = Extending(CHAIN, rows=2)
    found = run(decoder, [Leaves(_3=(5,)), None])
    assert [row.ids for row in found] == [(3, 5, 6, 2), (3, 4, 5, 6, 2)]
    assert decoder.asked == [[0, 0], [3, 3], [5, 4], [6, 5], [6]]


def test_a_stop_is_asked_for_before_every_token_of_a_run() -> None:
    stopped = EngineError(ErrorCode.CANCELLED, "enough")
    told: list[int] = []
    decoder = Extending(CHAIN)
    (row,) = run(
        decoder,
        Leaves(_3=(4,), _4=(5,)),
        stop=lambda _: stopped if len(told) == 2 else None,
        tell=lambda _, ids: told.extend(ids),
    )
    assert row is stopped
    assert told == [3, 4]
    assert decoder.asked == [[0]]


def test_the_length_counts_tokens_without_a_choice() -> None:
    rules = dataclasses.replace(RULES, max_new_tokens=3)
    (row,) = run(Extending(CHAIN), Leaves(_3=(4,), _4=(5,)), rules)
    assert row.ids == (3, 4, 5)


def test_all_but_some() -> None:
    (row,) = run(Counted(CHAIN), Leaves(_3=AllExcept((4, 6))))
    assert row.ids[:2] == (3, 0)  # the first of those that are alike
    assert math.exp(row.log_probs[1]) == pytest.approx(1 / 5)


def test_a_location_without_a_choice_does_not_count() -> None:
    rules = GenerationConfig(
        eos=(2,), pad=1, max_new_tokens=7, coordinates=CoordinateBins(10, 5, 1)
    )
    successors = [14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 14, 14, 14, 14, 14]
    (row,) = run(Extending(successors), BoxConstraint(10, 5), rules)
    assert row.ids[:4] == (14, 14, 14, 14)
    assert [math.isnan(value) for value in row.log_probs[:4]] == [False, False, True, True]


@pytest.mark.parametrize("decoder", ["module", "functional"])
def test_florence_takes_the_forced_token_in_with_the_start(
    vlm, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.processor.settings = dataclasses.replace(PUBLISHED, num_beams=1)
    vlm.generator.kind = decoder
    rules = vlm.processor.generation_config(GenerationParams(max_new_tokens=12))
    assert rules.forced_first is not None

    def answers() -> Any:
        with vlm.inference():
            made, history = vlm.start(None, [[0, 5, 9, 2], [0, 7, 2]])
            return generate(made, rules, history)

    found = answers()
    monkeypatch.setattr(_Loop, "_known", lambda self, step, allowed: None)
    expected = answers()
    for mine, other in zip(found, expected, strict=True):
        assert isinstance(mine, Generated)
        assert mine.ids == other.ids
        assert mine.log_probs == pytest.approx(other.log_probs, abs=1e-4, nan_ok=True)


_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 1200}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
_MARKS = {"image_token_id": 1100, "video_token_id": 1101}
_MARKS |= {"vision_start_token_id": 1102, "vision_end_token_id": 1103}
QWEN2 = {
    **_MARKS,
    "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "text_config": {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
}


@pytest.mark.parametrize("decoder", ["module", "functional"])
@pytest.mark.parametrize("begun", [True, False])
def test_several_tokens_at_once_are_taken_in_as_one_by_one(vlm, decoder: str, begun: bool) -> None:
    torch.manual_seed(3)
    causal = create_vlm("qwen2-vl-2b", config=QWEN2, device="cpu").eval()
    tokens = [torch.tensor([8, 9]), torch.tensor([11, 5]), torch.tensor([7, 7])]
    only = torch.tensor([4, 700, 33])
    for model, rows in ((causal, [[5, 6, 7], [9]]), (vlm, [[0, 5, 2], [0, 9, 9, 9, 2]])):
        model.generator.kind = decoder
        with model.inference():
            one, _ = model.start(None, rows)
            one.prefill()
            for token in tokens:
                expected = one.decode(token)
            after = one.decode(tokens[0])
            many, _ = model.start(None, rows)
            if begun:
                many.prefill()
            found = take_in(many, tokens, only, begun=begun)
            torch.testing.assert_close(found, expected[:, only], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(many.decode(tokens[0]), after, atol=1e-4, rtol=1e-4)
