"""LLaVA-1.5: images, questions, boxes and configurations, without weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.models import model_info
from librobot_vlm_ros.models.families.llava.model import CLIP_MEAN, CLIP_STD, LlavaConfig
from librobot_vlm_ros.models.families.llava.processor import (
    LLAVA_TASKS,
    LlavaProcessor,
    pad_to_square,
    parse_boxes,
    square_numbers,
)
from librobot_vlm_ros.models.inputs.preprocess import ImageSettings, normalise, squash


def question(task: str, text: str, region: Any, width: int, height: int) -> str:
    """A task's question, which needs neither weights nor a tokenizer."""
    return object.__new__(LlavaProcessor).question(task, text, region, (width, height))


@pytest.mark.parametrize("size", [(336, 336), (480, 641), (333, 100), (7, 5), (1, 9)])
def test_pixels_equal_those_of_the_reference(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    settings = ImageSettings(336, 336, CLIP_MEAN, CLIP_STD)
    square = squash(pad_to_square(pixels, CLIP_MEAN), settings)
    ours = normalise([square], settings, torch.device("cpu"), torch.float32)
    reference = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    theirs = reference(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize(("name", "hidden", "inner", "layers"), [
    ("llava-v1.5-7b", 4096, 11008, 32), ("llava-v1.5-13b", 5120, 13824, 40),
])  # fmt: skip
def test_published_sizes(name: str, hidden: int, inner: int, layers: int) -> None:
    llama = layers * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden
    llama += 2 * 32064 * hidden
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    clip = 1024 + 1024 * 3 * 14**2 + 577 * 1024 + 4 * 1024 + 24 * block
    projector = 1024 * hidden + hidden + hidden**2 + hidden
    with torch.device("meta"):
        module = LlavaForConditionalGeneration(LlavaConfig(variant=name).to_transformers())
    built = sum(parameter.numel() for parameter in module.parameters())
    assert built == llama + clip + projector == model_info(name).parameters


def test_a_box_goes_out_and_comes_back() -> None:
    # 200 x 100: the square has side 200, the image begins at row 50.
    assert square_numbers((20, 0, 100, 100), 200, 100) == (0.1, 0.25, 0.5, 0.75)
    (region,), malformed = parse_boxes("[0.1, 0.25, 0.5, 0.75]", 200, 100, "cup")
    assert region.box == pytest.approx((20, 0, 100, 100))
    assert (region.label, malformed) == ("cup", 0)
    (tall,), _ = parse_boxes("It is at [0.5,0.0,0.6,1]", 101, 200, "cup")
    assert tall.box == pytest.approx((51.0, 0.0, 71.0, 200.0))  # 49 columns of padding at the left


@pytest.mark.parametrize(
    ("text", "regions", "malformed"),
    [
        ("", 0, 1),
        ("no box", 0, 1),
        ("[0.1, 0.3, 0.5", 0, 1),
        ("[0.1, 0.3, 0.5]", 0, 1),
        ("[0.1, 0.3, 0.5, 0.6, 0.7]", 0, 1),
        ("[0.1, 0.3, 1.5, 0.6]", 0, 1),
        ("[0.5, 0.3, 0.1, 0.6]", 0, 1),
        ("[0.1, 0.6, 0.5, 0.3]", 0, 1),
        ("[0.1, 0.0, 0.5, 0.2]", 0, 1),
        ("[nan, 0.3, 0.5, 0.6]", 0, 1),
        ("[0.1, 0.3, 0.5, 0.6][0.1, 0.3, 0.2, 0.6]", 2, 0),
        ("[0.1, 0.3, 0.5, 0.6] and [0.2, x] and [0.1, 0.3", 1, 2),
        ("[[0.1, 0.3, 0.5, 0.6]]", 1, 1),
    ],
)
def test_what_is_no_box_is_counted(text: str, regions: int, malformed: int) -> None:
    found, bad = parse_boxes(text, 200, 100, "cup")
    assert (len(found), bad) == (regions, malformed)
    for region in found:
        assert 0 <= region.x_min <= region.x_max <= 200
        assert 0 <= region.y_min <= region.y_max <= 100


def test_questions() -> None:
    assert question("answer", "Why?", None, 1, 1) == "Why?"
    assert question("ground", "the cup", None, 1, 1).endswith("describes: the cup")
    asked = question("region_caption", "", (20, 0, 100, 100), 200, 100)
    assert asked.endswith("this region: [0.1, 0.25, 0.5, 0.75].")
    assert set(LLAVA_TASKS) | {"embed"} == set(model_info("llava-v1.5-7b").tasks)
    for given, code in (
        (("ground", "", None), ErrorCode.EMPTY_PROMPT),
        (("caption", "cup", None), ErrorCode.BAD_PARAMETER),
        (("region_caption", "", None), ErrorCode.BAD_REGION),
    ):
        with pytest.raises(RequestError) as caught:
            question(*given, 10, 10)
        assert caught.value.code == code
