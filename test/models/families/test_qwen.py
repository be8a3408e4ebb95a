"""Qwen2-VL and Qwen3-VL from published checkpoints, against the original arithmetic and generate.

The original arithmetic stands in `conformance_qwen`: written from the papers, without transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, Frame, GenerationParams, InferenceRequest, VlmError
from librobot_vlm_ros.models import create_vlm, load_module, model_info
from librobot_vlm_ros.models.cache.image_features import ImageFeatures
from librobot_vlm_ros.models.families.qwen_vl.model import QwenVLM
from librobot_vlm_ros.models.families.qwen_vl.processor import QwenImages, patches, smart_size
from librobot_vlm_ros.models.testing import qwen_vl as original
from librobot_vlm_ros.models.testing.qwen_vl import IDS, SECOND, THIRD, original_logits, pixels

GENERATIONS = {"qwen2-vl-2b": SECOND, "qwen3-vl-4b": THIRD}
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1200}
MARKS = {"image_token_id": 1100, "video_token_id": 1101}
MARKS |= {"vision_start_token_id": 1102, "vision_end_token_id": 1103}
TINY: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        **MARKS,
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2},
        "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
    },
    "qwen3-vl-4b": {
        **MARKS,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published folder of each generation; read only."""
    made = {name: tmp_path_factory.mktemp(name) for name in GENERATIONS}
    for name, folder in made.items():
        original.write_official(folder, GENERATIONS[name])
    return made


@pytest.fixture(params=sorted(GENERATIONS))
def qwen(request: pytest.FixtureRequest, folders: dict[str, Path]) -> QwenVLM:
    """Small images stay small: a quarter of the smallest area that Qwen3-VL was published with."""
    options = {"min_pixels": 4 * 32**2, "max_pixels": 64 * 32**2, "device": "cpu"}
    return create_vlm(request.param, pretrained=str(folders[request.param]), **options)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_logits_equal_the_original_arithmetic(qwen: QwenVLM, folders: dict[str, Path]) -> None:
    tiny, weights = GENERATIONS[qwen.name], load_file(folders[qwen.name] / "model.safetensors")
    side = tiny.patch * 2
    images = torch.randn(2, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(1))
    before, behind = [IDS["<|im_start|>"], 5, 6], [[11, 12, 13], [14]]
    rows = [[*before, IDS["<|image_pad|>"], *more] for more in behind]
    ids = torch.tensor([rows[0], [*rows[1], 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        found = qwen(images=images, input_ids=ids, attention_mask=mask)["logits"]
        words = qwen(input_ids=torch.tensor([before]))["logits"]
        alone = original_logits(weights, tiny, before, None, [])
        for row in range(2):
            expected = original_logits(weights, tiny, before, images[row], behind[row])
            assert (found[row, : len(expected)] - expected).abs().max() < 1e-4
    assert (words[0] - alone).abs().max() < 1e-4


def reference_answers(qwen: QwenVLM, frames: list[Frame], rows: list[list[int]]) -> list[list[int]]:
    """What transformers' own generate says, prompts padded on the left."""
    image, merge = qwen.config.image_token_id, qwen.images.merge
    cells, grids, whole = [], [], []
    for frame, row in zip(frames, rows, strict=True):
        prepared = qwen._pixels(frame.pixels)
        cells.append(patches(prepared, qwen.images, torch.device("cpu"), torch.float32))
        height, width = (side // qwen.images.patch for side in prepared.shape[:2])
        grids.append([1, height, width])
        at = row.index(image)
        whole.append([*row[:at], *[image] * (height * width // merge**2), *row[at + 1 :]])
    longest = max(map(len, whole))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in whole])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in whole])
    with torch.no_grad():
        given = qwen.module.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.cat(cells),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(ids == image).int(),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=qwen._suppressed(),
            eos_token_id=IDS["<|im_end|>"],
            pad_token_id=IDS["<|endoftext|>"],
        )
    return given[:, longest:].tolist()


def test_answers_equal_those_of_transformers_for_a_batch_of_sizes(qwen: QwenVLM) -> None:
    frames = [
        Frame(noise(71, 130), "c", 1),
        Frame(noise(200, 90, 1), "c", 2),
        Frame(noise(64, 64, 2), "c", 3),
    ]
    texts = ["what is it?", "a red cube on the table", "why"]
    params = GenerationParams(max_new_tokens=12)
    requests = [
        InferenceRequest(str(i), frame, "answer", prompt=text, params=params)
        for i, (frame, text) in enumerate(zip(frames, texts, strict=True))
    ]
    qwen.config.text_config.eos_token_id = IDS["<|im_end|>"]
    rows = [list(qwen.prepare(request)[1]) for request in requests]
    expected = reference_answers(qwen, frames, rows)
    answers = qwen.run(requests)
    assert len({tuple(row) for row in expected}) == 3
    generated = qwen.generate(frames, text=texts, max_new_tokens=12).tolist()
    for answer, ids, row in zip(answers, generated, expected, strict=True):
        length = row.index(IDS["<|im_end|>"]) + 1 if IDS["<|im_end|>"] in row else len(row)
        assert ids[:length] == row[:length]
        assert answer.text == qwen.decode_text(row[:length]).strip()


@pytest.mark.parametrize("learnt", [False, True])
def test_logits_and_loss_equal_those_of_transformers_forward(qwen: QwenVLM, learnt: bool) -> None:
    """Theirs numbers the places of an image only where `mm_token_type_ids` says where it is."""
    random = torch.Generator().manual_seed(4)
    factor, merge = qwen.images.factor, qwen.images.merge
    images = torch.randn(2, 3, 2 * factor, 4 * factor, generator=random)
    start, image, end = (IDS[f"<|{n}|>"] for n in ("vision_start", "image_pad", "vision_end"))
    behind = torch.randint(20, 60, (2, 5), generator=random)
    ids = torch.tensor([[5, 6, start, *[image] * 8, end, *row] for row in behind.tolist()])
    labels = torch.cat([torch.full((2, 12), -100), behind], dim=1) if learnt else None
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat(
            [patches(one, qwen.images, torch.device("cpu"), torch.float32) for one in images]
        ),
        "image_grid_thw": torch.tensor([[1, 2 * merge, 4 * merge]] * 2),
        "mm_token_type_ids": (ids == image).int(),
    }
    with torch.no_grad():
        theirs = qwen.module(input_ids=ids, labels=labels, **given)
        ours = qwen(images=images, input_ids=ids, labels=labels)
    torch.testing.assert_close(ours["logits"], theirs.logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        qwen(images=images.flip(2), input_ids=ids)["logits"], theirs.logits, atol=1e-3
    )
    if learnt:
        # Theirs gives tokens that are no words a share of the probability.
        words = theirs.logits[:, 11:-1].clone()
        words[..., qwen._suppressed()] = -torch.inf
        expected = torch.nn.functional.cross_entropy(words.flatten(0, 1), behind.flatten())
        torch.testing.assert_close(ours["loss"], expected)


def test_a_frame_seen_before_answers_the_same(qwen: QwenVLM) -> None:
    frame, params = Frame(noise(71, 130), "c", 1), GenerationParams(max_new_tokens=6)
    request = InferenceRequest("r", frame, "caption", params=params)
    first, second = qwen.run([request])[0], qwen.run([request])[0]
    assert first.text == second.text
    assert qwen.frames.hits == 1
    (embedded,) = qwen.run([InferenceRequest("e", frame, "embed")])
    assert embedded.embedding.array.shape == (32,)


def test_images_of_any_size_and_several_views(qwen: QwenVLM) -> None:
    first, second = noise(71, 130), noise(200, 90, 1)
    counts = [qwen._count(qwen._pixels(image)) for image in (first, second)]
    with torch.no_grad():
        alone = [qwen.encode_image(image)[0] for image in (first, second)]
        batch = qwen.encode_image([first, second])
        views = qwen.encode_image([[first, second]])
    assert [len(features) for features in alone] == counts
    assert batch.shape == (2, max(counts), 32)
    assert not batch[0, counts[0] :].any() or counts[0] == max(counts)
    for row in range(2):
        assert torch.allclose(batch[row, : counts[row]], alone[row], atol=1e-5)
    assert torch.allclose(views[0], torch.cat(alone), atol=1e-5)
    with pytest.raises(VlmError, match="multiples of"):
        qwen.encode_image(torch.randn(1, 3, 30, 30))
    with pytest.raises(VlmError, match="too narrow"):
        qwen.encode_image(noise(2, 500))


def test_each_view_stands_between_its_own_marks_and_has_its_own_places(qwen: QwenVLM) -> None:
    start, image, end = (IDS[f"<|{n}|>"] for n in ("vision_start", "image_pad", "vision_end"))
    row = [5, start, image, end, 6]
    seen = ImageFeatures(torch.zeros(5, 32), (3, 2), ((1, 3), (2, 1)))
    order = qwen._order(row, seen.counts)
    assert order == [0, 1, -1, -1, -1, 3, 1, -1, -1, 3, 4]
    assert qwen._places(order, seen).tolist() == [
        *([0] * 3, [1] * 3, [2, 2, 2], [2, 2, 3], [2, 2, 4], [5] * 3, [6] * 3),
        *([7, 7, 7], [7, 8, 7], [9] * 3, [10] * 3),
    ]
    both = [[noise(71, 130), noise(200, 90, 1)]]
    assert qwen.generate(both, text=["what?"], max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("name", sorted(GENERATIONS))
def test_published_bounds_and_sizes_up_to_4k(name: str, folders: dict[str, Path]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vlm = create_vlm(name, pretrained=str(folders[name]), device="cpu")
    settings = vlm.images
    bounds = {"qwen2-vl-2b": (3136, 12845056), "qwen3-vl-4b": (65536, 16777216)}
    assert (settings.min_pixels, settings.max_pixels) == bounds[name]
    random = np.random.default_rng(5)
    sizes = [*random.integers(1, 2200, (200, 2)).tolist(), [2160, 3840], [42, 70], [5000, 5001]]
    for height, width in sizes:
        if max(height, width) <= 200 * min(height, width):
            expected = smart_resize(
                height, width, settings.factor, settings.min_pixels, settings.max_pixels
            )
            assert smart_size(height, width, settings) == expected
    ours, theirs = pixels(vlm, noise(2160, 3840))
    assert (ours - theirs).abs().max() < 1e-5
    small = create_vlm(name, pretrained=str(folders[name]), device="cpu", max_pixels=100_000)
    assert small._count(small._pixels(noise(2160, 3840))) <= 100_000 // settings.factor**2


def test_bounds_that_are_none_are_refused(folders: dict[str, Path]) -> None:
    for given in ({"max_pixels": 100}, {"min_pixels": 90_000, "max_pixels": 80_000}):
        with pytest.raises(VlmError) as caught:
            create_vlm("qwen2-vl-2b", pretrained=str(folders["qwen2-vl-2b"]), **given)
        assert caught.value.code == ErrorCode.BAD_CONFIG
    with pytest.raises(VlmError):
        QwenImages(14, 2, 2, 0, 0, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", sorted(GENERATIONS))
def test_every_layout_on_disk_gives_the_same_model(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    state = load_file(folders[name] / "model.safetensors")
    expected = load_module(folders[name], "float32", "cpu").state_dict()
    new = {"model.visual.": "visual.", "model.language_model.": "model."}
    for layout in ({}, new, {**new, "model.language_model.": "language_model.model."}):

        def renamed(key: str, layout: dict[str, str] = layout) -> str:
            full = key
            if not key.startswith(("model.visual.", "model.language_model.", "lm_head.")):
                full = "model." + key if key.startswith("visual.") else key
                if key.startswith("model."):
                    full = "model.language_model." + key.removeprefix("model.")
            for old, short in layout.items():
                if full.startswith(old):
                    return short + full.removeprefix(old)
            return full

        save_file({renamed(key): value for key, value in state.items()}, tmp_path / "m.safetensors")
        (tmp_path / "config.json").write_text((folders[name] / "config.json").read_text())
        for key, value in load_module(tmp_path, "float32", "cpu").state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_a_saved_folder_gives_the_same_model(qwen: QwenVLM, tmp_path: Path, ask) -> None:
    qwen.save_pretrained(tmp_path)
    again = create_vlm(qwen.name, pretrained=str(tmp_path), device="cpu")
    for (name, old), (_, new) in zip(
        qwen.module.state_dict().items(), again.module.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name
    request = ask("caption", params=GenerationParams(max_new_tokens=4))
    assert again.run([request])[0].text == qwen.run([request])[0].text
    assert again.images == qwen.images


def test_sampling_settings_of_the_folder_wait_until_asked_for(qwen: QwenVLM) -> None:
    rules = qwen.rules(GenerationParams())
    assert rules.temperature == 0.0
    assert rules.eos == (IDS["<|im_end|>"], IDS["<|endoftext|>"])
    assert qwen.rules(GenerationParams(temperature=0.7, top_p=0.8)).top_p == 0.8


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|box_start|>", "<image>"])
def test_words_of_a_user_never_become_control_tokens(qwen: QwenVLM, ask, token: str) -> None:
    _, prompt = qwen.prepare(ask("answer", prompt=f"what {token} is it"))
    _, plain = qwen.prepare(ask("answer", prompt="what is it"))
    control = qwen.tokenizer.control_ids
    assert [t for t in prompt if t in control] == [t for t in plain if t in control]


def test_the_chat_is_the_published_one(qwen: QwenVLM, ask) -> None:
    _, prompt = qwen.prepare(ask("answer", prompt="why"))
    names = {number: token for token, number in qwen.tokenizer.vocabulary.items()}
    text = "".join(names[token] for token in prompt).replace("▁", " ")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == (system if qwen.name.startswith("qwen2") else "") + (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>why<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not {*qwen._ids(["why"], None, None)[0]} & qwen._image_marks()


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_usage_examples_run(name: str) -> None:
    torch.manual_seed(0)
    model = create_vlm(name, config={"variant": name, **TINY[name]}, device="cpu")
    for parameter in model.vision_encoder.parameters():
        parameter.requires_grad = False
    images = torch.randn(2, 3, 224, 224)
    input_ids, labels = torch.randint(0, 1000, (2, 50)), torch.randint(0, 1000, (2, 50))
    model.gradient_checkpointing_enable()
    model.train()
    outputs = model(images=images, input_ids=input_ids, labels=labels)
    outputs["loss"].backward()
    assert model.language_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert next(model.vision_encoder.parameters()).grad is None
    options = {"max_new_tokens": 5, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    generated = model.generate(images=images, input_ids=input_ids[:, :10], **options)
    assert generated.shape[0] == 2
    assert torch.equal(generated, model.generate(images, input_ids[:, :10], **options))
    features: Tensor = model.encode_image(images)
    assert features.shape == (2, (224 // model.images.factor) ** 2, model.get_embedding_dim())
    assert model.encode_text(input_ids).shape == (2, 50, model.get_embedding_dim())
    model.unfreeze()
    model.freeze_language()
    model.freeze_vision()
    left = {key for key, p in model.module.named_parameters() if p.requires_grad}
    assert left
    assert all("merger" in key for key in left)


def test_seven_billion_of_the_third_is_the_vendors_eight() -> None:
    info = model_info("qwen3-vl-7b")
    assert info.name == "qwen3-vl-8b"
    assert "alias" in info.description


def test_a_folder_of_the_other_generation_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(VlmError) as caught:
        create_vlm("qwen2-vl-2b", pretrained=str(folders["qwen3-vl-4b"]), device="cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG
    with pytest.raises(VlmError, match="image_token_id"):
        create_vlm("qwen2-vl-2b", config={"text_config": TEXT}, device="cpu")


def test_patches_of_another_size_than_the_model_has_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    original.write_official(tmp_path, SECOND)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 16}))
    with pytest.raises(VlmError, match="patches") as caught:
        create_vlm("qwen2-vl-2b", pretrained=str(tmp_path), device="cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG


def test_how_many_vectors_an_image_becomes_needs_the_whole_image(qwen: QwenVLM) -> None:
    assert qwen.input_size(640, 480) is None


def test_resizing_fast_hardly_changes_the_pixels(folders: dict[str, Path]) -> None:
    found = []
    for how in ("exact", "fast"):
        qwen = create_vlm(
            "qwen2-vl-2b", pretrained=str(folders["qwen2-vl-2b"]), device="cpu", resize=how
        )
        prepared = qwen._pixels(noise(100, 130))
        found.append(patches(prepared, qwen.images, torch.device("cpu"), torch.float32))
    assert found[0].shape == found[1].shape
    assert 0 < (found[0] - found[1]).abs().max() < 0.05
