"""Fields of a checkpoint's JSON files that are of no use: refused when it is loaded, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models import create_vlm, model_info
from librobot_vlm_ros.models.families.florence2.processor import FlorenceSettings
from librobot_vlm_ros.models.families.internvl2.processor import InternVLImages, internvl_images
from librobot_vlm_ros.models.families.qwen_vl.processor import QwenImages, qwen_images
from librobot_vlm_ros.models.inputs.preprocess import image_settings
from librobot_vlm_ros.models.testing.conformance import hooks_of

NAN, INF = float("nan"), float("inf")


def changed(path: Path, field: str, value: Any) -> None:
    """Set a field, "text_config.vocab_size" for one inside; the file is made if need be."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    *outer, last = field.split(".")
    inner = content
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content))


def refused(read: Callable[[], Any]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read()
    return caught.value


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Official tiny checkpoints by the model's name; never written to."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("official") / name
            hooks_of(model_info(name)).write_official(made[name])
        return made[name]

    return folder


def refused_with(source: Path, name: str, file: str, field: str, value: Any) -> ModelError:
    """The error of loading a copy of a checkpoint with one field changed."""
    folder = source.parent / f"{source.name}-changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    changed(folder / file, field, value)
    return refused(lambda: create_vlm(name, pretrained=str(folder), device="cpu", dtype="float32"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", "x"),
        ("no_repeat_ngram_size", 1.5),
        ("no_repeat_ngram_size", 10**18),
        ("forced_bos_token_id", 10**9),
        ("forced_bos_token_id", []),
        ("forced_eos_token_id", -7),
        ("forced_eos_token_id", INF),
        ("forced_eos_token_id", {}),
        ("num_beams", 10**18),
        ("num_beams", 33),
        ("num_beams", True),
        ("early_stopping", "never"),
        ("length_penalty", "x"),
        ("length_penalty", NAN),
        ("length_penalty", 1e300),
        ("max_new_tokens", INF),
    ],
)
def test_generation_settings(tiny_folder: Path, field: str, value: Any) -> None:
    name = "florence-2-base"
    error = refused_with(tiny_folder, name, "generation_config.json", field, value)
    assert error.code == ErrorCode.BAD_CONFIG
    assert "generation_config.json" in error.message
    assert f"{field} is {value!r}, expected" in error.message


@pytest.mark.parametrize("value", [INF, NAN, "x", -5, [3]])
def test_a_length_of_an_answer(value: Any) -> None:
    error = refused(lambda: FlorenceSettings().overlaid({"max_length": value}))
    assert error.code == ErrorCode.BAD_CONFIG
    assert "max_length" in error.message
    assert FlorenceSettings().overlaid({"max_length": 20}).max_new_tokens == 19


CONFIGS = [
    ("florence-2-base", "architectures", 10**9, None),
    ("florence-2-base", "text_config", 3, "text_config"),
    ("florence-2-base", "text_config", [], "text_config"),
    ("florence-2-base", "text_config.eos_token_id", [], "eos_token_id"),
    ("florence-2-base", "text_config.decoder_start_token_id", 10**9, "decoder_start_token_id"),
    ("florence-2-base", "text_config.pad_token_id", -1, "pad_token_id"),
    ("florence-2-base", "text_config.no_repeat_ngram_size", -1, "no_repeat_ngram_size"),
    ("florence-2-base", "text_config.vocab_size", INF, "OverflowError"),
    ("internvl2-2b", "vision_config.patch_size", 0, "patches of 0 pixels"),
    ("internvl2-2b", "downsample_ratio", 0, "downsample_ratio is 0"),
    ("internvl2-2b", "downsample_ratio", NAN, "downsample_ratio is nan"),
    ("internvl2-2b", "downsample_ratio", INF, "no grid"),
    ("internvl2-2b", "downsample_ratio", -0.5, "no grid"),
    ("internvl2-2b", "select_layer", INF, "OverflowError"),
    ("internvl2-2b", "vision_config.num_attention_heads", -1, "num_attention_heads"),
    ("internvl2-2b", "select_layer", 10**40, "layer"),
    ("llava-v1.5-7b", "mm_vision_select_layer", -99, "layer"),
    ("llava-v1.5-7b", "vocab_size", INF, "OverflowError"),
    ("llava-v1.5-7b", "mm_vision_tower", "a\0b", "mm_vision_tower"),
    ("llava-v1.5-7b", "mm_vision_tower", "x" * 5000, "mm_vision_tower"),
    ("llava-v1.5-7b", "mm_vision_tower", [1], "mm_vision_tower"),
    ("llava-v1.5-7b", "eos_token_id", [], "end"),
    ("llava-v1.5-7b", "max_position_embeddings", -1, "max_position_embeddings"),
    ("qwen2-vl-2b", "rope_scaling", {"type": "mrope", "mrope_section": [-1, 4, 1]}, "mrope_sect"),
    ("qwen2-vl-2b", "rope_scaling", {"type": "mrope", "mrope_section": [1, 1, 10**9]}, "mrope_se"),
    ("qwen2-vl-2b", "rope_scaling", {"type": "mrope", "mrope_section": "x"}, "mrope_section"),
]


@pytest.mark.parametrize(("name", "field", "value", "said"), CONFIGS)
def test_an_architecture(
    official: Callable[[str], Path], name: str, field: str, value: Any, said: str | None
) -> None:
    source = official(name)
    if said is None:  # a field that only tells layouts apart: another one is no error
        folder = source.parent / "other"
        shutil.copytree(source, folder)
        changed(folder / "config.json", field, value)
        create_vlm(name, pretrained=str(folder), device="cpu")
        return
    error = refused_with(source, name, "config.json", field, value)
    assert error.code == ErrorCode.BAD_CONFIG
    assert said in str(error)


@pytest.mark.parametrize("value", [[[]], {}, "x", -1, 10**9, [INF]])
@pytest.mark.parametrize("name", ["qwen2-vl-2b", "internvl2-2b"])
def test_what_ends_an_answer(official: Callable[[str], Path], name: str, value: Any) -> None:
    error = refused_with(official(name), name, "generation_config.json", "eos_token_id", value)
    assert error.code == ErrorCode.BAD_CONFIG
    assert "generation_config.json: eos_token_id" in error.message


IMAGES = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN = QwenImages(14, 2, 2, 3136, 10**6, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [NAN] * 3},
        {"image_mean": [INF, 0, 0]},
        {"image_std": [NAN] * 3},
        {"image_std": [1, 1, INF]},
        {"image_std": [1e-320] * 3},
        {"image_std": [0, 1, 1]},
        {"image_mean": [0.5]},
        {"resample": INF},
        {"resample": 99},
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        image_settings,
        lambda given: qwen_images({**given, "size": None}, QWEN),
        lambda given: internvl_images({}, given, InternVLImages(64)),
    ],
    ids=["florence and paligemma", "qwen", "internvl"],
)
def test_settings_of_images(read: Callable[[Any], Any], change: dict[str, Any]) -> None:
    read(IMAGES)
    error = refused(lambda: read({**IMAGES, **change}))
    assert error.code == ErrorCode.BAD_CONFIG
    assert "preprocessor_config.json" in error.message


@pytest.mark.parametrize("size", [INF, NAN, 0, None, "x"])
def test_a_size_of_images(size: Any) -> None:
    given = {**IMAGES, "size": {"height": size, "width": 64}}
    assert refused(lambda: image_settings(given)).code == ErrorCode.BAD_CONFIG
    most = {"min_pixels": 10**12, "max_pixels": 10**13}
    assert "min_pixels" in refused(lambda: qwen_images(most, QWEN)).message
    stated = {"min_pixels": None, "max_pixels": INF}
    assert refused(lambda: qwen_images(stated, QWEN)).code == ErrorCode.BAD_CONFIG
    assert refused(lambda: qwen_images({"size": size or "x"}, QWEN)).code == ErrorCode.BAD_CONFIG


def test_a_vocabulary_that_cannot_encode_words(tiny_folder: Path) -> None:
    error = refused_with(tiny_folder, "florence-2-base", "tokenizer.json", "model.vocab", {})
    assert error.code == ErrorCode.TOKENIZER_MISMATCH
    assert "cannot encode words" in error.message


def test_a_tokenizer_that_would_cut_or_fill_prompts_does_neither(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    cut = {"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    changed(folder / "tokenizer.json", "truncation", cut)
    vlm = create_vlm("florence-2-base", pretrained=str(folder), device="cpu")
    whole = create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu")
    assert vlm.tokenizer.words("a red cup") == whole.tokenizer.words("a red cup") != []
