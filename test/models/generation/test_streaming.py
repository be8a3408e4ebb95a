"""Text out of tokens: streamed, and with the place of each token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.generation.scores import AnswerText, geometric_mean
from librobot_vlm_ros.models.generation.streaming import TextStream, token_spans

#: Ids 0 to 255 are bytes, 1000 and up control tokens.
CONTROL = frozenset(range(1000, 1100))


def decode(ids: Sequence[int]) -> str:
    """Bytes as UTF-8, control tokens as <n>."""
    text, run = "", bytearray()
    for token in ids:
        if token in CONTROL:
            text += run.decode("utf-8", "replace") + f"<{token}>"
            run.clear()
        else:
            run.append(token)
    return text + run.decode("utf-8", "replace")


def words(ids: Sequence[int]) -> str:
    """A tokenizer of whole words: a space between two, none before the first."""
    return " ".join(f"w{token}" for token in ids)


def test_text_is_streamed_as_it_comes() -> None:
    stream = TextStream(decode)
    assert [stream.feed([byte]) for byte in b"cup"] == ["c", "u", "p"]


def test_a_letter_of_several_bytes_is_given_once_it_is_whole() -> None:
    stream = TextStream(decode)
    assert [stream.feed([byte]) for byte in "aé車".encode()] == ["a", "", "é", "", "", "車"]


def test_a_letter_that_stays_incomplete_is_given_at_the_end() -> None:
    stream = TextStream(decode)
    ids = "a車".encode()[:-1]
    heard = "".join(stream.feed([byte]) for byte in ids)
    assert heard == "a"
    assert heard + stream.finish() == decode(ids)
    assert stream.finish() == ""


def test_spaces_that_depend_on_the_neighbour_are_kept() -> None:
    stream = TextStream(words)
    heard = [stream.feed([token]) for token in range(6)]
    assert "".join(heard) == words(range(6))


def test_many_tokens_at_once_are_the_same_text() -> None:
    stream = TextStream(words)
    assert stream.feed([1, 2]) + stream.feed([3]) + stream.feed([4, 5, 6]) == words(range(1, 7))


def test_every_token_has_its_place_in_the_text() -> None:
    ids = [*"né".encode(), 1001, 1002, *b"ox", 1003]
    text, spans = token_spans(ids, decode, CONTROL)
    assert text == "né<1001><1002>ox<1003>"
    found = [text[begin:end] for begin, end in spans]
    assert found == ["n", "", "é", "<1001>", "<1002>", "o", "x", "<1003>"]


def test_the_score_of_a_stretch_is_the_geometric_mean_of_its_tokens() -> None:
    ids = [*b"ab", 1001, 1002]
    probabilities = [0.5, 0.25, 0.9, 0.1]
    answer = Generated(tuple(ids), tuple(math.log(p) for p in probabilities))
    spans = AnswerText(answer, decode, CONTROL)
    assert spans.region((0, 2), []) == pytest.approx((0.5 * 0.25) ** (1 / 2))
    assert spans.region((0, 1), [(2, 8)]) == pytest.approx((0.5 * 0.9) ** (1 / 2))
    assert math.isnan(spans.region((90, 99), []))


def test_zeros_that_lead_a_number_cost_nothing() -> None:
    digits = "0123456789"
    steps = {  # what the model gave each digit while it wrote "018" and closed the bracket
        0: {"0": 0.9, "5": 0.1},
        1: {"1": 0.8, "9": 0.2},
        2: {"8": 0.6, "7": 0.3, "0": 0.1},
        3: {"1": 0.25},
    }
    numbers = {
        step: [math.log(given[d]) if d in given else -math.inf for d in digits]
        for step, given in steps.items()
    }
    answer = Generated(tuple(b"018)"), (math.nan,) * 4, numbers)
    score = AnswerText(answer, decode, CONTROL, tuple(digits)).region(None, [(0, 3)], [2.0], 999.0)
    # Of all: "0", then "1"; 18 and 17 lie within 2, 10 does not; behind 18 another digit is far.
    assert score == pytest.approx(0.9 * 0.8 * (0.6 + 0.3) * (1 - 0.25))


def test_forced_tokens_do_not_count() -> None:
    assert geometric_mean([math.nan, math.log(0.5)]) == pytest.approx(0.5)
    assert math.isnan(geometric_mean([math.nan]))
    assert math.isnan(geometric_mean([]))
