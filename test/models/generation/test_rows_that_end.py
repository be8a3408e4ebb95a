"""Rows of a batch end one by one: on a CPU what is left goes on alone, with the same answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import EngineError, ErrorCode
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.generation.config import CoordinateBins, Generated, GenerationConfig
from librobot_vlm_ros.models.generation.loop import generate

_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 1200}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ROWS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]
RULES = GenerationConfig(
    eos=(),
    pad=1,
    max_new_tokens=24,
    no_repeat_ngram=3,
    scale=CoordinateBins(first=0, count=1000, radius=9),
)


@pytest.fixture(params=["florence", "llava"])
def model(request: pytest.FixtureRequest, vlm: Any) -> Any:
    if request.param == "florence":
        return vlm
    torch.manual_seed(5)
    config = {"vision_config": _VISION, "text_config": {**_TEXT, "head_dim": 8}}
    return create_vlm("llava-v1.5-7b", config=config, device="cpu").eval()


class Counted:
    """A decoder that notes how many rows it is given."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.rows: list[int] = []
        self.prefill, self.reorder = decoder.prefill, decoder.reorder

    def decode(self, tokens: torch.Tensor, *allowed: range) -> torch.Tensor:
        self.rows.append(len(tokens))
        return self._decoder.decode(tokens, *allowed)


def answers(model: Any, kind: str, rules: GenerationConfig, rows: list[int], **options: Any) -> Any:
    """What each of those rows of ROWS gives, and how many rows each step had."""
    model.decoder = kind
    with model._answering():
        made, history = model._start(None, [ROWS[row] for row in rows])
        counted = Counted(made)
        seeds = [40 + row for row in rows]
        found = generate(counted, rules, history, seeds=seeds, **options)
    return found, counted.rows


def same(found: Any, expected: Any) -> None:
    assert isinstance(found, Generated)
    assert found.ids == expected.ids
    assert found.log_probs == pytest.approx(expected.log_probs, abs=2e-4)


@pytest.mark.parametrize("kind", ["module", "functional"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_they_leave_and_the_others_answer_as_alone(
    model: Any, kind: str, temperature: float
) -> None:
    rules = dataclasses.replace(RULES, temperature=temperature)
    whole, _ = answers(model, kind, rules, [0, 1, 2])
    # A token that ends the middle row early, and one that ends the first later.
    late = next(token for token in whole[0].ids[6:] if token not in whole[2].ids)
    early = next(token for token in whole[1].ids[2:] if token not in whole[2].ids)
    rules = dataclasses.replace(rules, eos=(early, late))
    found, steps = answers(model, kind, rules, [0, 1, 2])
    alone = [answers(model, kind, rules, [row])[0][0] for row in range(3)]
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    lengths = [len(row.ids) for row in found]
    assert len(set(lengths)) > 1
    # As many rows as are still to go on: none is carried along for nothing.
    assert steps == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_a_row_that_is_stopped_leaves_too(model: Any) -> None:
    stopped = EngineError(ErrorCode.CANCELLED, "enough")
    asked = [0, 0, 0]

    def stop(row: int) -> EngineError | None:
        asked[row] += 1
        return stopped if row == 0 and asked[0] > 5 else None

    found, steps = answers(model, "functional", RULES, [0, 1, 2], stop=stop)
    assert found[0] is stopped
    for row in (1, 2):
        same(found[row], answers(model, "functional", RULES, [row])[0][0])
    assert steps[-1] == 2
    assert asked[1:] == [RULES.max_new_tokens] * 2
