"""Official Florence-2 checkpoints, against the original arithmetic (`conformance_davit`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models import create_vlm, load_module
from librobot_vlm_ros.models.testing.florence2 import (
    D_MODEL,
    DEPTHS,
    DIMS,
    HEADS,
    LAYERS,
    MAX_POSITIONS,
    POSITIONS,
    WINDOW,
    Weights,
    original_logits,
    random_weights,
    tiny_config,
    write_official,
)

WriteCheckpoint = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteCheckpoint:
    """Write an official folder; shards is the number of weight files."""

    def make(weights: Weights, *, vocab_size: int, shards: int = 1, pickled: bool = False) -> Path:
        folder = tmp_path / "official"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny_config(vocab_size)))
        if pickled:
            torch.save(weights, folder / "pytorch_model.bin")
        elif shards == 1:
            save_file(weights, folder / "model.safetensors")
        else:
            index = {}
            for number in range(shards):
                name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
                part = {k: weights[k] for k in sorted(weights)[number::shards]}
                save_file(part, folder / name)
                index |= dict.fromkeys(part, name)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    return make


VOCAB = 60
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))  # 7 x 7 cells
WORDS = torch.tensor([[0, 11, 12, 13, 2], [0, 21, 22, 23, 2]])
ANSWER = torch.tensor([[2, 0, 30, 31], [2, 0, 40, 41]])


def logits_of(module, pixels: Tensor = PIXELS) -> Tensor:
    cells = 1 + 7 * 7
    image = torch.full((2, cells), module.config.image_token_id)
    ids = torch.cat([image, WORDS], dim=1)
    with torch.no_grad():
        return module(input_ids=ids, pixel_values=pixels, decoder_input_ids=ANSWER).logits


@pytest.mark.parametrize("layout", [{}, {"shards": 3}, {"pickled": True}])
def test_logits_equal_the_original_arithmetic(write: WriteCheckpoint, layout: dict) -> None:
    weights = random_weights(VOCAB)
    module = load_module(write(weights, vocab_size=VOCAB, **layout), "float32", "cpu")
    expected = original_logits(weights, PIXELS, WORDS, ANSWER)
    found = logits_of(module)
    assert found.shape == (2, 4, VOCAB + 1)  # transformers' place holder for the image
    torch.testing.assert_close(found[..., :VOCAB], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kept", ["language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"]
)
def test_any_one_of_the_shared_tables_is_enough(write: WriteCheckpoint, kept: str) -> None:
    weights = random_weights(VOCAB)
    expected = original_logits(weights, PIXELS, WORDS, ANSWER)
    weights[kept] = weights.pop("language_model.model.shared.weight")
    module = load_module(write(weights, vocab_size=VOCAB), "float32", "cpu")
    torch.testing.assert_close(logits_of(module)[..., :VOCAB], expected, atol=1e-5, rtol=1e-5)


def test_shared_tables_that_differ_are_refused(write: WriteCheckpoint) -> None:
    weights = random_weights(VOCAB)
    weights["language_model.lm_head.weight"] = torch.randn(VOCAB, D_MODEL)
    with pytest.raises(ModelError, match="shares its weights") as caught:
        load_module(write(weights, vocab_size=VOCAB), "float32", "cpu")
    assert caught.value.code == ErrorCode.KEY_MISMATCH


def test_every_dimension_comes_from_the_folder(write: WriteCheckpoint) -> None:
    module = load_module(write(random_weights(VOCAB), vocab_size=VOCAB), "float32", "cpu")
    vision, text = module.config.vision_config, module.config.text_config
    assert (tuple(vision.embed_dim), tuple(vision.depths)) == (DIMS, DEPTHS)
    assert (tuple(vision.num_heads), vision.window_size) == (HEADS, WINDOW)
    assert vision.max_position_embeddings == POSITIONS
    assert (text.d_model, text.encoder_layers, text.vocab_size) == (D_MODEL, LAYERS, VOCAB + 1)
    assert text.max_position_embeddings == MAX_POSITIONS
    assert module.config.image_token_id == VOCAB


def test_a_bias_that_has_no_place_must_be_zero(write: WriteCheckpoint) -> None:
    weights = random_weights(VOCAB)
    weights["language_model.final_logits_bias"][0, 5] = 0.1
    with pytest.raises(ModelError) as caught:
        load_module(write(weights, vocab_size=VOCAB), "float32", "cpu")
    assert caught.value.code == ErrorCode.KEY_MISMATCH


def test_an_unknown_image_feature_source_is_refused(write: WriteCheckpoint) -> None:
    folder = write(random_weights(VOCAB), vocab_size=VOCAB)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_feature_source"] = ["last_frame"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_module(folder, "float32", "cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.fixture
def whole_folder(tmp_path: Path) -> Path:
    """An official folder with its tokenizer, which lacks the location and task tokens."""
    folder = tmp_path / "official"
    write_official(folder)
    return folder


def test_a_whole_official_folder_answers_with_the_published_settings(whole_folder, ask) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(whole_folder), device="cpu")
    rules = vlm.processor.generation_config(ask("caption").params)
    assert (rules.num_beams, rules.no_repeat_ngram) == (3, 3)
    assert (rules.forced_first, rules.forced_last, rules.early_stopping) == (0, 2, True)
    assert rules.max_new_tokens == MAX_POSITIONS  # as many as there are positions for
    (answer,) = vlm.run([ask("detect")])
    assert answer.generated_tokens > 2


def test_saved_in_the_native_layout_it_loads_and_answers_the_same(
    whole_folder, ask, tmp_path
) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(whole_folder), device="cpu")
    vlm.save_pretrained(tmp_path / "native")
    again = create_vlm("florence-2-base", pretrained=str(tmp_path / "native"), device="cpu")
    assert again.processor.settings == vlm.processor.settings
    requests = [ask("detect"), ask("caption")]
    for one, other in zip(vlm.run(requests), again.run(requests), strict=True):
        assert (one.text, one.regions) == (other.text, other.regions)
