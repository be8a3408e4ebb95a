"""The decoding loop: the same tokens as transformers' generate, and what generate cannot do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import GenerationConfig as TransformersGenerationConfig

from librobot_vlm_ros.core import EngineError, ErrorCode, InferenceError, VlmError
from librobot_vlm_ros.models.families.florence2.checkpoint import PUBLISHED, FlorenceSettings
from librobot_vlm_ros.models.families.florence2.model import FlorenceVLM
from librobot_vlm_ros.models.generation.beam_search import _search
from librobot_vlm_ros.models.generation.config import CoordinateBins, Generated, GenerationConfig
from librobot_vlm_ros.models.generation.loop import _Loop, generate
from librobot_vlm_ros.models.generation.sampler import near

STOPPED = EngineError(ErrorCode.CANCELLED, "enough")


class Table:
    """A decoder whose next token depends on the last one alone: logits are a row of a table."""

    def __init__(self, table: torch.Tensor, rows: int = 1, start: int = 0) -> None:
        self.table = table
        self.start = torch.full((rows,), start)
        self.steps = 0

    def prefill(self) -> torch.Tensor:
        return self.decode(self.start)

    def decode(self, tokens: torch.Tensor, allowed: range | None = None) -> torch.Tensor:
        self.steps += 1
        logits = self.table[tokens]
        return logits if allowed is None else logits[:, allowed.start : allowed.stop]

    def reorder(self, rows: torch.Tensor, within: bool = False) -> None:
        pass


def chain(*successors: int) -> torch.Tensor:
    """Token n is followed by successors[n], surely."""
    return torch.nn.functional.one_hot(torch.tensor(successors), len(successors)).float() * 50


def history(rows: int = 1) -> torch.Tensor:
    return torch.zeros((rows, 1), dtype=torch.int64)


RULES = GenerationConfig(eos=(2,), pad=1, max_new_tokens=8)


def run(decoder: Table, rules: GenerationConfig = RULES, rows: int = 1, **options):
    return generate(decoder, rules, history(rows), **options)


SETTINGS = [
    FlorenceSettings(),
    dataclasses.replace(PUBLISHED),
    FlorenceSettings(num_beams=4),
    FlorenceSettings(num_beams=2, no_repeat_ngram_size=2, length_penalty=2.0),
    FlorenceSettings(num_beams=3, early_stopping=True, length_penalty=0.5),
    FlorenceSettings(no_repeat_ngram_size=1, forced_bos_token_id=0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.num_beams}beams")
def test_tokens_equal_those_of_generate(vlm: FlorenceVLM, settings: FlorenceSettings) -> None:
    vlm.settings = dataclasses.replace(settings, max_new_tokens=20)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    rows = [[0, 5, 9, 2, 1], [0, 7, 7, 7, 2], [0, 2, 1, 1, 1]]  # unequal lengths, padded
    words = torch.tensor(rows)
    mask = (words != 1).long()
    image = torch.full((3, vlm.image_tokens), vlm.config.image_token_id)
    # Otherwise the model's own settings would fill in what the test leaves open.
    vlm.module.generation_config = TransformersGenerationConfig()
    expected = vlm.module.generate(
        input_ids=torch.cat([image, words], dim=1),
        attention_mask=torch.cat([torch.ones_like(image), mask], dim=1),
        pixel_values=pixels,
        generation_config=TransformersGenerationConfig(
            do_sample=False,
            max_length=21,
            decoder_start_token_id=2,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
            suppress_tokens=[vlm.config.image_token_id],
            num_beams=settings.num_beams,
            early_stopping=settings.early_stopping,
            length_penalty=settings.length_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size or None,
            forced_bos_token_id=settings.forced_bos_token_id,
            forced_eos_token_id=settings.forced_eos_token_id,
        ),
    )[:, 1:]
    found = vlm.generate(pixels, words, attention_mask=mask)
    assert found.tolist() == expected.tolist()


def test_a_row_ends_at_its_end_token_and_the_others_go_on() -> None:
    decoder = Table(chain(3, 3, 3, 4, 2), rows=2)
    decoder.start = torch.tensor([0, 4])
    first, second = run(decoder, rows=2)
    assert first.ids == (3, 4, 2)
    assert second.ids == (2,)


@pytest.mark.parametrize("beams", [1, 3])
def test_probabilities_are_those_of_the_model_before_any_rule(beams: int) -> None:
    table = torch.log(
        torch.tensor([[0.5, 0.3, 0.2, 0], [0.6, 0.1, 0.3, 0], [0, 0, 1.0, 0], [0] * 4])
    )
    rules = GenerationConfig(eos=(2,), pad=1, max_new_tokens=3, num_beams=beams, no_repeat_ngram=1)
    (row,) = run(Table(table.nan_to_num(neginf=-1e4)), rules)
    assert row.ids == (1, 2)  # 0 stands in the history, so it may not come again
    assert [math.exp(v) for v in row.log_probs] == pytest.approx([0.3, 0.3], abs=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mark_on_a_scale_counts_with_its_neighbours(beams: int) -> None:
    table = torch.log(torch.tensor([[0.0, 0, 0.1, 0.1, 0.15, 0.3, 0.2, 0.15]] * 8) + 1e-9)
    rules = dataclasses.replace(
        RULES, max_new_tokens=1, num_beams=beams, scale=CoordinateBins(first=4, count=4, radius=1)
    )
    (row,) = run(Table(table), rules)
    assert row.ids == (5,)
    assert math.exp(row.log_probs[0]) == pytest.approx(0.15 + 0.3 + 0.2, abs=1e-4)


def test_at_the_ends_of_a_scale_there_are_fewer_neighbours() -> None:
    blocks = torch.log(torch.tensor([[0.2, 0.3, 0.05]])).expand(3, -1)
    found = near(blocks, torch.arange(3), CoordinateBins(first=1, count=3, radius=1)).exp()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.55, 0.35]))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_forced_token_has_no_probability(beams: int) -> None:
    rules = dataclasses.replace(
        RULES, forced_first=5, forced_last=2, max_new_tokens=4, num_beams=beams
    )
    (row,) = run(Table(chain(3, 3, 3, 4, 3, 3)), rules)
    assert row.ids == (5, 3, 4, 2)
    assert [math.isnan(value) for value in row.log_probs] == [True, False, False, True]


@pytest.mark.parametrize("beams", [1, 2])
def test_suppressed_tokens_never_come_and_have_no_share_of_the_probability(beams: int) -> None:
    table = torch.log(torch.tensor([[0.6, 0.1, 0.3]] * 3))
    rules = dataclasses.replace(RULES, suppressed=(0,), num_beams=beams)
    (row,) = run(Table(table), rules)
    assert row.ids == (2,)
    assert math.exp(row.log_probs[0]) == pytest.approx(0.75)


@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_is_stopped_on_its_own_before_the_next_token(beams: int) -> None:
    told: list[list[int]] = [[], []]
    decoder = Table(chain(3, 3, 3, 4, 3), rows=2)
    rules = dataclasses.replace(RULES, num_beams=beams)
    first, second = run(
        decoder,
        rules,
        rows=2,
        stop=lambda row: STOPPED if row == 0 and decoder.steps == 3 else None,
        tell=lambda row, ids: told[row].extend(ids),
    )
    assert first is STOPPED
    assert isinstance(second, Generated)
    assert len(second.ids) == 8
    assert len(told[0]) <= 2
    assert told[1] == list(second.ids)


@pytest.mark.parametrize("beams", [1, 3])
def test_when_every_row_is_stopped_the_model_is_not_run_on(beams: int) -> None:
    decoder = Table(chain(3, 3, 3, 4, 3), rows=2)
    rules = dataclasses.replace(RULES, num_beams=beams)
    rows = run(decoder, rules, rows=2, stop=lambda row: STOPPED if decoder.steps == 4 else None)
    assert rows == [STOPPED, STOPPED]
    assert decoder.steps == 4


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_what_is_told_while_searching_is_the_beginning_of_the_answer(
    vlm: FlorenceVLM, beams: int, ask
) -> None:
    vlm.settings = FlorenceSettings(num_beams=beams, max_new_tokens=16, early_stopping=True)
    jobs = [vlm._job(0, ask("caption")), vlm._job(1, ask("detect"))]
    with torch.inference_mode():
        decoder, start = vlm.start(jobs)
        told: list[list[list[int]]] = [[], []]
        rows = generate(
            decoder,
            vlm.rules(jobs[0].request.params),
            start,
            tell=lambda row, ids: told[row].append(ids),
        )
    for row, parts in zip(rows, told, strict=True):
        assert isinstance(row, Generated)
        assert [token for part in parts for token in part] == list(row.ids)


def test_sampling_is_repeatable_by_its_seed_and_independent_of_neighbours() -> None:
    table = torch.zeros(50, 50)
    rules = dataclasses.replace(RULES, temperature=1.0, max_new_tokens=20, eos=(-1,))
    pair = run(Table(table, rows=2), rules, rows=2, seeds=[5, 6])
    (alone,) = run(Table(table), rules, seeds=[6])
    assert pair[1].ids == alone.ids != pair[0].ids


def test_without_a_seed_samples_differ() -> None:
    rules = dataclasses.replace(RULES, temperature=1.0, max_new_tokens=20, eos=(-1,))
    table = torch.zeros(50, 50)
    assert run(Table(table), rules)[0].ids != run(Table(table), rules)[0].ids


def test_the_nucleus_holds_the_fewest_tokens_that_reach_top_p() -> None:
    table = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4))
    rules = dataclasses.replace(RULES, temperature=1.0, max_new_tokens=300, eos=(-1,), top_p=0.65)
    (row,) = run(Table(table), rules, seeds=[1])
    assert set(row.ids) == {0, 1}


def test_a_low_temperature_sharpens() -> None:
    table = torch.log(torch.tensor([[0.6, 0.4]] * 2))
    rules = dataclasses.replace(RULES, temperature=0.01, max_new_tokens=50, eos=(-1,))
    (row,) = run(Table(table), rules, seeds=[1])
    assert set(row.ids) == {0}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_an_error_of_their_own(beams: int, value: float) -> None:
    table = torch.zeros(5, 5)
    table[0, 3] = value
    with pytest.raises(InferenceError) as caught:
        run(Table(table), dataclasses.replace(RULES, num_beams=beams))
    assert caught.value.code == ErrorCode.NAN_LOGITS


def on_its_way(rules: GenerationConfig, *, ahead: bool) -> tuple[list, list[list[int]]]:
    """Answers of four rows of a random table, and what was told of them; one is stopped."""
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(8)) * 3
    decoder = Table(table, rows=4)
    decoder.start = torch.tensor([0, 3, 4, 5])
    loop = _Loop(decoder, rules, history(4), None)
    loop._ahead = ahead
    told: list[list[int]] = [[] for _ in range(4)]
    rows = loop.run(
        lambda row: STOPPED if row == 1 and len(told[1]) == 2 else None,
        lambda row, ids: told[row].extend(ids),
    )
    return rows, told


@pytest.mark.parametrize("ngram", [0, 2])
def test_a_host_that_runs_a_step_ahead_of_its_reads_finds_the_same(ngram: int) -> None:
    """As on CUDA: the next step is asked for before the token that it takes in has been read."""
    rules = dataclasses.replace(
        RULES, max_new_tokens=12, no_repeat_ngram=ngram, scale=CoordinateBins(5, 3, 1), eos=(2, 8)
    )
    found = on_its_way(rules, ahead=False)
    assert found == on_its_way(rules, ahead=True)
    assert found[0][1] is STOPPED


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_search_over_beams_that_runs_a_step_ahead_finds_the_same(early_stopping: bool) -> None:
    found = {}
    for ahead in (False, True):
        answers = []
        for seed in range(12):
            table = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed)) * 3
            decoder = Table(table, rows=3)
            decoder.start = torch.tensor([0, 3, 4])
            rules = dataclasses.replace(
                RULES, num_beams=3, eos=(2, 8), early_stopping=early_stopping, length_penalty=0.7
            )
            told: list[list[int]] = [[], [], []]

            def stop(row: int, told: list[list[int]] = told) -> VlmError | None:
                return STOPPED if row == 1 and len(told[1]) >= 3 else None

            def tell(row: int, ids: list[int], told: list[list[int]] = told) -> None:
                told[row].extend(ids)

            rows = _search(decoder, decoder.prefill(), rules, history(3), stop, tell, ahead=ahead)
            answers.append((rows, told, decoder.steps))
        found[ahead] = answers
    for (rows, told, steps), (other, heard, more) in zip(found[False], found[True], strict=True):
        assert rows == other
        assert told == heard
        assert steps <= more <= steps + 1
    assert len({len(rows[0].ids) for rows, _, _ in found[True]}) > 1


def test_nan_in_a_row_that_has_ended_does_no_harm() -> None:
    table = chain(3, 3, 3, 4, 3)
    table[1] = math.nan  # what is fed to a row that has ended
    decoder = Table(table, rows=2)
    first, second = run(
        decoder, rows=2, stop=lambda row: STOPPED if row == 0 and decoder.steps == 2 else None
    )
    assert isinstance(first, VlmError)
    assert len(second.ids) == 8
