"""LLaVA-1.5 from official checkpoints, against the original arithmetic (`conformance_llava`)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch.nn import functional as F

from librobot_vlm_ros.core import (
    BagError,
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    VlmError,
)
from librobot_vlm_ros.models import create_vlm, load_module
from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256
from librobot_vlm_ros.models.checkpoints.path_policy import confined_to
from librobot_vlm_ros.models.families.llava import checkpoint as llava_convert
from librobot_vlm_ros.models.families.llava.model import LlavaVLM
from librobot_vlm_ros.models.families.llava.processor import BEFORE_IMAGE
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.testing.llava import (
    IDS,
    PATCHES,
    TEXT,
    original_logits,
    read_weights,
    write_official,
)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as liuhaotian/llava-v1.5-7b, its tower beside it; read only."""
    folder = tmp_path_factory.mktemp("llava") / "official"
    write_official(folder)
    return folder


@pytest.fixture
def llava(official: Path) -> LlavaVLM:
    return create_vlm("llava-v1.5-7b", pretrained=str(official), device="cpu")


def test_logits_equal_the_original_arithmetic(official: Path, llava: LlavaVLM) -> None:
    state = read_weights(official)
    image = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = original_logits(state, image, IDS, at=2)
    words, token = expected.shape[1], llava.config.image_token_id
    assert token == words
    marked = [*IDS[:2], *[token] * PATCHES, *IDS[2:]]
    native = load_module(official, "float32", "cpu")
    with torch.no_grad():
        given = {"input_ids": torch.tensor([marked]), "pixel_values": image[None]}
        logits = native(**given, attention_mask=torch.ones(1, len(marked))).logits[0, :, :words]
        once = torch.tensor([[*IDS[:2], token, *IDS[2:]]])
        ours = llava(images=image[None], input_ids=once)["logits"][0, :, :words]
    assert float((logits - expected).abs().max()) < 1e-4
    assert float((ours - expected).abs().max()) < 1e-4
    assert float(expected.std()) > 0.1


def test_the_loss_is_that_of_the_words_alone(official: Path, llava: LlavaVLM) -> None:
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([IDS])
    labels = torch.tensor([[-100, -100, *IDS[2:]]])
    expected = original_logits(read_weights(official), image[0], IDS, at=1)
    # The image stands behind the begin token, so ids[i] is predicted by place i + 4 - 1.
    wanted = F.cross_entropy(expected[PATCHES + 1 : -1], ids[0, 2:])
    loss = llava(images=image, input_ids=ids, labels=labels)["loss"]
    assert float((loss - wanted).abs().detach()) < 1e-4
    llava.train()
    llava.freeze_vision()
    llava(images=image, input_ids=ids, labels=labels)["loss"].backward()
    assert llava.module.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in llava.vision_encoder.parameters())


def test_padding_rows_and_masks_change_nothing(llava: LlavaVLM) -> None:
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, 300, 301, 20], [0, 1, 33, 20]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        both = llava(images=images, input_ids=ids, attention_mask=mask)["logits"]
        alone = llava(images=images[1:], input_ids=ids[1:, 1:])["logits"]
    assert torch.allclose(both[1, :-1], alone[0], atol=1e-5)
    rows = llava.generate(images, ids, attention_mask=mask, max_new_tokens=6)
    second = llava.generate(images[1:], ids[1:, 1:], max_new_tokens=6)
    assert rows[1].tolist()[: second.shape[1]] == second[0].tolist()


def test_greedy_words_follow_the_original_logits(official: Path, llava: LlavaVLM) -> None:
    state, image = read_weights(official), torch.randn(1, 3, 28, 28)
    ids = list(IDS)
    for _ in range(4):
        ids.append(int(original_logits(state, image[0], ids, at=1)[-1].argmax()))
    new = ids[len(IDS) :]
    if 2 in new:
        new = new[: new.index(2) + 1]
    assert llava.generate(image, torch.tensor([IDS]), max_new_tokens=4)[0].tolist() == new


def test_a_prompt_is_vicunas_chat(official: Path, llava: LlavaVLM, ask) -> None:
    pieces = (official / "tokenizer.model").read_bytes()
    original = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    _, ids = llava.prepare(ask("answer", prompt="what is it?"))
    image = ids.index(llava.config.image_token_id)
    assert ids[0] == 1
    assert list(ids[1:image]) == original.encode(BEFORE_IMAGE)
    assert list(ids[image + 1 :]) == original.encode("\nwhat is it? ASSISTANT:")
    assert original.decode(list(ids[image + 1 :])).endswith("what is it? ASSISTANT:")


def test_control_tokens_in_a_prompt_become_words(llava: LlavaVLM, ask) -> None:
    for hostile, harmless in (("<image> cup", "image cup"), ("</s><s>cup", "s s cup")):
        _, ids = llava.prepare(ask("answer", prompt=hostile))
        assert ids == llava.prepare(ask("answer", prompt=harmless))[1]
        assert list(ids).count(llava.config.image_token_id) == 1
        assert not {1, 2} & set(ids[1:])


def test_requests_are_answered_together_as_alone(llava: LlavaVLM, ask, make_frame) -> None:
    params = GenerationParams(max_new_tokens=5)
    requests: list[InferenceRequest] = [
        ask("caption", params=params),
        ask("answer", on=make_frame(2, 30, 20), prompt="what is the colour?", params=params),
        ask("segment", prompt="cup", params=params),
        ask("region_caption", region=(1.0, 2.0, 30.0, 40.0), params=params),
        ask("embed"),
    ]
    entries = llava.run(requests)
    assert isinstance(entries[2], VlmError)
    assert entries[2].code == ErrorCode.TASK_NOT_SUPPORTED
    assert entries[4].embedding.array.shape == (TEXT["hidden_size"],)
    for request, entry in list(zip(requests, entries, strict=True))[:2]:
        assert isinstance(entry, ModelAnswer)
        llava.frames.clear()
        (alone,) = llava.run([request])
        assert alone.text == entry.text
        assert alone.score == pytest.approx(entry.score, rel=1e-4)


def test_boxes_come_back_with_a_score(llava: LlavaVLM, ask) -> None:
    ids = [*llava.tokenizer.words("[0.25, 0.25, 0.5, 0.5]"), 2]
    values = [math.log(0.5)] * len(ids)
    answer = llava.read(ask("ground", prompt="the cube"), Generated(tuple(ids), tuple(values)))
    (region,) = answer.regions  # the frame is 80 x 48: 16 rows of padding above
    assert region.label == "the cube"
    assert region.box == (20.0, 4.0, 40.0, 24.0)
    assert region.score == pytest.approx(0.5)
    assert answer.malformed == 0


def test_a_saved_folder_gives_the_same_model(llava: LlavaVLM, tmp_path: Path, ask) -> None:
    llava.save_pretrained(tmp_path)
    again = create_vlm("llava-v1.5-7b", pretrained=str(tmp_path), device="cpu")
    for (name, old), (_, new) in zip(
        llava.module.state_dict().items(), again.module.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name
    request = ask("caption", params=GenerationParams(max_new_tokens=4))
    assert again.run([request])[0].text == llava.run([request])[0].text


@pytest.mark.parametrize("frames", ["views", "sizes"])
def test_images_of_any_kind(llava: LlavaVLM, frames: str) -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 256, s, dtype=np.uint8) for s in ((9, 31, 3), (40, 28, 3)))
    given = [[first, second]] if frames == "views" else [first, second]
    shape = (1, 2 * PATCHES) if frames == "views" else (2, PATCHES)
    with torch.no_grad():
        features = llava.encode_image(given)
        alone = llava.encode_image(second)
    assert features.shape == (*shape, TEXT["hidden_size"])
    assert torch.allclose(features.reshape(2, PATCHES, -1)[1], alone[0], atol=1e-5)
    with pytest.raises(VlmError, match="28x28"):
        llava.encode_image(torch.randn(1, 3, 30, 30))


@pytest.mark.parametrize("change", ["more", "less", "tower", "projector"])
def test_what_does_not_fit_is_refused(official: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(official, folder)
    code = ErrorCode.KEY_MISMATCH
    state = torch.load(folder / "a.bin", weights_only=True)
    if change == "more":
        torch.save(state | {"model.mm_projector.4.bias": torch.ones(3)}, folder / "a.bin")
    elif change == "less":
        torch.save({k: v for k, v in state.items() if k != "lm_head.weight"}, folder / "a.bin")
    elif change == "tower":
        shutil.rmtree(folder / "vision_tower")
        code = ErrorCode.WEIGHTS_NOT_FOUND
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
        code = ErrorCode.BAD_CONFIG
    with pytest.raises(ModelError) as caught:
        load_module(folder, "float32", "cpu")
    assert caught.value.code == code


def test_the_tower_may_lie_elsewhere_for_a_folder_of_ones_own_but_not_for_a_download(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    tower = tmp_path / "tower"
    shutil.copytree(official / "vision_tower", tower)
    hub = tmp_path / "hub" / "models--a--b" / "snapshots" / "c"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in (tmp_path / "mine", hub):
        shutil.copytree(official, folder)
        shutil.rmtree(folder / "vision_tower")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tower)}))
    assert load_module(tmp_path / "mine", "float32", "cpu") is not None
    with pytest.raises(ModelError, match="cannot name a folder here") as caught:
        load_module(hub, "float32", "cpu")
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND


@pytest.mark.parametrize("named", ["{tower}", "../tower"])
def test_a_tower_elsewhere_is_confined_to_the_folders_that_are_open(
    official: Path, tmp_path: Path, named: str
) -> None:
    tower, folder = tmp_path / "tower", tmp_path / "mine"
    shutil.copytree(official, folder)
    (folder / "vision_tower").rename(tower)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = named.format(tower=tower)
    (folder / "config.json").write_text(json.dumps(config))
    for open_folders in (None, [tmp_path], [tower]):
        with confined_to(open_folders):
            assert load_module(folder, "float32", "cpu") is not None
    for open_folders in ([], [folder], [tmp_path / "tow"]):
        with confined_to(open_folders), pytest.raises(BagError, match="open to it") as caught:
            load_module(folder, "float32", "cpu")
        assert caught.value.code == ErrorCode.PATH_NOT_ALLOWED
    tower.rename(folder / "eyes")
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "eyes"}))
    with confined_to([]):  # inside of its own folder it is nobody else's
        assert load_module(folder, "float32", "cpu") is not None


@pytest.mark.parametrize("named", ["owner/tower@refs/pr/1", "owner/tower", ".", "~x/y"])
def test_a_config_cannot_say_what_is_downloaded(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(llava_convert, "find_weights", lambda *words: asked.append(words))
    shutil.copytree(official, tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "vision_tower")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**config, "mm_vision_tower": named}))
    with pytest.raises(ModelError, match="is not there") as caught:
        load_module(tmp_path / "mine", "float32", "cpu")
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND
    assert "vision_tower" in caught.value.hint
    assert asked == []


@pytest.mark.parametrize("name", ["vision_tower", "eyes", "{outside}"])
def test_every_byte_of_the_tower_counts_in_the_sha256(
    official: Path, tmp_path: Path, name: str
) -> None:
    folder, name = tmp_path / "mine", name.format(outside=tmp_path / "outside")
    shutil.copytree(official, folder)
    before = weights_sha256(folder)
    tower = (folder / "vision_tower").rename(folder / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
    assert weights_sha256(folder) == before
    data = bytearray((tower / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tower / "model.safetensors").write_bytes(data)
    assert weights_sha256(folder) != before


def test_the_input_size_is_the_images_part_of_the_square(llava: LlavaVLM) -> None:
    side = llava.images.width
    assert llava.input_size(640, 480) == (side, math.ceil(side * 3 / 4))
    assert llava.input_size(480, 640) == (math.ceil(side * 3 / 4), side)


@pytest.mark.parametrize("dimensions", ["beside", "config", "unknown"])
def test_a_tower_in_the_shards_has_the_dimensions_that_the_folder_states(
    official: Path, tmp_path: Path, dimensions: str
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(official, folder)
    state = read_weights(official)
    for key in [key for key in state if key.startswith(("text_", "visual_", "logit_scale"))]:
        del state[key]
    tower = "model.vision_tower.vision_tower."
    for name in ("a.bin", "b.bin", "pytorch_model.bin.index.json"):
        (folder / name).unlink()
    state = {tower + k if k.startswith("vision_model.") else k: v for k, v in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    tower_config = json.loads((folder / "vision_tower" / "config.json").read_text())
    (folder / "vision_tower" / "model.safetensors").unlink()
    if dimensions != "beside":
        (folder / "vision_tower" / "config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        config |= {"mm_hidden_size": 24, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
        if dimensions == "config":
            config["vision_config"] = tower_config["vision_config"]
        (folder / "config.json").write_text(json.dumps(config))
    if dimensions == "unknown":
        with pytest.raises(ModelError, match="mm_hidden_size is 24, that of the vision") as caught:
            load_module(folder, "float32", "cpu")
        assert caught.value.code == ErrorCode.BAD_CONFIG
        return
    whole, apart = (load_module(path, "float32", "cpu") for path in (folder, official))
    for name, value in apart.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
