"""tokenizer.json: what it says of training is not followed; what breaks the library is coded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer, read_fast

WORDS = ["<unk>", "the", "red", "cube", "on", "table"]
TEXT = "the red cube on the table"
IDS = [1, 2, 3, 4, 1, 5]


@pytest.fixture
def made() -> Tokenizer:
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> CausalTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return CausalTokenizer(folder, hidden=[], vocab_size=len(WORDS))


def test_prompts_are_neither_filled_up_nor_cut_off(made: Tokenizer, tmp_path: Path) -> None:
    assert saved(made, tmp_path).words(TEXT) == IDS
    made.enable_padding(length=16)
    assert saved(made, tmp_path).words(TEXT) == IDS
    made.enable_padding(length=10**9)
    assert saved(made, tmp_path).words(TEXT) == IDS
    made.enable_truncation(3, stride=1)
    assert saved(made, tmp_path).words(TEXT) == IDS


def test_a_panic_of_the_library_is_an_error_like_others(made: Tokenizer, tmp_path: Path) -> None:
    # More steps back than its regular expressions take.
    made.normalizer = normalizers.Replace(Regex("(a|aa)+$b"), "")
    words = saved(made, tmp_path).words
    with pytest.raises(ModelError, match="break off") as caught:
        words("a" * 500)
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH


@pytest.mark.parametrize("content", ["[]", "{", json.dumps({"model": None}), "[" * 100_000])
def test_a_file_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be read") as caught:
        read_fast(tmp_path / "tokenizer.json")
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH
