"""InternVL2: tiles, questions, boxes, and models built from a configuration, without weights."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration

from librobot_vlm_ros.core import ErrorCode, GenerationParams, RequestError, VlmError
from librobot_vlm_ros.models import create_vlm, get_vlm, model_info
from librobot_vlm_ros.models.families.internvl2.model import InternVLConfig
from librobot_vlm_ros.models.families.internvl2.processor import (
    INTERNVL_TASKS,
    InternVLImages,
    InternVLProcessor,
    float_tiles,
    grid,
    parse_boxes,
    tiles,
)

IMAGES = InternVLImages(448)


def question(task: str, text: str, region: Any, width: int, height: int) -> str:
    """A task's question, which needs neither weights nor a tokenizer."""
    return object.__new__(InternVLProcessor).question(task, text, region, (width, height))


def original_tiles(image: Image.Image, most: int, side: int) -> list[Image.Image]:
    """The published preprocessing, one box after the other."""
    shapes = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most}
    best, least = (1, 1), float("inf")
    for shape in sorted(shapes, key=lambda s: s[0] * s[1]):
        apart = abs(image.width / image.height - shape[0] / shape[1])
        larger = image.width * image.height > 0.5 * side * side * shape[0] * shape[1]
        if apart < least or (apart == least and larger):
            best, least = shape, apart
    wide = image.resize((side * best[0], side * best[1]), Image.Resampling.BICUBIC)
    parts = []
    for row in range(best[1]):
        for column in range(best[0]):
            x, y = column * side, row * side
            parts.append(wide.crop((x, y, x + side, y + side)))
    if len(parts) > 1:
        parts.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return parts


@pytest.mark.parametrize(
    "size",
    [(448, 448), (480, 641), (100, 333), (7, 5), (1, 9), (896, 896), (1344, 1340), (720, 1279)],
)
@pytest.mark.parametrize("most", [1, 6, 12])
def test_tiles_equal_those_of_the_original(size: tuple[int, int], most: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = tiles(pixels, dataclasses.replace(IMAGES, max_tiles=most))
    theirs = original_tiles(Image.fromarray(pixels), most, 448)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one, np.asarray(other))


def test_grids_equal_those_of_the_reference() -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    sizes = np.random.default_rng(5).integers(1, 4000, (400, 2)).tolist()
    sizes += [[448, 448], [449, 449], [634, 634], [897, 448], [2160, 3840], [1, 4000]]
    sizes += [[side, round(side * ratio)] for side in (100, 640) for ratio in (0.625, 1.25, 5 / 3)]
    for most in (1, 2, 6, 12, 40):
        images = dataclasses.replace(IMAGES, max_tiles=most)
        for height, width in sizes:
            expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
            assert grid(width, height, images) == expected
    # A square: more tiles only where the image has the pixels for them.
    assert [grid(s, s, IMAGES)[0] for s in (448, 633, 634, 950, 951)] == [1, 1, 2, 2, 3]


def test_normalised_images_are_cut_as_pixels_are() -> None:
    images = InternVLImages(56)
    for height, width in ((56, 56), (112, 168), (90, 200)):
        # Smooth, so that the two ways to resize differ by little.
        slope = np.linspace(40, 200, height)[:, None] + np.linspace(0, 50, width)[None]
        pixels = np.repeat(slope.astype(np.uint8)[..., None], 3, axis=2)
        floats = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        cut = float_tiles(floats, images)
        wanted = torch.tensor(tiles(pixels, images)).permute(0, 3, 1, 2) / 255
        assert cut.shape == wanted.shape
        assert (cut - wanted).abs().max() < 0.02
    image = torch.randn(3, 30, 80, requires_grad=True)
    float_tiles(image, images).sum().backward()
    assert image.grad.abs().min() > 0


@pytest.mark.parametrize(("name", "hidden", "inner", "layers", "heads"), [
    ("internvl2-2b", 2048, 8192, 24, 16), ("internvl2-8b", 4096, 14336, 32, 32),
])  # fmt: skip
def test_published_sizes(name: str, hidden: int, inner: int, layers: int, heads: int) -> None:
    packed = (heads + 2 * 8) * (hidden // heads)
    reader = layers * (packed * hidden + hidden**2 + 3 * hidden * inner + 2 * hidden)
    reader += hidden + 2 * 92553 * hidden
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 6 * 1024
    tower = 1024 + 1024 * 3 * 14**2 + 1024 + (32**2 + 1) * 1024 + 24 * block
    projector = 2 * 4096 + 4096 * hidden + hidden + hidden**2 + hidden
    config = InternVLConfig(variant=name).to_transformers()
    with torch.device("meta"):
        module = InternVLForConditionalGeneration(config)
    built = sum(parameter.numel() for parameter in module.parameters())
    assert built == reader + tower + projector == model_info(name).parameters
    assert config.image_seq_length == 256
    assert model_info(name).embedding_dim == hidden
    assert model_info(f"OpenGVLab/InternVL2-{name[-2:].upper()}").name == name


def test_a_box_goes_out_and_comes_back() -> None:
    asked = question("region_caption", "", (64.0, 120.0, 320.0, 360.0), 640, 480)
    assert asked.endswith("<box>[[100, 250, 500, 750]]</box>")
    text = "Sure.\n```\n<ref>a cube</ref><box>[[100, 250, 500, 750], [0,0,1000,1000]]</box>\n"
    regions, malformed = parse_boxes(
        f"{text}<ref>ball</ref><box>[[1, 2, 3, 4]]</box>\n```", 640, 480
    )
    assert [region.label for region in regions] == ["a cube", "a cube", "ball"]
    assert regions[0].box == (64.0, 120.0, 320.0, 360.0)
    assert regions[1].box == (0.0, 0.0, 640.0, 480.0)
    assert malformed == 0
    assert parse_boxes("it is at [[10, 20, 30, 40]]", 100, 100, "it")[0][0].label == "it"


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("", 0, 1),
        ("I see nothing.", 0, 1),
        ("<box>[[1, 2, 3]]</box><box>[[1, 2, 3, 4]]</box>", 1, 1),
        ("<box>[[500, 2, 3, 4]]</box>", 0, 1),
        ("<box>[[1, 2, 1001, 4]]</box>", 0, 1),
        ("<box>[[1, 2, 3, -4]]</box>", 0, 1),
        ("<box>[[1, 2, 3, 4], [5, 6, 7", 1, 1),
        ("<box>[[1, 2, 3, 4], [5, 6], [7, 8, 9, 10]]</box>", 2, 1),
        ("<box></box>", 0, 1),
        ("<box>none</box><box>[[1, 2, 3, 4]]</box>", 1, 1),
        ("<box>[[1, 2, 3, 4]<box>[[1, 2, 3, 4]]</box>", 2, 0),
        ("<box>[[1, 2, 99999999999, 4]]</box>", 0, 1),
        ("<box>" + "[" * 50_000, 0, 1),
        ("<ref>cut off", 0, 1),
    ],
)
def test_what_is_no_box_is_counted(text: str, good: int, bad: int) -> None:
    regions, malformed = parse_boxes(text, 100, 100, "cup")
    assert (len(regions), malformed) == (good, bad)


def test_a_score_is_asked_for_the_label_and_the_numbers_of_each_box() -> None:
    text, asked = "<ref>a</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", []

    def score(label: Any, coordinates: Any, radii: Any, most: float) -> float:
        assert (tuple(radii), most) == ((10.0,) * 4, 1000)
        asked.append([text[begin:end] for begin, end in [label, *coordinates]])
        return 0.5

    regions, _ = parse_boxes(text, 100, 100, score=score)
    assert asked == [["a", "1", "2", "3", "4"], ["a", "5", "6", "7", "8"]]
    assert {region.score for region in regions} == {0.5}


def test_questions_hold_the_words_where_a_task_has_a_place_for_them() -> None:
    assert question("ground", "the red cube", None, 1, 1).endswith("<ref>the red cube</ref>")
    assert question("answer", "why?", None, 1, 1) == "why?"
    assert {*INTERNVL_TASKS, "embed"} == {*model_info("internvl2-2b").tasks}
    for task, text, code in (
        ("ground", "", ErrorCode.EMPTY_PROMPT),
        ("caption", "x", ErrorCode.BAD_PARAMETER),
        ("region_caption", "", ErrorCode.BAD_REGION),
    ):
        with pytest.raises(RequestError) as caught:
            question(task, text, None, 1, 1)
        assert caught.value.code == code


TINY: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1200,
        "eos_token_id": 2,
    },
    "image_token_id": 1100,
}


def test_the_usage_examples_run() -> None:
    torch.manual_seed(0)
    model = create_vlm("internvl2-2b", config=TINY, device="cpu")
    for parameter in model.vision_encoder.parameters():
        parameter.requires_grad = False
    high_res_images = torch.randn(2, 3, 1080, 1920)
    input_ids, labels = torch.randint(0, 1000, (2, 50)), torch.randint(0, 1000, (2, 50))
    model.gradient_checkpointing_enable()
    model.train()
    outputs = model(images=high_res_images, input_ids=input_ids, labels=labels)
    outputs["loss"].backward()
    vectors = 4 * len(float_tiles(high_res_images[0], model.images))
    assert outputs["logits"].shape == (2, 50 + vectors, 1200)
    assert model.language_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert next(model.vision_encoder.parameters()).grad is None
    images = torch.randn(2, 3, 224, 224)
    options = {"max_new_tokens": 5, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    generated = model.generate(images=images, input_ids=input_ids[:, :10], **options)
    assert generated.shape[0] == 2
    assert torch.equal(generated, model.generate(images, input_ids[:, :10], **options))
    features = model.encode_image(images)
    assert features.shape[2] == model.get_embedding_dim() == 32
    assert model.encode_text(input_ids).shape == (2, 50, 32)
    model.unfreeze()
    model.freeze_language()
    model.freeze_vision()
    left = {name.split(".")[1] for name, p in model.module.named_parameters() if p.requires_grad}
    assert left == {"multi_modal_projector"}


def test_configurations_are_checked() -> None:
    config = InternVLConfig(variant="internvl2-8b", max_tiles=2, **TINY)
    vlm = get_vlm("internvl2-8b")(config=config, name="internvl2-8b", device="cpu")
    assert vlm.images.max_tiles == 2
    for bad in (
        {"variant": "internvl2-1b"},
        {"no_such_field": 1},
        {"text_config": {"vocab_size": 9}},
    ):
        with pytest.raises(VlmError) as caught:
            create_vlm("internvl2-2b", config=bad, device="cpu")
        assert caught.value.code == ErrorCode.BAD_CONFIG


def test_a_native_folder_may_have_a_tokenizer_json(tmp_path: Path, ask) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = "▁\n" + string.ascii_letters + string.digits + string.punctuation
    names = ["<unk>", "<s>", "</s>", *dict.fromkeys(letters + INTERNVL_TASKS["caption"])]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    special = ["<s>", "</s>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    special += ["<ref>", "</ref>", "<box>", "</box>"]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.save(str(tmp_path / "tokenizer.json"))
    size, token = made.get_vocab_size(), made.token_to_id("<IMG_CONTEXT>")
    text = {**TINY["text_config"], "vocab_size": size}
    config = {**TINY, "text_config": text, "image_token_id": token}
    torch.manual_seed(0)
    create_vlm("internvl2-2b", config=config, device="cpu").save_pretrained(tmp_path)
    vlm = create_vlm("internvl2-2b", pretrained=str(tmp_path), device="cpu")
    (answer,) = vlm.run([ask("caption", params=GenerationParams(max_new_tokens=4))])
    assert answer.prompt_tokens > 50
    ids = tuple(vlm.processor.request_ids(ask("ground", prompt="the <box> cup")))
    assert list(ids).count(token) == 1
    assert made.token_to_id("<box>") not in ids
