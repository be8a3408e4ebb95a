"""PaliGemma, published, against the original arithmetic (`conformance_paligemma`)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from librobot_vlm_ros.core import ErrorCode, GenerationParams, ModelError, RequestError, VlmError
from librobot_vlm_ros.models import create_vlm, load_module, model_info
from librobot_vlm_ros.models.families.paligemma.model import PaliGemmaConfig, PaliGemmaVLM
from librobot_vlm_ros.models.families.paligemma.processor import (
    PALIGEMMA_TASKS,
    PaliGemmaProcessor,
    parse_locations,
)
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.inputs.preprocess import ImageSettings, normalise, squash
from librobot_vlm_ros.models.testing.paligemma import (
    IDS,
    PATCHES,
    TEXT,
    original_logits,
    write_official,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as google/paligemma-3b-pt-224; read only."""
    folder = tmp_path_factory.mktemp("paligemma") / "published"
    write_official(folder)
    return folder


@pytest.fixture
def vlm3b(published: Path) -> PaliGemmaVLM:
    return create_vlm("paligemma-3b", pretrained=str(published), device="cpu")


def picture(seed: int) -> Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prefix", [len(IDS), 4, 1])
def test_logits_and_loss_equal_the_original_arithmetic(published: Path, prefix: int) -> None:
    vlm = create_vlm("paligemma-3b", pretrained=str(published), device="cpu")
    state, image, ids = load_file(published / "model.safetensors"), picture(1), torch.tensor([IDS])
    expected = original_logits(state, image[0], IDS, prefix)
    labels = torch.tensor([[-100] * prefix + IDS[prefix:]])
    with torch.no_grad():
        given = vlm(images=image, input_ids=ids, labels=labels if prefix < len(IDS) else None)
    assert float((given["logits"][0] - expected).abs().max()) < 1e-4
    if prefix < len(IDS):
        image_token = vlm.config.image_token_id
        rows = expected[PATCHES + prefix - 1 : -1].clone()
        rows[:, image_token:] = -math.inf  # the image token and the padding are no words
        wanted = F.cross_entropy(rows, ids[0, prefix:])
        assert float((given["loss"] - wanted).abs()) < 1e-4


def test_greedy_answers_follow_the_original_logits_alone_and_in_a_batch(
    published: Path, vlm3b: PaliGemmaVLM
) -> None:
    state, images = load_file(published / "model.safetensors"), torch.cat([picture(1), picture(2)])
    image_token = vlm3b.config.image_token_id
    expected = []
    for image, prompt in zip(images, (IDS, IDS[:3]), strict=True):
        ids = list(prompt)
        for _ in range(4):
            logits = original_logits(state, image, ids, len(prompt))[-1, :image_token]
            ids.append(int(logits.argmax()))
        new = ids[len(prompt) :]
        expected.append(new[: new.index(1) + 1] if 1 in new else new)
    padded = torch.tensor([IDS, [0] * (len(IDS) - 3) + IDS[:3]])
    rows = vlm3b.generate(images, padded, attention_mask=(padded != 0).long(), max_new_tokens=4)
    for row, new in zip(rows.tolist(), expected, strict=True):
        assert row[: len(new)] == new
    alone = vlm3b.generate(images[1:], torch.tensor([IDS[:3]]), max_new_tokens=4)
    assert alone[0].tolist()[: len(expected[1])] == expected[1]


def test_a_prompt_is_image_begin_prefix_newline(vlm3b: PaliGemmaVLM, ask) -> None:
    ids = tuple(vlm3b.processor.request_ids(ask("open_vocabulary_detect", prompt="red cube, duck")))
    assert ids[:2] == (vlm3b.config.image_token_id, 2)
    assert vlm3b.tokenizer.decode(ids[2:]) == "detect red cube ; duck\n"
    for hostile, harmless in (("<loc0005> cup", "loc0005 cup"), ("<image><eos>", "image eos")):
        ids = tuple(vlm3b.processor.request_ids(ask("answer", prompt=hostile)))
        assert ids == tuple(vlm3b.processor.request_ids(ask("answer", prompt=harmless)))
        assert not set(ids[2:]) & vlm3b.tokenizer.control_ids


def test_line_ends_among_the_added_tokens_are_no_control_tokens(
    published: Path, tmp_path: Path, vlm3b: PaliGemmaVLM, ask
) -> None:
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path / "gemma"
    shutil.copytree(published, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Gemma's file lists its user-defined pieces there: line ends, blanks, <table>, [@BOS@].
    backend.add_tokens([AddedToken("\n", special=False), AddedToken("[@BOS@]", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    found = create_vlm("paligemma-3b", pretrained=str(folder), device="cpu")
    assert "[@BOS@]" in found.tokenizer.control_tokens
    request = ask("ground", prompt="red\n\ncube", params=GenerationParams(max_new_tokens=3))
    assert tuple(found.processor.request_ids(request)) == tuple(
        vlm3b.processor.request_ids(request)
    )
    assert found.run([request])[0].text == vlm3b.run([request])[0].text


def test_requests_are_answered(vlm3b: PaliGemmaVLM, ask) -> None:
    params = GenerationParams(max_new_tokens=4)
    entries = vlm3b.run(
        [
            ask("caption", params=params),
            ask("ground", prompt="cup", params=params),
            ask("detect", params=params),
            ask("embed"),
        ]
    )
    assert isinstance(entries[2], VlmError)
    assert entries[2].code == ErrorCode.TASK_NOT_SUPPORTED
    assert "florence-2-base" in entries[2].hint
    assert entries[0].generated_tokens >= 1
    assert entries[3].embedding.array.shape == (TEXT["hidden_size"],)


def test_boxes_come_back_with_a_score(vlm3b: PaliGemmaVLM, ask) -> None:
    vocabulary = vlm3b.tokenizer.vocabulary
    box = [vocabulary[f"<loc{number:04}>"] for number in (256, 128, 512, 1023)]
    ids = (*box, *vlm3b.tokenizer.words(" cup"), 1)
    answer = vlm3b.processor.read(
        ask("ground", prompt="cup"), Generated(ids, (math.log(0.5),) * len(ids))
    )
    (region,) = answer.regions  # the frame is 80 x 48
    assert region.label == "cup"
    assert region.box == pytest.approx((10.0, 12.0, 80 * 1023 / 1024, 24.0))
    assert region.score == pytest.approx(0.5)


def test_a_saved_folder_gives_the_same_model(vlm3b: PaliGemmaVLM, tmp_path: Path, ask) -> None:
    vlm3b.save_pretrained(tmp_path)
    again = create_vlm("paligemma-3b", pretrained=str(tmp_path), device="cpu")
    for name, old in vlm3b.module.state_dict().items():
        assert torch.equal(old, again.module.state_dict()[name]), name
    request = ask("caption", params=GenerationParams(max_new_tokens=4))
    assert again.run([request])[0].text == vlm3b.run([request])[0].text


def test_a_key_too_many_or_missing_is_refused(published: Path, tmp_path: Path) -> None:
    state = load_file(published / "model.safetensors")
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    less = {k: v for k, v in state.items() if "projector" not in k}
    for changed in (less, state | {"language_model.model.extra": torch.ones(2)}):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            load_module(tmp_path, "float32", "cpu")
        assert caught.value.code == ErrorCode.KEY_MISMATCH


@pytest.mark.parametrize("size", [(224, 224), (480, 641), (100, 37)])
def test_pixels_equal_those_of_the_reference(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    settings = ImageSettings(224, 224, (0.5,) * 3, (0.5,) * 3)
    ours = normalise([squash(pixels, settings)], settings, torch.device("cpu"), torch.float32)
    reference = SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=3)
    theirs = reference(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert float((ours - theirs).abs().max()) < 1e-5


def test_published_size() -> None:
    gemma = 257216 * 2048 + 18 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 16384 + 4096) + 2048
    block = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    siglip = 1152 * 3 * 14**2 + 1152 + 256 * 1152 + 27 * block + 2 * 1152
    with torch.device("meta"):
        module = PaliGemmaForConditionalGeneration(PaliGemmaConfig().to_transformers())
    module.tie_weights()
    built = sum(parameter.numel() for parameter in module.parameters())
    expected = gemma + siglip + 1152 * 2048 + 2048
    assert built == expected == model_info("paligemma-3b").parameters


@pytest.mark.parametrize(
    ("text", "labels", "malformed"),
    [
        ("<loc0000><loc0001><loc0002><loc0003> cup", ["cup"], 0),
        ("<loc0000><loc0001><loc0002><loc0003> a b ; <loc0000><loc0001><loc0002><loc0003> c",
         ["a b", "c"], 0),
        ("<loc0000><loc0001><loc0002><loc0003>" + "<seg007>" * 16 + " cup", ["cup"], 0),
        ("<loc0000><loc0001><loc0002><loc0003>", ["given"], 0),
        ("<loc0000><loc0001><loc0002> cup", [], 1),
        ("<loc0003><loc0001><loc0002><loc0003> cup", [], 1),
        ("<loc0000><loc0001><loc0002><loc1024> cup", [], 1),
        ("cup ; <loc0000><loc0001><loc0002><loc0003> d", ["d"], 1),
        ("", [], 1),
        ("no", [], 1),
    ],
)  # fmt: skip
def test_answers_are_read(text: str, labels: list[str], malformed: int) -> None:
    regions, bad = parse_locations(text, 1024, 2048, "given")
    assert ([region.label for region in regions], bad) == (labels, malformed)
    for region in regions:
        assert region.box == (1.0, 0.0, 3.0, 4.0)


def question(task: str, text: str) -> str:
    """A task's prefix, which needs neither weights nor a tokenizer."""
    return object.__new__(PaliGemmaProcessor).question(task, text, None, None)


def test_questions() -> None:
    assert set(PALIGEMMA_TASKS) | {"embed"} == set(model_info("paligemma-3b").tasks)
    assert question("caption", "") == "caption en"
    assert question("open_vocabulary_detect", "cup; ,red duck") == "detect cup ; red duck"
    for task, text, code in (
        ("ground", "", ErrorCode.EMPTY_PROMPT),
        ("ocr", "cup", ErrorCode.BAD_PARAMETER),
    ):
        with pytest.raises(RequestError) as caught:
            question(task, text)
        assert caught.value.code == code


def test_the_input_size_is_the_same_for_all_images(vlm3b: PaliGemmaVLM) -> None:
    assert vlm3b.backend.input_size(640, 480) == (vlm3b.images.width, vlm3b.images.height)
