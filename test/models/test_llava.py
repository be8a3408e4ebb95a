"""LLaVA-1.5 from official checkpoints, against the original arithmetic written here.

`original_logits` follows LLaVA (llava_arch.py: features of the last but one CLIP layer without the
class token, an MLP of two layers, put in the image's place), CLIP (Radford et al. 2021) and Llama
(Touvron et al. 2023). It reads tensors by their official names and knows nothing of transformers.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    VlmError,
)
from librobot_vlm_ros.models import create_vlm, load_module
from librobot_vlm_ros.models.decode import Generated
from librobot_vlm_ros.models.llava import LlavaVLM
from librobot_vlm_ros.models.llava_prompts import BEFORE_IMAGE, LLAVA_TASKS

VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PATCHES, EPS = 4, 1e-5


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A sentencepiece file like Llama's: a few merges, bytes for the rest."""
    sentences = [BEFORE_IMAGE, *LLAVA_TASKS.values(), "[0.25, 0.5, 0.75, 1.0] a red cube"] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return model.getvalue()


def official_config(words: int) -> dict:
    return {
        **TEXT,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": words,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "max_position_embeddings": 1024,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
    }


def clip_weights(normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    width, inner, base = VISION["hidden_size"], VISION["intermediate_size"], "vision_model."
    state = {
        f"{base}embeddings.class_embedding": normal(width),
        f"{base}embeddings.position_ids": torch.arange(PATCHES + 1)[None],
        f"{base}embeddings.patch_embedding.weight": normal(width, 3, 14, 14),
        f"{base}embeddings.position_embedding.weight": normal(PATCHES + 1, width),
        "text_model.embeddings.position_ids": torch.arange(7)[None],
        "text_model.final_layer_norm.weight": normal(9),
        "text_projection.weight": normal(16, 9),
        "visual_projection.weight": normal(16, width),
        "logit_scale": normal(),
    }
    norms = [f"{base}pre_layrnorm", f"{base}post_layernorm"]
    for layer in range(VISION["num_hidden_layers"]):
        at = f"{base}encoder.layers.{layer}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        sizes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        for name, size in {**sizes, "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}.items():
            state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = normal(*size), normal(size[0])
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + normal(width), normal(width)
    return state


def llama_weights(normal: Callable[..., Tensor], words: int) -> dict[str, Tensor]:
    width, inner, seen = TEXT["hidden_size"], TEXT["intermediate_size"], VISION["hidden_size"]
    kv = width // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    state = {
        "model.embed_tokens.weight": normal(words, width),
        "model.norm.weight": 1 + normal(width),
        "lm_head.weight": normal(words, width),
        "model.mm_projector.0.weight": normal(width, seen),
        "model.mm_projector.0.bias": normal(width),
        "model.mm_projector.2.weight": normal(width, width),
        "model.mm_projector.2.bias": normal(width),
    }
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        state[f"{at}self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        for name, size in {
            "self_attn.q_proj": (width, width),
            "self_attn.o_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }.items():
            state[f"{at}{name}.weight"] = normal(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{norm}.weight"] = 1 + normal(width)
    return state


@pytest.fixture(scope="module")
def official(pieces: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as liuhaotian/llava-v1.5-7b, its tower beside it; read only."""
    folder = tmp_path_factory.mktemp("llava") / "official"
    (folder / "vision_tower").mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(pieces)
    words = sentencepiece.SentencePieceProcessor(model_proto=pieces).get_piece_size()
    (folder / "config.json").write_text(json.dumps(official_config(words)))
    random = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.2

    state = llama_weights(normal, words)
    names = sorted(state)
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    for shard, keys in shards.items():
        torch.save({key: state[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    save_file(clip_weights(normal), folder / "vision_tower" / "model.safetensors")
    config = {"model_type": "clip", "vision_config": {**VISION, "model_type": "clip_vision_model"}}
    (folder / "vision_tower" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llava(official: Path) -> LlavaVLM:
    return create_vlm("llava-v1.5-7b", pretrained=str(official), device="cpu")


def weights_of(folder: Path) -> dict[str, Tensor]:
    state = {}
    for shard in ("a.bin", "b.bin"):
        state |= torch.load(folder / shard, weights_only=True)
    return state | load_file(folder / "vision_tower" / "model.safetensors")


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def clip_features(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """[3, 28, 28] to the patches [4, 24] of the last but one layer."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + EPS
        ).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    base, count = "vision_model.", VISION["num_attention_heads"]
    kernel = state[f"{base}embeddings.patch_embedding.weight"].flatten(1)
    cells = [image[:, y : y + 14, x : x + 14].flatten() for y in (0, 14) for x in (0, 14)]
    x = torch.stack([state[f"{base}embeddings.class_embedding"], *(kernel @ c for c in cells)])
    x = norm(x + state[f"{base}embeddings.position_embedding.weight"], f"{base}pre_layrnorm")
    for layer in range(VISION["num_hidden_layers"] - 1):
        at = f"{base}encoder.layers.{layer}."
        y = norm(x, f"{at}layer_norm1")
        q, k, v = (heads(linear(y, f"{at}self_attn.{n}_proj"), count) for n in "qkv")
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).flatten(1), f"{at}self_attn.out_proj")
        y = linear(norm(x, f"{at}layer_norm2"), f"{at}mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{at}mlp.fc2")
    return x[1:]


def original_logits(state: dict[str, Tensor], image: Tensor, ids: list[int], at: int) -> Tensor:
    """Logits [T, words] of `ids` with the image in front of ids[at]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * state[f"{name}.weight"]

    seen = clip_features(state, image)
    seen = seen @ state["model.mm_projector.0.weight"].T + state["model.mm_projector.0.bias"]
    seen = seen * 0.5 * (1 + torch.erf(seen / math.sqrt(2)))
    seen = seen @ state["model.mm_projector.2.weight"].T + state["model.mm_projector.2.bias"]
    words = state["model.embed_tokens.weight"][ids]
    x = torch.cat([words[:at], seen, words[at:]])
    count, groups = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    size, length = TEXT["hidden_size"] // count, len(x)
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(y: Tensor) -> Tensor:
        pairs = torch.complex(y[..., : size // 2], y[..., size // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    hidden_future = torch.full((length, length), -math.inf).triu(1)
    for layer in range(TEXT["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        y = norm(x, f"{base}input_layernorm")
        q, k, v = (
            heads(y @ state[f"{base}self_attn.{n}_proj.weight"].T, c)
            for n, c in (("q", count), ("k", groups), ("v", groups))
        )
        k, v = (t.repeat_interleave(count // groups, dim=0) for t in (rotate(k), v))
        weights = (rotate(q) @ k.transpose(1, 2) / math.sqrt(size) + hidden_future).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ state[f"{base}self_attn.o_proj.weight"].T
        y = norm(x, f"{base}post_attention_layernorm")
        gate = y @ state[f"{base}mlp.gate_proj.weight"].T
        up = y @ state[f"{base}mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ state[f"{base}mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ state["lm_head.weight"].T


IDS = [1, 300, 301, 7, 20, 33]


def test_logits_equal_the_original_arithmetic(official: Path, llava: LlavaVLM) -> None:
    state = weights_of(official)
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
    expected = original_logits(weights_of(official), image[0], IDS, at=1)
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
    state, image = weights_of(official), torch.randn(1, 3, 28, 28)
    ids = list(IDS)
    for _ in range(4):
        ids.append(int(original_logits(state, image[0], ids, at=1)[-1].argmax()))
    new = ids[len(IDS) :]
    if 2 in new:
        new = new[: new.index(2) + 1]
    assert llava.generate(image, torch.tensor([IDS]), max_new_tokens=4)[0].tolist() == new


def test_a_prompt_is_vicunas_chat(pieces: bytes, llava: LlavaVLM, ask) -> None:
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
