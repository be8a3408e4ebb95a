"""Beams in a notation: no malformed box, and no answer changed that was well formed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import EngineError, ErrorCode, GenerationParams
from librobot_vlm_ros.models.families.florence2.processor import PUBLISHED
from librobot_vlm_ros.models.families.qwen_vl.processor import parse_token_boxes
from librobot_vlm_ros.models.generation.beam_search import beam_search, fits
from librobot_vlm_ros.models.generation.config import CoordinateBins, Generated, GenerationConfig
from librobot_vlm_ros.models.generation.constraints.box_syntax import TokenBoxes
from librobot_vlm_ros.models.generation.constraints.location_tokens import BoxConstraint
from librobot_vlm_ros.models.generation.constraints.syntax_constraint import syntax_constraint
from librobot_vlm_ros.models.generation.loop import generate
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer
from librobot_vlm_ros.models.testing import qwen_vl as conformance_qwen_folder

#: Tokens 10 to 15 are the locations; 2 ends an answer, 3 to 9 are words.
FIRST, COUNT, SIZE = 10, 6, 16
BOXES = BoxConstraint(FIRST, COUNT)
RULES = GenerationConfig(
    eos=(2,), pad=1, max_new_tokens=14, num_beams=3, coordinates=CoordinateBins(FIRST, COUNT, 1),
    early_stopping=True, suppressed=(0, 1),
)  # fmt: skip


class Chain:
    """What follows depends on the last token and on how many of them there are; 0 starts."""

    def __init__(self, seed: int, rows: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.table = torch.randn(RULES.max_new_tokens + 1, SIZE, SIZE, generator=random) * 2
        self.table[:, :, FIRST:] -= 1.2
        self.table[:, FIRST:, FIRST:] += 3.0  # boxes are seldom begun, and often ended
        self.table[2:, :, 2] += 1.5
        self.rows, self.place = rows, 0

    def prefill(self) -> torch.Tensor:
        return self.table[0, torch.zeros(self.rows, dtype=torch.int64)].clone()

    def decode(self, tokens: torch.Tensor, allowed: Any = None) -> torch.Tensor:
        assert allowed is None
        self.place += 1
        return self.table[self.place, tokens].clone()

    def reorder(self, rows: torch.Tensor, within: bool = False) -> None:
        pass


def past(rows: int = 1) -> torch.Tensor:
    return torch.zeros((rows, 1), dtype=torch.int64)


def free_answer(seed: int, rules: GenerationConfig = RULES) -> Generated:
    (row,) = beam_search(Chain(seed), rules, past(), stop=lambda row: None, tell=None)
    assert isinstance(row, Generated)
    return row


def whole(ids: tuple[int, ...], room: int) -> bool:
    """Whether all locations stand in boxes that are the right way round, but for a cut."""
    run: list[int] = []
    for place, token in enumerate((*ids, -1)):
        if FIRST <= token < FIRST + COUNT:
            run.append(token)
            if len(run) == 4:
                if run[0] > run[2] or run[1] > run[3]:
                    return False
                run = []
        elif run and not (place == room and token == -1):
            return False
    return True


@pytest.mark.parametrize(
    "rules",
    [
        RULES,
        dataclasses.replace(RULES, early_stopping=False, length_penalty=0.5),
        dataclasses.replace(RULES, num_beams=2, forced_first=5),
    ],
    ids=["early", "late", "forced"],
)
def test_only_malformed_answers_change_and_no_malformed_box_is_left(
    rules: GenerationConfig,
) -> None:
    kept = changed = 0
    for seed in range(150):
        free = free_answer(seed, rules)
        calls: list[list[int]] = []

        def again(rows: Any, seed: int = seed, calls: Any = calls) -> Any:
            calls.append(list(rows))
            return Chain(seed), past()

        (row,) = generate(Chain(seed), rules, past(), constraints=[BOXES], again=again)
        assert isinstance(row, Generated)
        assert fits(BOXES, free, rules) == whole(free.ids, rules.max_new_tokens)
        assert whole(row.ids, rules.max_new_tokens), (seed, row.ids)
        if whole(free.ids, rules.max_new_tokens):
            kept += 1
            assert row.ids == free.ids
            assert calls == []  # at no cost
        else:
            changed += 1
            assert row.ids != free.ids
            assert calls == [[0]]
        assert all(value <= 0 or value != value for value in row.log_probs)
    assert kept > 20, (kept, changed)
    assert changed > 20, (kept, changed)


def test_a_bound_search_alone_would_change_good_answers() -> None:
    """Why the free search comes first."""
    changed = 0
    for seed in range(150):
        free = free_answer(seed)
        if not whole(free.ids, RULES.max_new_tokens):
            continue
        (bound,) = beam_search(
            Chain(seed), RULES, past(), stop=lambda row: None, tell=None, constraints=[BOXES]
        )
        changed += bound.ids != free.ids
    assert changed


def test_boxes_that_are_written_as_text(tmp_path: Path) -> None:
    """Random chains of Qwen2-VL's tokens, led towards its boxes."""
    conformance_qwen_folder.tokenizer().save(str(tmp_path / "tokenizer.json"))
    ids = conformance_qwen_folder.IDS
    eos = ids["<|im_end|>"]
    words = CausalTokenizer(tmp_path, hidden=[eos], vocab_size=200)
    rules = GenerationConfig(eos=(eos,), pad=eos, max_new_tokens=40, num_beams=3)
    usual = [*words.words("(),0123456789"), ids["<|box_end|>"], eos]

    class Written(Chain):
        def __init__(self, seed: int) -> None:
            random = torch.Generator().manual_seed(seed)
            self.table = torch.randn(41, words.size, words.size, generator=random)
            self.table[..., usual] += 4.0
            self.table[:, words.words("(,"), eos] -= 6.0
            self.table[..., words.words(",")] += 1.5
            self.table[0, :, ids["<|box_start|>"]] += 30.0
            good = [*words.words("(1,2),(30,45)"), ids["<|box_end|>"], eos]
            for place, token in enumerate(good, start=1):  # every other one leans to a good one
                self.table[place, :, token] += 12.0 * (seed % 2)
            self.rows, self.place = 1, 0

    def answer(seed: int, *, bound: bool) -> Generated:
        constraints = [syntax_constraint(words, TokenBoxes(), [eos])] if bound else []
        (row,) = generate(
            Written(seed),
            rules,
            past(),
            constraints=constraints,
            again=lambda _: (Written(seed), past()),
        )
        assert isinstance(row, Generated)
        return row

    changed = kept = 0
    for seed in range(40):
        free, row = answer(seed, bound=False), answer(seed, bound=True)
        bad, left = (parse_token_boxes(words.decode(g.ids), 9, 9)[1] for g in (free, row))
        assert left == 0 or len(row.ids) == rules.max_new_tokens, words.decode(row.ids)
        assert bad or row.ids == free.ids
        kept, changed = kept + (not bad), changed + (row.ids != free.ids)
    assert changed > 5, (kept, changed)
    assert kept, (kept, changed)


def test_rows_of_a_batch_are_searched_again_on_their_own() -> None:
    seed = next(s for s in range(150) if not whole(free_answer(s).ids, RULES.max_new_tokens))
    told: list[list[list[int]]] = [[], []]
    (alone,) = generate(
        Chain(seed), RULES, past(), constraints=[BOXES], again=lambda rows: (Chain(seed), past())
    )
    first, second = generate(
        Chain(seed, 2),
        RULES,
        past(2),
        constraints=[None, BOXES],
        again=lambda rows: (Chain(seed), past(len(rows))),
        tell=lambda row, ids: told[row].append(ids),
    )
    assert first.ids == free_answer(seed).ids
    assert second == alone
    assert [token for part in told[0] for token in part] == list(first.ids)
    assert told[1] == [list(second.ids)]


def test_the_second_search_can_be_stopped() -> None:
    seed = next(s for s in range(150) if not whole(free_answer(s).ids, RULES.max_new_tokens))
    stopped = EngineError(ErrorCode.CANCELLED, "enough")
    second: list[Chain] = []

    def again(rows: Any) -> Any:
        second.append(Chain(seed))
        return second[0], past()

    (row,) = generate(
        Chain(seed), RULES, past(), constraints=[BOXES], again=again,
        stop=lambda row: stopped if second and second[0].place == 2 else None,
    )  # fmt: skip
    assert row is stopped


def test_florence_with_its_published_beams(
    vlm, ask, make_frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.processor.settings = dataclasses.replace(PUBLISHED)
    first = vlm.tokenizer.first_location
    with torch.no_grad():  # words as well as locations, or all of the answer is one run of them
        vlm.module.get_input_embeddings().weight[first : first + 1000] *= 0.8
    rows: list[tuple[int, ...]] = []
    read = vlm.processor.read

    def note(request: Any, generated: Generated) -> Any:
        rows.append(generated.ids)
        return read(request, generated)

    monkeypatch.setattr(vlm.processor, "read", note)
    room = 24
    params = GenerationParams(max_new_tokens=room)
    asked = [
        ask(task, on=make_frame(seed), params=params)
        for seed in range(4)
        for task in ("detect", "region_proposal")
    ]
    vlm.run(asked)
    bound = list(rows)
    rows.clear()
    grammar = vlm.processor.constraint(asked[0].task)
    monkeypatch.setattr(vlm.processor, "constraint", lambda task: None)
    vlm.run(asked)
    rules = vlm.processor.generation_config(params)
    changed = 0
    for mine, free in zip(bound, rows, strict=True):
        assert fits(grammar, Generated(mine, ()), rules)
        if fits(grammar, Generated(free, ()), rules):
            assert mine == free
        else:
            changed += 1
    assert changed  # or the test would show nothing
