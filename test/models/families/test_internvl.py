"""InternVL2 from official checkpoints, against the original arithmetic (`conformance_internvl`)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.core import ErrorCode, Frame, GenerationParams, InferenceRequest, VlmError
from librobot_vlm_ros.models import create_vlm, load_module
from librobot_vlm_ros.models.families.internvl2.model import InternVLVLM
from librobot_vlm_ros.models.families.internvl2.processor import SYSTEM, float_tiles
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.inputs.preprocess import normalise
from librobot_vlm_ros.models.processor import number_texts
from librobot_vlm_ros.models.testing.internvl2 import (
    TEXT,
    difference,
    image_features,
    original_logits,
    read_official,
    write_official,
)

SIDE, TILE = 56, 4
WIDTH = TEXT["hidden_size"]
BEFORE, BEHIND = [1, 300, 301], [20, 33, 9, 40]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as OpenGVLab/InternVL2-8B; read only."""
    folder = tmp_path_factory.mktemp("internvl") / "official"
    write_official(folder)
    return folder


@pytest.fixture
def internvl(official: Path) -> InternVLVLM:
    return create_vlm("internvl2-2b", pretrained=str(official), device="cpu")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sown(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"select_layer": -2},
        {"vision": {"qk_normalization": True, "qkv_bias": False}},
        {"vision": {"norm_type": "rms_norm"}},
        {"text": {"bias": True, "rope_scaling": None}},
        {"text": {"num_key_value_heads": 4}},
        # Longer than the model was made for: the rotary base grows.
        {"text": {"max_position_embeddings": 12}},
    ],
    ids=str,
)
def test_logits_equal_the_original_arithmetic(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_official(tmp_path, **changes)
    module = load_module(tmp_path, "float32", "cpu")
    assert 0 < difference(tmp_path, module) < 1e-4
    config = module.config
    assert not config.tie_word_embeddings
    assert module.lm_head.weight is not module.get_input_embeddings().weight


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision": {"qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm"}},
        {"text": {"bias": True}},
    ],
    ids=str,
)
def test_what_config_leaves_out_is_read_off_the_tensors(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_official(tmp_path, **changes)
    whole = (tmp_path / "config.json").read_text()
    config = json.loads(whole)
    for part, names in (
        ("vision_config", ("qk_normalization", "qkv_bias", "norm_type")),
        ("llm_config", ("bias",)),
    ):
        for name in names:
            del config[part][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = load_module(tmp_path, "float32", "cpu")
    (tmp_path / "config.json").write_text(whole)
    assert difference(tmp_path, module) < 1e-4


def test_logits_of_an_image_in_a_prompt_equal_the_original(
    official: Path, internvl: InternVLVLM
) -> None:
    state, config = read_official(official)
    image = sown(3, SIDE, 2 * SIDE)
    halves = [image[:, :, :SIDE], image[:, :, SIDE:]]
    thumbnail = float_tiles(image, internvl.images)[2]
    expected = original_logits(state, config, BEFORE, [*halves, thumbnail], BEHIND)
    ids = torch.tensor([[*BEFORE, internvl.config.image_token_id, *BEHIND]])
    with torch.no_grad():
        found = internvl(images=image, input_ids=ids)["logits"][0]
        words = internvl(input_ids=torch.tensor([BEFORE]))["logits"][0]
    assert float((found - expected).abs().max()) < 1e-4
    assert float((words - original_logits(state, config, BEFORE, [], [])).abs().max()) < 1e-4
    assert float(expected.std()) > 0.1


def test_the_loss_is_that_of_the_words_alone(official: Path, internvl: InternVLVLM) -> None:
    state, config = read_official(official)
    image, token = sown(1, 3, SIDE, SIDE), internvl.config.image_token_id
    ids = torch.tensor([[*BEFORE, token, *BEHIND]])
    labels = torch.full_like(ids, -100)
    labels[0, -len(BEHIND) :] = torch.tensor(BEHIND)
    expected = original_logits(state, config, BEFORE, image, BEHIND)[-len(BEHIND) - 1 : -1]
    expected[:, token] = torch.finfo(torch.float32).min
    wanted = F.cross_entropy(expected, torch.tensor(BEHIND))
    internvl.train()
    internvl.freeze_vision()
    internvl.gradient_checkpointing_enable()
    loss = internvl(images=image, input_ids=ids, labels=labels)["loss"]
    assert float((loss - wanted).abs().detach()) < 1e-4
    loss.backward()
    assert internvl.module.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in internvl.vision_encoder.parameters())


def test_answers_equal_those_of_transformers_for_a_batch_of_sizes(internvl: InternVLVLM) -> None:
    frames = [Frame(noise(40, 130), "c", 1), Frame(noise(200, 90, 1), "c", 2)]
    frames.append(Frame(noise(SIDE, SIDE, 2), "c", 3))
    texts = ["what is it?", "is there a red cube in the image?", "why"]
    params = GenerationParams(max_new_tokens=8)
    requests = [
        InferenceRequest(str(i), frame, "answer", prompt=text, params=params)
        for i, (frame, text) in enumerate(zip(frames, texts, strict=True))
    ]
    token, tiles, rows = internvl.config.image_token_id, [], []
    for request in requests:
        prompt = internvl.processor.request_ids(request)
        prepared = internvl.pixels(request.frame.pixels)
        tiles.append(normalise(prepared, internvl.images, torch.device("cpu"), torch.float32))
        at = prompt.index(token)
        rows.append([*prompt[:at], *[token] * (TILE * len(prepared)), *prompt[at + 1 :]])
    longest = max(map(len, rows))
    with torch.no_grad():
        given = internvl.module.generate(
            input_ids=torch.tensor([[2] * (longest - len(row)) + row for row in rows]),
            attention_mask=torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            ),
            pixel_values=torch.cat(tiles),
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=internvl.processor.suppressed(),
            eos_token_id=internvl.config.text_config.eos_token_id,
            pad_token_id=2,
        )
    expected = given[:, longest:].tolist()
    assert len({tuple(row) for row in expected}) == 3
    generated = internvl.generate(frames, text=texts, max_new_tokens=8).tolist()
    for answer, ids, row in zip(internvl.run(requests), generated, expected, strict=True):
        assert ids == row
        assert answer.text == internvl.decode_text(row).strip()


def as_published(folder: Path, text: str) -> list[int]:
    """Ids as the original tokenizer gives them: cut at its added tokens, pieces between."""
    added = json.loads((folder / "added_tokens.json").read_text())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [pieces.bos_id()]
    for part in re.split(f"({'|'.join(map(re.escape, added))})", text):
        ids += [added[part]] if part in added else pieces.encode(part)
    return ids


CHAT = f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n"


@pytest.mark.parametrize(
    ("task", "fields", "asked"),
    [
        ("answer", {"prompt": "what is it?"}, "what is it?"),
        ("caption", {}, "Provide a one-sentence caption for the provided image."),
        (
            "ground",
            {"prompt": "the red cube"},
            "Please provide the bounding box coordinate of the region this sentence describes: "
            "<ref>the red cube</ref>",
        ),
        (
            "region_caption",
            {"region": (20.0, 12.0, 40.0, 48.0)},
            "Please provide a short description for this region: <box>[[250, 250, 500, 1000]]"
            "</box>",
        ),
    ],
)
def test_a_prompt_is_the_published_template(
    official: Path, internvl: InternVLVLM, ask, task: str, fields: dict[str, Any], asked: str
) -> None:
    ids = tuple(internvl.processor.request_ids(ask(task, **fields)))
    image = "<img><IMG_CONTEXT></img>\n"
    wanted = f"{CHAT}{image}{asked}<|im_end|><|im_start|>assistant\n"
    assert list(ids) == as_published(official, wanted)


def test_several_images_are_numbered_and_words_alone_have_no_place_for_one(
    official: Path, internvl: InternVLVLM
) -> None:
    image, tail = "<img><IMG_CONTEXT></img>\n", "<|im_end|><|im_start|>assistant\n"
    two = f"{CHAT}Image-1: {image}Image-2: {image}what changed?{tail}"
    assert internvl.processor.ids(["what changed?"], None, [2])[0] == as_published(official, two)
    none = f"{CHAT}what changed?{tail}"
    assert internvl.processor.ids(["what changed?"], None, None)[0] == as_published(official, none)
    both = [[noise(30, 90), noise(56, 56, 1)]]
    assert internvl.generate(both, text=["what changed?"], max_new_tokens=3).shape[0] == 1
    with pytest.raises(VlmError, match="1 images for 2 prompts"):
        internvl.generate(both, text=["one", "two"])


@pytest.mark.parametrize(
    "token", ["<IMG_CONTEXT>", "</img>", "<|im_end|>", "<box>", "</ref>", "[UNUSED_TOKEN_145]"]
)
def test_words_of_a_user_never_become_control_tokens(
    internvl: InternVLVLM, ask, token: str
) -> None:
    control = internvl.tokenizer.control_ids
    for task in ("answer", "ground"):
        plain = tuple(internvl.processor.request_ids(ask(task, prompt="what is it")))
        for hostile in (f"what {token} is it", f"{token}", f"a<{token}>b"):
            prompt = tuple(internvl.processor.request_ids(ask(task, prompt=hostile)))
            assert [t for t in prompt if t in control] == [t for t in plain if t in control]


def test_what_gets_past_the_cleaning_is_pieces_or_refused(internvl: InternVLVLM) -> None:
    words = internvl.tokenizer.words
    assert not {*words("<IMG_CONTEXT></img><|im_end|>")} & internvl.tokenizer.control_ids
    with pytest.raises(VlmError, match="im_end") as caught:
        words("[UNUSED_TOKEN_145]")  # a piece of the file, whose place <|im_end|> has taken
    assert caught.value.code == ErrorCode.CONTROL_TOKEN_IN_PROMPT


def test_an_answer_is_read_as_the_tokenizer_spells_it(internvl: InternVLVLM) -> None:
    vocabulary = internvl.tokenizer.vocabulary
    assert "[UNUSED_TOKEN_145]" not in vocabulary
    ids = [vocabulary["<ref>"], *internvl.tokenizer.words("a red cube"), vocabulary["</ref>"]]
    ends = [vocabulary["<|im_end|>"], 2]
    assert internvl.decode_text([*ids, *ends]) == "<ref>a red cube</ref>"
    rules = internvl.processor.generation_config(GenerationParams())
    assert rules.eos == (vocabulary["<|im_end|>"], vocabulary["<|im_start|>"], 2)
    assert internvl.config.image_token_id in rules.suppressed


def test_requests_are_answered_together_as_alone(internvl: InternVLVLM, ask, make_frame) -> None:
    params = GenerationParams(max_new_tokens=5)
    requests = [
        ask("caption", params=params),
        ask("answer", on=make_frame(2, 30, 20), prompt="what is the colour?", params=params),
        ask("segment", prompt="cup", params=params),
        ask("embed"),
    ]
    entries = internvl.run(requests)
    assert entries[2].code == ErrorCode.TASK_NOT_SUPPORTED
    assert "florence-2-base" in str(entries[2])
    with pytest.raises(VlmError, match="florence-2-base") as caught:
        internvl.generate(noise(9, 9), task="segment", text="cup")
    assert caught.value.code == ErrorCode.TASK_NOT_SUPPORTED
    assert entries[3].embedding.array.shape == (WIDTH,)
    for request, entry in list(zip(requests, entries, strict=True))[:2]:
        internvl.backend.frames.clear()
        (alone,) = internvl.run([request])
        assert alone.text == entry.text
        assert alone.score == pytest.approx(entry.score, rel=1e-4)


def test_boxes_come_back_with_the_score_of_label_and_numbers(internvl: InternVLVLM, ask) -> None:
    known, say = internvl.tokenizer.vocabulary, internvl.tokenizer.words
    before = [known["<ref>"], *say("the cube"), known["</ref>"], known["<box>"]]
    numbers = say("[[250, 250, 500, 750]]")
    ids = [*before, *numbers, known["</box>"], known["<|im_end|>"]]
    values = [math.log(0.9)] * len(before) + [math.log(0.5)] * len(numbers) + [math.log(0.9)] * 2
    # Each digit has half of the probability, another half went to what is no number.
    texts = number_texts(internvl.tokenizer)
    numbers = {
        step: [math.log(0.5) if token == ids[step] else -math.inf for token in texts]
        for step, token in enumerate(ids)
        if token in texts or ids[step - 1] in texts
    }
    answer = internvl.processor.read(
        ask("ground", prompt="it"), Generated(tuple(ids), tuple(values), numbers)
    )
    (region,) = answer.regions  # the frame is 80 x 48
    assert region.label == "the cube"
    assert region.box == (20.0, 12.0, 40.0, 36.0)
    label = [0.9] * len(say("the cube"))
    coordinates = [0.5 ** len(number) for number in ("250", "250", "500", "750")]
    expected = math.prod([*label, *coordinates]) ** (1 / (len(label) + 4))
    assert region.score == pytest.approx(expected)
    assert answer.malformed == 0


def test_images_of_any_size_and_several_views(official: Path, internvl: InternVLVLM) -> None:
    first, second = noise(30, 130), noise(200, 90, 1)
    counts = [internvl.processor.count(internvl.pixels(image)) for image in (first, second)]
    with torch.no_grad():
        alone = [internvl.encode_image(image)[0] for image in (first, second)]
        batch = internvl.encode_image([first, second])
        views = internvl.encode_image([[first, second]])
        floats = internvl.encode_image(sown(2, 2, 3, SIDE, SIDE))
    assert [len(features) for features in alone] == counts
    assert counts[0] == TILE * (4 + 1)  # four in a row, and a thumbnail
    assert batch.shape == (2, max(counts), WIDTH)
    for row in range(2):
        assert torch.allclose(batch[row, : counts[row]], alone[row], atol=1e-5)
    assert torch.allclose(views[0], torch.cat(alone), atol=1e-5)
    assert floats.shape == (2, 2 * TILE, WIDTH)
    state, config = read_official(official)
    tile = image_features(state, config, sown(2, 2, 3, SIDE, SIDE)[1, 0])
    assert torch.allclose(floats[1, :TILE], tile, atol=1e-4)
    with pytest.raises(VlmError, match="expected"):
        internvl.encode_image(torch.randn(1, 2, 30, 30))
    with pytest.raises(VlmError, match="has none"):
        internvl.encode_image(torch.zeros(1, 3, 0, 30))


def test_many_tiles_are_looked_at_in_parts(
    internvl: InternVLVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [noise(30, 130), noise(200, 90, 1)]
    with torch.no_grad():
        together = internvl.encode_image(images)
        monkeypatch.setattr("librobot_vlm_ros.models.families.internvl2.model._AT_ONCE", 2)
        in_parts = internvl.encode_image(images)
    assert torch.allclose(together, in_parts, atol=1e-5)


def test_images_up_to_4k_and_a_limit_of_tiles(official: Path) -> None:
    for limit, most in ((None, 12), (4, 4), (1, 1), (40, 40)):
        vlm = create_vlm("internvl2-2b", pretrained=str(official), device="cpu", max_tiles=limit)
        count = len(vlm.pixels(noise(2160, 3840)))
        assert count <= most + (most > 1)
        assert vlm.processor.count(vlm.pixels(noise(2160, 3840))) == TILE * count
        assert vlm.images.max_tiles == most
    for bad in (0, 41, 2.5):
        with pytest.raises(VlmError) as caught:
            create_vlm("internvl2-2b", pretrained=str(official), device="cpu", max_tiles=bad)
        assert caught.value.code == ErrorCode.BAD_CONFIG


def test_a_saved_folder_gives_the_same_model(official: Path, tmp_path: Path, ask) -> None:
    vlm = create_vlm("internvl2-8b", pretrained=str(official), device="cpu", max_tiles=6)
    vlm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "internvl"
    again = create_vlm("internvl2-8b", pretrained=str(tmp_path), device="cpu")
    for (name, old), (_, new) in zip(
        vlm.module.state_dict().items(), again.module.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name
    request = ask("caption", params=GenerationParams(max_new_tokens=4))
    assert again.run([request])[0].text == vlm.run([request])[0].text
    assert again.images == vlm.images
    assert again.tokenizer.vocabulary == vlm.tokenizer.vocabulary
    again.load_pretrained(str(official))
    assert again.images.max_tiles == 12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_computes_the_same(official: Path, attention: str) -> None:
    vlm = create_vlm("internvl2-2b", pretrained=str(official), device="cpu", attention=attention)
    assert vlm.module.config.vision_config._attn_implementation == attention
    assert vlm.module.config.text_config._attn_implementation == attention
    assert difference(official, vlm.module) < 1e-4
    with pytest.raises(VlmError) as caught:
        create_vlm(
            "internvl2-2b", pretrained=str(official), attention="flash_attention_2", device="cpu"
        )
    assert caught.value.code == ErrorCode.ATTENTION_UNAVAILABLE


def test_the_module_needs_no_tokenizer(official: Path, tmp_path: Path) -> None:
    for path in official.iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    module = load_module(tmp_path, "float32", "cpu")
    assert module.config.image_token_id == load_module(official, "float32").config.image_token_id
    assert difference(tmp_path, module) < 1e-4


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "transposed": ({"ps_version": "v1"}, "ps_version"),
    "other reader": ({"text": {"architectures": ["Phi3ForCausalLM"]}}, "Phi3ForCausalLM"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "resized": ({"force_image_size": 224}, "force_image_size"),
    "norms": ({"vision": {"qk_normalization": True, "layer_norm_eps": 1e-5}}, "layer_norm_eps"),
    "later chat": ({"template": "internvl2_5"}, "internvl2_5"),
    "padded": ({"pad2square": True}, "pad2square"),
    "tiles": ({"max_dynamic_patch": 0}, "tiles"),
    "grid": ({"downsample_ratio": 0.3}, "patches"),
    "nothing": ({"llm_config": None}, "cannot be read"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_configurations_that_mean_something_else_are_refused(
    official: Path, tmp_path: Path, case: str
) -> None:
    changes, told = BROKEN[case]
    config = json.loads((official / "config.json").read_text())
    top = {name: value for name, value in changes.items() if name not in ("vision", "text")}
    config["vision_config"] |= changes.get("vision", {})
    config["llm_config"] |= changes.get("text", {})
    for path in official.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(json.dumps(config | top))
    with pytest.raises(VlmError, match=told) as caught:
        create_vlm("internvl2-2b", pretrained=str(tmp_path), device="cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG


def test_a_native_folder_with_another_reader_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "internvl", "text_config": {"model_type": "qwen2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmError, match="qwen2") as caught:
        load_module(tmp_path, "float32", "cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("more", ErrorCode.KEY_MISMATCH),
        ("less", ErrorCode.KEY_MISMATCH),
        ("packed", ErrorCode.SHAPE_MISMATCH),
        ("image token", ErrorCode.TOKENIZER_MISMATCH),
        ("boxes", ErrorCode.TOKENIZER_MISMATCH),
        ("two ids", ErrorCode.TOKENIZER_MISMATCH),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, change: str, code: ErrorCode
) -> None:
    from safetensors.torch import load_file, save_file

    write_official(tmp_path)
    shards = {path: load_file(path) for path in tmp_path.glob("*.safetensors")}
    packed = "language_model.model.layers.0.attention.wqkv.weight"
    shard, state = next((s, t) for s, t in shards.items() if packed in t)
    added_file, settings = tmp_path / "added_tokens.json", tmp_path / "tokenizer_config.json"
    added = json.loads(added_file.read_text())
    if change == "more":
        state["mlp1.4.weight"] = torch.ones(3)
    elif change == "less":
        del state[packed]
    elif change == "packed":
        state[packed] = state[packed][:-1].clone()
    else:
        if change == "image token":
            # Without it config.json's vocabulary tells the place; the tokenizer says otherwise.
            added["<IMG_CONTEXT>"], added["<quad>"] = added["<quad>"], added["<IMG_CONTEXT>"]
            del added["<IMG_CONTEXT>"]
        elif change == "boxes":
            del added["<box>"]
        if change != "two ids":
            settings.unlink()
        else:
            added["<box>"] -= 1
        added_file.write_text(json.dumps(added))
    save_file(state, shard)
    with pytest.raises(VlmError) as caught:
        create_vlm("internvl2-2b", pretrained=str(tmp_path), device="cpu")
    assert caught.value.code == code
