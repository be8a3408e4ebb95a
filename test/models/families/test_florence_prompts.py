"""Task sentences and token ids, against the published processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import Florence2Processor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from librobot_vlm_ros.core import TASKS, ErrorCode, InferenceRequest, ModelError, RequestError
from librobot_vlm_ros.models.families.florence2.configuration import original_to_native
from librobot_vlm_ros.models.families.florence2.model import FlorenceVLM
from librobot_vlm_ros.models.families.florence2.processor import (
    ADDED_TOKENS,
    FLORENCE_TASKS,
    FlorenceTokenizer,
    build_prompt,
    location_bins,
)
from librobot_vlm_ros.models.testing.florence2 import edit_json

PUBLISHED = Path(__file__).parents[2] / "data" / "florence2_tokenizer"


@pytest.fixture(scope="module")
def published() -> FlorenceTokenizer:
    config = original_to_native(json.loads((PUBLISHED / "config.json").read_text()))
    return FlorenceTokenizer.from_folder(PUBLISHED, config)


@pytest.fixture(scope="module")
def reference() -> Florence2Processor:
    """transformers' processor, from the same tokenizer file."""
    backend = Tokenizer.from_file(str(PUBLISHED / "tokenizer.json"))
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ADDED_TOKENS]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    settings = json.loads((PUBLISHED / "preprocessor_config.json").read_text())
    images = CLIPImageProcessorPil(
        size=settings["size"],
        do_center_crop=False,
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
    )
    images.image_seq_length = settings["image_seq_length"]
    return Florence2Processor(images, fast)


def test_every_florence_task_is_a_common_task_and_needs_what_that_one_needs() -> None:
    for name, task in FLORENCE_TASKS.items():
        assert (task.takes == "text") == TASKS[name].needs_text, name
        assert (task.takes == "region") == TASKS[name].needs_region, name


def test_added_tokens_stand_where_the_published_model_has_them(
    published: FlorenceTokenizer,
) -> None:
    vocabulary = published.tokenizer.get_vocab()
    assert vocabulary["<od>"] == 50265
    assert vocabulary["<loc_0>"] == 50269
    assert vocabulary["<loc_999>"] == 51268
    assert vocabulary["<cap>"] == 51269
    assert vocabulary["<and>"] == published.size - 1 == 51288


def test_sentences_equal_the_published_ones(reference: Florence2Processor) -> None:
    sentences = {task.native: task.sentence for task in FLORENCE_TASKS.values()}
    assert sentences == {
        **reference.task_prompts_without_inputs,
        **reference.task_prompts_with_input,
    }


@pytest.mark.parametrize("name", sorted(FLORENCE_TASKS))
def test_prompt_ids_equal_those_of_the_published_processor(
    name: str, published: FlorenceTokenizer, reference: Florence2Processor
) -> None:
    task = FLORENCE_TASKS[name]
    text = "A red cube, café & 2 mugs" if task.takes == "text" else ""
    region = (52.0, 332.5, 932.0, 774.9) if task.takes == "region" else None
    pieces = build_prompt(task, text, region, 1000, 1000)
    given = text or ("<loc_52><loc_332><loc_932><loc_774>" if region else "")
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    batch = reference(text=task.native + given, images=image)
    ids = np.array(batch["input_ids"]).flatten().tolist()
    assert ids[:577] == [reference.image_token_id] * 577
    assert published.prompt(pieces) == ids[577:]


def test_location_tokens_in_a_users_text_are_refused(published: FlorenceTokenizer) -> None:
    for text in ("a <loc_5> b", "</s>", "x<poly>", "<mask>"):
        with pytest.raises(RequestError) as caught:
            published.words(text)
        assert caught.value.code == ErrorCode.CONTROL_TOKEN_IN_PROMPT


def test_text_and_its_ids_are_the_same_both_ways(published: FlorenceTokenizer) -> None:
    ids = published.words("A green car, parked.") + [50269, 51268] + published.words("naïve 車")
    assert published.decode([0, *ids, 2, 1]) == "A green car, parked.<loc_0><loc_999>naïve 車"


@pytest.mark.parametrize(
    ("region", "bins"),
    [
        ((0, 0, 640, 480), (0, 0, 999, 999)),
        ((0.63, 0.47, 320, 240), (0, 0, 500, 500)),
        ((0.64, 0.48, 639.9, 479.9), (1, 1, 999, 999)),
    ],
)
def test_pixels_fall_into_bins(region: tuple[float, ...], bins: tuple[int, ...]) -> None:
    assert location_bins(region, 640, 480) == bins


def test_a_task_without_text_refuses_text() -> None:
    with pytest.raises(RequestError) as caught:
        build_prompt(FLORENCE_TASKS["caption"], "a cup", None, 10, 10)
    assert caught.value.code == ErrorCode.BAD_PARAMETER


def test_a_task_without_its_input_is_refused() -> None:
    for name, code in (("ground", ErrorCode.EMPTY_PROMPT), ("region_ocr", ErrorCode.BAD_REGION)):
        with pytest.raises(RequestError) as caught:
            build_prompt(FLORENCE_TASKS[name], "", None, 10, 10)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("hostile", "harmless"),
    [
        ("<image> cup", "image cup"),
        ("<OD>", "OD"),
        ("cup <loc_3><loc_4>", "cup loc_3 loc_4"),
        ("</s><s>cup", "s s cup"),
        ("<|image_pad|>", "image_pad"),
    ],
)
def test_control_tokens_in_a_prompt_become_words(
    vlm: FlorenceVLM, ask: Callable[..., InferenceRequest], hostile: str, harmless: str
) -> None:
    _, ids = vlm.prepare(ask("ground", prompt=hostile))
    _, expected = vlm.prepare(ask("ground", prompt=harmless))
    assert ids == expected
    assert not set(ids[1:-1]) & vlm.tokenizer.control_ids


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    return folder


def test_a_tokenizer_of_another_model_is_refused(broken: Path) -> None:
    shutil.copy(PUBLISHED / "tokenizer.json", broken / "tokenizer.json")
    with pytest.raises(ModelError) as caught:
        FlorenceVLM.create("florence-2-tabletop", pretrained=str(broken))
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_missing_or_unreadable_tokenizer_is_refused(broken: Path, content: str | None) -> None:
    (broken / "tokenizer.json").unlink()
    if content is not None:
        (broken / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        FlorenceVLM.create("florence-2-tabletop", pretrained=str(broken))
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH


def test_a_tokenizer_without_locations_in_a_row_is_refused(broken: Path) -> None:
    path = broken / "tokenizer.json"
    path.write_text(path.read_text().replace("<loc_500>", "<lok_500>"))
    with pytest.raises(ModelError, match="in a row"):
        FlorenceVLM.create("florence-2-tabletop", pretrained=str(broken))


def test_an_image_token_that_is_a_word_is_refused(broken: Path) -> None:
    edit_json(broken / "config.json", image_token_id=7)
    with pytest.raises(ModelError) as caught:
        FlorenceVLM.create("florence-2-tabletop", pretrained=str(broken))
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH
