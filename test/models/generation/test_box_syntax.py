"""Boxes written as text: what the parsers read is never in the way, what they don't cannot come."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from librobot_vlm_ros.bench.structured import Scripted
from librobot_vlm_ros.core import GenerationParams
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.families.internvl2 import processor as internvl_prompts
from librobot_vlm_ros.models.families.internvl2.processor import parse_boxes
from librobot_vlm_ros.models.families.qwen_vl import processor as qwen_prompts
from librobot_vlm_ros.models.families.qwen_vl.processor import parse_json_boxes, parse_token_boxes
from librobot_vlm_ros.models.generation.config import AllExcept, TokenSet
from librobot_vlm_ros.models.generation.constraints.box_syntax import (
    JsonBoxes,
    ListBoxes,
    TokenBoxes,
)
from librobot_vlm_ros.models.generation.constraints.syntax_constraint import syntax_constraint
from librobot_vlm_ros.models.generation.loop import generate
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer, added_tokens
from librobot_vlm_ros.models.testing import qwen_vl as conformance_qwen_folder
from librobot_vlm_ros.models.testing.internvl2 import write_official

SYNTAXES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "qwen2": (TokenBoxes(), parse_token_boxes),
    "internvl": (ListBoxes(), parse_boxes),
    "qwen3": (JsonBoxes(), parse_json_boxes),
}
REF, BOX = "<|object_ref_start|>{}<|object_ref_end|>", "<|box_start|>{}<|box_end|>"
GOOD: dict[str, list[str]] = {
    "qwen2": [
        REF.format("a (cup)") + BOX.format("(100,250),(500,750)"),
        BOX.format(" ( 0 , 0.25 ) , (1000,01000.000)\n") + " and " + BOX.format("(7,7),(7,7)"),
        "<|box_start|>(1,2),(3,4)",
        "<|box_start|>(1,2),(3,4) <|object_ref_start|>x<|object_ref_end|><|box_start|>(1,2),(3,4)",
        "it is at (1,2),(3,4)",
    ],
    "internvl": [
        "<ref>a cup</ref><box>[[100, 250, 500, 750], [0,0,1000,1000.0]]</box>",
        "<box>[ [ 1,2.5 , 3,4\t]</box><ref>b</ref><box>[1, 2, 0003, 4]</box>.",
        "<box>here: [1,2,3,4] and [5,6,7,8]]]</box>",
        "<box>[[1, 2, 3, 4]",
        "it is at [[10, 20, 30, 40]]",
    ],
    "qwen3": [
        '```json\n[\n\t{"bbox_2d": [100, 250, 500, 750], "label": "a \\"{cup}\\""}\n]\n```',
        '[{"label": "bbox_2d\\": 7", "bbox_2d":[0,0.5,1000,1000.000]},{"bbox_2d" : [1,2,3,4]}]',
        '{"objects": [{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": null, "n": -1.5e3}]}',
        'a "bbox_2d": 7 {"bbox_2d": [1, 2, 3, 4], "more": [1, {}, [], true]}',
        "[]",
    ],
}
#: What mutations insert.
BITS = {
    "qwen2": ["<|box_start|>", "<|box_end|>", "<|object_ref_start|>", *"(),.09x< ", "12", " " * 60],
    "internvl": ["<box>", "</box>", "<ref>", *"[],.09x< ", "12", " " * 60],
    "qwen3": ['"bbox_2d":', *'"\\{}[],.09x:- ', "12", " " * 60],
}


def read(syntax: Any, text: str) -> Any:
    state = syntax.start
    for char in text:
        state = syntax.step(state, char)
        if state is None:
            return None
    return state


def mutated(family: str, chance: random.Random) -> str:
    text = chance.choice(GOOD[family])
    for _ in range(chance.randint(0, 3)):
        at, end = chance.randint(0, len(text)), chance.choice([0, 0, 1, 2, 6])
        text = text[:at] + chance.choice([*BITS[family], ""]) + text[at + end :]
    return text


@pytest.mark.parametrize("family", sorted(SYNTAXES))
def test_whatever_the_parser_reads_may_be_written(family: str) -> None:
    syntax, parse = SYNTAXES[family]
    for text in GOOD[family]:
        assert parse(text, 100, 100)[1] == 0, text
        assert syntax.ends(read(syntax, text)), text
    chance, good = random.Random(5), 0
    for _ in range(10_000):
        text = mutated(family, chance)
        if parse(text, 100, 100)[1]:
            continue
        good += 1
        state = read(syntax, text)
        assert state is not None, text
        assert syntax.ends(state), text
    assert good > 1000


@pytest.mark.parametrize("family", ["qwen2", "internvl"])
def test_what_may_be_written_is_read_without_a_box_that_is_none(family: str) -> None:
    syntax, parse = SYNTAXES[family]
    pieces = {"qwen2": qwen_prompts, "internvl": internvl_prompts}[family]._PIECE
    chance, whole = random.Random(6), 0
    for _ in range(10_000):
        text = mutated(family, chance)
        state = read(syntax, text)
        if state is None or not syntax.ends(state):
            continue
        regions, malformed = parse(text, 100, 100)
        # An answer without any box counts as one that is none, and bare text is not bound.
        mark = "<|box_start|>" if family == "qwen2" else "<box>"
        if mark in text:
            assert regions, text
            whole += 1
            assert malformed <= sum(bool(p["bare"]) for p in pieces.finditer(text)), text
    assert whole > 1000


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('[{"bbox_2d": [1, 2, 3]', False),
        ('[{"bbox_2d": [1, 2, 3, 4, 5', False),
        ('[{"bbox_2d": [5, 2, 3,', False),
        ('[{"bbox_2d": [5, 2, 3', True),  # as 35
        ('[{"bbox_2d": [1, 2, 3, 4000', False),
        ('[{"bbox_2d": [1, 2, 03', False),
        ('[{"bbox_2d": [1, 2, 3, 1e', False),
        ('[{"bbox_2d": true', False),
        ('[{"bbox_2d": "1', False),
        ('[{"bbox_2d": []', False),
        ('[{"a": {"bbox_2d": [[1,2,3,4],]', False),
        ('[{"a": "\\"bbox_2d\\": true', True),
        ('"bbox_2d": true', True),
        ('[{"bbox_2d": [1, 2, 3, 4]]', False),
        ('[{"bbox_2d": [' + " " * 64 + "[" + "\n" * 64 + "1", True),
        ('[{"bbox_2d": [' + " " * 65, False),
        ('[{"bbox_2d": [1, 2, 3, 4] "', False),
        ('[{"bbox_2d": [1, 2, 3, 4]}', True),
        ("{{", False),
        ('{"a" "', False),
        ('{"a": tr', True),
        ('{"a": tru}', False),
        ('{"a": [1, -0.5e+3, null, {}], "b": "\\u00e9"', True),
        ('{"a": [1,]', False),
        ('{"a": 01', False),
        ('{"a": 1.}', False),
        ('{"a": "\n', False),
        ('{"a": "\\x', False),
        ('{"a": 1,}', False),
        ('{"a": -Infinity, "b": NaN}', True),
    ],
)
def test_boxes_of_json_are_four_numbers(text: str, good: bool) -> None:
    assert (read(JsonBoxes(), text) is not None) == good


def letters(*more: str) -> Tokenizer:
    """Every letter a token, and these mergers; blanks as underscores."""
    from librobot_vlm_ros.models.testing.qwen_vl import LETTERS, SPECIAL

    names = ["<unk>", *LETTERS, "\t", *more]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made


def bytewise(*more: str) -> Tokenizer:
    """As the vendor's: bytes, and these mergers."""
    from librobot_vlm_ros.models.testing.qwen_vl import SPECIAL

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    for merger in more:
        (piece,) = made.pre_tokenizer.pre_tokenize_str(merger)
        names.append(piece[0])
    made.model = models.BPE({t: i for i, t in enumerate(names)}, [])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made


MERGERS = ("),(", "(1", "12", "00", "1000", ".5", ", ", "]]", "[[", "],[", "]},", "],", ' "')
MERGERS += ("\n\t", '":', '":"', '": ', '":[', "bbox", "_2d", "]\n", "[[1", "[a", "1]", ",,")
ENDS = ("<|im_end|>",)


@pytest.fixture(params=["letters", "bytewise"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> CausalTokenizer:
    made = {"letters": letters, "bytewise": bytewise}[request.param](*MERGERS)
    made.save(str(tmp_path / "tokenizer.json"))
    ends = [made.token_to_id(t) for t in (*ENDS, "<|endoftext|>")]
    return CausalTokenizer(tmp_path, hidden=ends, vocab_size=2000)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> CausalTokenizer:
    """InternVL2's kind of tokenizer: sentencepiece with bytes for what has no piece."""
    folder = tmp_path_factory.mktemp("internvl") / "tiny"
    write_official(folder)
    return CausalTokenizer(
        folder,
        hidden=[1, 2],
        vocab_size=2000,
        control=("<box>", "</box>", "<ref>", "</ref>"),
        added=added_tokens(folder),
    )


def holds(some: TokenSet, token: int) -> bool:
    if some is None:
        return True
    return token not in some.tokens if isinstance(some, AllExcept) else token in some


def write(constraint: Any, tokenizer: CausalTokenizer, text: str) -> list[int]:
    """The text in a splitting of our own: the longest pieces that there are."""
    before = tokenizer.words("0")
    vocabulary = {
        tokenizer.decode([*before, token])[1:]: token for token in tokenizer.vocabulary.values()
    }
    ids: list[int] = []
    while text:
        piece = next(text[:n] for n in range(len(text), 0, -1) if text[:n] in vocabulary)
        assert holds(constraint.allowed(ids), vocabulary[piece]), (text, piece)
        ids.append(vocabulary[piece])
        text = text[len(piece) :]
    return ids


def end_of(tokenizer: CausalTokenizer) -> int:
    return tokenizer.vocabulary.get("<|im_end|>", 2)


@pytest.mark.parametrize("family", sorted(SYNTAXES))
def test_every_way_to_split_a_good_answer_is_open(tokenizer, family: str) -> None:
    for text in GOOD[family]:
        constraint = syntax_constraint(tokenizer, SYNTAXES[family][0], [end_of(tokenizer)])
        ids = write(constraint, tokenizer, text)
        assert holds(constraint.allowed(ids), end_of(tokenizer))
        one_by_one = [i for char in text for i in tokenizer.words(char)]
        for n, token in enumerate(one_by_one):
            assert holds(constraint.allowed(one_by_one[:n]), token)


@pytest.mark.parametrize("family", sorted(SYNTAXES))
def test_what_may_follow_is_what_the_syntax_says(tokenizer, pieces, family: str) -> None:
    """Worked out from the vocabulary, against every token tried."""
    syntax = SYNTAXES[family][0]
    for words in (tokenizer, pieces) if family == "internvl" else (tokenizer,):
        eos = end_of(words)
        constraint = syntax_constraint(words, syntax, [eos])
        known = words.constraint_cache[type(syntax), (eos,)]
        bound = 0
        for text in GOOD[family]:
            ids = [i for char in text for i in words.words(char)] if words is tokenizer else (
                write(constraint, words, text)
            )  # fmt: skip
            for n in range(len(ids)):
                state, some = read(syntax, words.decode(ids[:n])), constraint.allowed(ids[:n])
                closed = syntax.closed(state)
                bound += some is not None
                for token in words.vocabulary.values():
                    spelt = known.text(token)
                    if token == eos:
                        expected = syntax.ends(state)
                    elif not spelt:
                        expected = not closed
                    else:
                        expected = known.after(state, token) is not None
                    assert holds(some, token) == expected, (words.decode(ids[:n]), spelt)
        assert bound > 20


@pytest.mark.parametrize("family", sorted(SYNTAXES))
def test_a_box_that_is_written_at_random_is_a_box(tokenizer, pieces, family: str) -> None:
    syntax, parse = SYNTAXES[family]
    words = pieces if family == "internvl" else tokenizer
    begin = {"qwen2": "<|box_start|>", "internvl": "<box>[", "qwen3": '{"bbox_2d":'}[family]
    chance = random.Random(3)
    eos = end_of(words)
    known = syntax_constraint(words, syntax, [eos])._tokens
    for _ in range(60):
        constraint = syntax_constraint(words, syntax, [eos])
        ids = write(constraint, words, begin)
        while isinstance(some := constraint.allowed(ids), tuple):
            # Blanks without end are allowed and dull.
            dull = [t for t in some if not known.text(t).strip() and t != eos]
            ids.append(chance.choice([t for t in some if t not in dull] or list(some)))
            if ids[-1] == eos or len(ids) > 200:
                break
            where = read(syntax, words.decode(ids)).where
            if family == "qwen3" and where in ("after", "more", "free"):
                break
        text = words.decode(ids)
        assert len(ids) <= 200
        if family == "qwen3":
            text = _finished(text)
        regions, malformed = parse(text, 100, 100)
        assert regions, text
        assert malformed == 0, text


def _finished(text: str) -> str:
    """The object that was begun, closed."""
    for rest in ("", "}", "]}", "]]}", '"":0}', ' "":0}', '":0}'):
        try:
            json.JSONDecoder().raw_decode(text + rest)
        except ValueError:
            continue
        return text + rest
    return text[: text.rindex("]") + 1] + "}"


SCRIPTS: dict[str, dict[str, str]] = {
    "qwen2-vl-2b": {
        BOX.format("(1,2),(3)"): "<|box_start|>(1,2),(3",
        "a<|box_start|>(1,2)": "a<|box_start|>(1,2)",
        BOX.format("(1,2),(1001,9)"): "<|box_start|>(1,2),(100",
        BOX.format("(5,2),(3,9)"): "<|box_start|>(5,2),(3",
        "<|box_start|>cup<|box_end|>": "<|box_start|>",
        BOX.format("(1,2),(3,4),(5,6)"): "<|box_start|>(1,2),(3,4)",
    },
    "internvl2-2b": {
        "<box>[[1, 2, 3]]</box>": "<box>[[1, 2, 3",
        "<box>none</box>": "<box>none",
        "<box>[[9, 2, 3, 4]]</box>": "<box>[[9, 2, 3",
        "<box>[[1, 2, 3, 4], [5, 6]]</box>": "<box>[[1, 2, 3, 4], [5, 6",
    },
    "qwen3-vl-4b": {
        '[{"bbox_2d": [1, 2, 3]}]': '[{"bbox_2d": [1, 2, 3',
        '[{"bbox_2d": "1 2 3 4"}]': '[{"bbox_2d": ',
        '[{"bbox_2d": [1, 2, 3, 4000]}]': '[{"bbox_2d": [1, 2, 3, 400',
        '[{"bbox_2d": [9, 2, 3, 4]}]': '[{"bbox_2d": [9, 2, 3',
        '[{"label": "a", "bbox_2d": null}]': '[{"label": "a", "bbox_2d": ',
    },
}
OF_FAMILY = {"qwen2-vl-2b": "qwen2", "internvl2-2b": "internvl", "qwen3-vl-4b": "qwen3"}


@pytest.fixture(scope="session", params=sorted(SCRIPTS))
def chatty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of a family, loaded from a folder with its kind of tokenizer."""
    folder = tmp_path_factory.mktemp("chatty") / request.param
    if request.param == "internvl2-2b":
        write_official(folder)
    else:
        third = request.param == "qwen3-vl-4b"
        conformance_qwen_folder.write_official(
            folder, conformance_qwen_folder.THIRD if third else conformance_qwen_folder.SECOND
        )
    return create_vlm(request.param, pretrained=str(folder), device="cpu")


def written(vlm: Any, ask: Any, scripts: list[str], *, bound: bool, **params: Any) -> list[Any]:
    """Generated rows of a batch of requests whose answers are to be these."""
    requests = [ask("open_vocabulary_detect", prompt="duck") for _ in scripts]
    eos = vlm.processor.ends()[0]
    ids = [[*_spelt(vlm.tokenizer, text), eos] for text in scripts]
    with vlm.inference():
        jobs = [vlm.backend.prepare(n, request) for n, request in enumerate(requests)]
        made, history = vlm.backend.start(jobs)
        rules = vlm.processor.generation_config(
            GenerationParams(**{"max_new_tokens": 120, **params})
        )
        constraints = [vlm.processor.constraint(r.task) if bound else None for r in requests]
        assert all((one is not None) == bound for one in constraints)
        return generate(Scripted(made, ids), rules, history, constraints=constraints)


def _spelt(tokenizer: CausalTokenizer, text: str) -> list[int]:
    """Ids of an answer; the syntax's marks are tokens of their own."""
    marks = "|".join(map(re.escape, tokenizer.control_tokens))
    parts = re.split(f"({marks})", text)
    return [
        token
        for part in parts
        for token in (
            [tokenizer.vocabulary[part]]
            if part in tokenizer.control_tokens
            else tokenizer.words(part)
        )
    ]


@pytest.mark.parametrize("decoder", ["module", "functional"])
def test_a_good_answer_comes_out_as_without_a_grammar(chatty, ask, decoder: str) -> None:
    chatty.generator.kind = decoder
    family = OF_FAMILY[chatty.name]
    texts = [text for text in GOOD[family] if "\t" not in text]
    together = written(chatty, ask, texts, bound=True)
    for text, row in zip(texts, together, strict=True):
        (free,) = written(chatty, ask, [text], bound=False)
        (alone,) = written(chatty, ask, [text], bound=True)
        assert chatty.decode_text(free.ids) == text
        assert alone.ids == row.ids == free.ids
        assert all(
            math.isnan(mine) or mine >= other - 1e-4  # NaN: there was no choice
            for mine, other in zip(alone.log_probs, free.log_probs, strict=True)
        )


def test_a_malformed_box_is_led_to_a_box(chatty, ask) -> None:
    chatty.generator.kind = "functional"
    parse = SYNTAXES[OF_FAMILY[chatty.name]][1]
    for text, kept in SCRIPTS[chatty.name].items():
        (free,) = written(chatty, ask, [text], bound=False)
        assert parse(chatty.decode_text(free.ids), 100, 100)[1] > 0
        (row,) = written(chatty, ask, [text], bound=True)
        found = chatty.decode_text(row.ids)
        assert found.startswith(kept), found
        assert found != text
        state = read(chatty.processor.box_syntax, found)
        assert state is not None
        # Behind the script a random model writes; only its length can cut a box off.
        assert chatty.processor.box_syntax.ends(state) or len(row.ids) == 120


def test_tasks_of_words_are_free(chatty, ask) -> None:
    assert chatty.processor.constraint(ask("caption").task) is None
