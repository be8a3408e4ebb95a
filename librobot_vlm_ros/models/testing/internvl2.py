"""InternVL2 at tiny size: an official checkpoint, and the original arithmetic."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.models.families.internvl2.processor import INTERNVL_TASKS, SYSTEM
from librobot_vlm_ros.models.families.preprocess import normalise
from librobot_vlm_ros.models.testing.parts import heads, layer_norm, turned

__all__ = [
    "ADDED",
    "TEXT",
    "VISION",
    "difference",
    "image_features",
    "original_logits",
    "pixels",
    "read_official",
    "write_official",
]

VISION: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14}
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
#: Tokens that take the place of pieces, and tokens that stand behind all pieces, in this order.
_RENAMED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>")
_RENAMED += ("<|im_end|>", "<|im_start|>")
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>")
ADDED += ("<box>", "</box>")


def _pieces() -> bytes:
    """A sentencepiece file like InternLM2's: a few merges, bytes for the rest, unused pieces."""
    import sentencepiece

    sentences = [SYSTEM, *INTERNVL_TASKS.values(), "[[251, 37, 468, 990]] a red cube"] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=440,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[f"[UNUSED_TOKEN_{141 + i}]" for i in range(len(_RENAMED))],
        minloglevel=3,
    )
    return model.getvalue()


def _config(words: int) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": VISION["image_size"],
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "use_thumbnail": True,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "llm_config": {
            **TEXT,
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "attn_implementation": "flash_attention_2",
            "vocab_size": words,
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **VISION,
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "initializer_factor": 1.0,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "num_channels": 3,
            "qk_normalization": False,
            "qkv_bias": True,
            "use_flash_attn": True,
        },
    }


def _weights(config: dict[str, Any]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    state: dict[str, Tensor] = {}

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.2

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = normal(rows, columns)
        if bias:
            state[f"{name}.bias"] = normal(rows)

    def norm(name: str, size: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = 1 + normal(size)
        if bias:
            state[f"{name}.bias"] = normal(size)

    seen, text = config["vision_config"], config["llm_config"]
    wide, patch = seen["hidden_size"], seen["patch_size"]
    at, normed = "vision_model.embeddings.", seen["norm_type"] == "layer_norm"
    places = (seen["image_size"] // patch) ** 2 + 1
    state[f"{at}class_embedding"] = normal(1, 1, wide)
    state[f"{at}position_embedding"] = normal(1, places, wide)
    state[f"{at}patch_embedding.weight"] = normal(wide, 3, patch, patch) * 0.2
    state[f"{at}patch_embedding.bias"] = normal(wide)
    for layer in range(seen["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        state[f"{at}ls1"], state[f"{at}ls2"] = 1 + normal(wide), 1 + normal(wide)
        norm(f"{at}norm1", wide, bias=normed)
        norm(f"{at}norm2", wide, bias=normed)
        linear(f"{at}attn.qkv", 3 * wide, wide, bias=seen["qkv_bias"])
        linear(f"{at}attn.proj", wide, wide)
        linear(f"{at}mlp.fc1", seen["intermediate_size"], wide)
        linear(f"{at}mlp.fc2", wide, seen["intermediate_size"])
        if seen["qk_normalization"]:
            norm(f"{at}attn.q_norm", wide, bias=False)
            norm(f"{at}attn.k_norm", wide, bias=False)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    norm("mlp1.0", 4 * wide)
    linear("mlp1.1", hidden, 4 * wide)
    linear("mlp1.3", hidden, hidden)
    # Wide, so that answers vary: a freshly initialised model repeats the token it was fed.
    linear("language_model.model.tok_embeddings", text["vocab_size"], hidden, bias=False)
    linear("language_model.output", text["vocab_size"], hidden, bias=False)
    norm("language_model.model.norm", hidden, bias=False)
    size = hidden // text["num_attention_heads"]
    packed = (text["num_attention_heads"] + 2 * text["num_key_value_heads"]) * size
    for layer in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        linear(f"{at}attention.wqkv", packed, hidden, bias=text["bias"])
        linear(f"{at}attention.wo", hidden, hidden, bias=text["bias"])
        linear(f"{at}feed_forward.w1", inner, hidden, bias=False)
        linear(f"{at}feed_forward.w3", inner, hidden, bias=False)
        linear(f"{at}feed_forward.w2", hidden, inner, bias=False)
        norm(f"{at}attention_norm", hidden, bias=False)
        norm(f"{at}ffn_norm", hidden, bias=False)
    return state


def write_official(
    folder: Path,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> None:
    """A folder laid out as OpenGVLab/InternVL2-8B; the rest changes its config.json."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces()
    (folder / "tokenizer.model").write_bytes(pieces)
    known = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    count = known.get_piece_size()
    first = known.piece_to_id("[UNUSED_TOKEN_141]")
    added = {token: first + place for place, token in enumerate(_RENAMED)}
    added |= {token: count + place for place, token in enumerate(ADDED)}
    config = _config(count + len(ADDED)) | top
    config["vision_config"] |= vision or {}
    config["llm_config"] |= text or {}
    decoder = {"0": "<unk>", "1": "<s>", "2": "</s>"}
    decoder |= {str(number): token for token, number in added.items()}
    settings = {
        "add_bos_token": True,
        "added_tokens_decoder": {i: {"content": token} for i, token in decoder.items()},
        "tokenizer_class": "InternLM2Tokenizer",
    }
    side = VISION["image_size"]
    images = {"crop_size": side, "size": side, "resample": 3, "do_center_crop": True}
    images |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    images["feature_extractor_type"] = "CLIPFeatureExtractor"
    state = _weights(config)
    names = sorted(state)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    for name, content in (
        ("config", config),
        ("added_tokens", added),
        ("tokenizer_config", settings),
        ("preprocessor_config", images),
        ("generation_config", {"eos_token_id": [added["<|im_end|>"], added["<|im_start|>"]]}),
        ("model.safetensors.index", {"metadata": {}, "weight_map": weight_map}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


SIDE = 448
#: Ids before and behind an image.
BEFORE, BEHIND = [1, 300, 301, 7], [20, 33, 9]


def read_official(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of such a folder by their official names, and its config.json."""
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    return state, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the converted module and the original arithmetic."""
    state, config = read_official(folder)
    side = config["vision_config"]["image_size"]
    tiles = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = original_logits(state, config, BEFORE, tiles, BEHIND)
    count = len(expected) - len(BEFORE) - len(BEHIND)
    ids = torch.tensor([[*BEFORE, *[module.config.image_token_id] * count, *BEHIND]])
    with torch.no_grad():
        found = module(
            input_ids=ids, pixel_values=tiles, attention_mask=torch.ones_like(ids)
        ).logits[0]
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """The published side's tiles [N, 3, H, W]: ours, and the reference processor's."""
    from PIL import Image
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    vlm.images = settings = dataclasses.replace(vlm.images, side=SIDE)
    ours = normalise(vlm._pixels(image), settings, torch.device("cpu"), torch.float32)
    reference = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        min_patches=settings.min_tiles,
        max_patches=settings.max_tiles,
        size={"height": SIDE, "width": SIDE},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
    theirs = reference(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return ours, theirs


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))


def _rms(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * state[f"{name}.weight"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def image_features(state: dict[str, Tensor], config: dict[str, Any], tile: Tensor) -> Tensor:
    """A tile [3, side, side] to vectors [N, D] of the language model's space."""
    vision = config["vision_config"]
    patch, count, eps = (
        vision["patch_size"],
        vision["num_attention_heads"],
        vision["layer_norm_eps"],
    )
    normed = layer_norm if vision["norm_type"] == "layer_norm" else _rms
    across = vision["image_size"] // patch
    base = "vision_model.embeddings."
    kernel = state[f"{base}patch_embedding.weight"].flatten(1)
    cells = [
        kernel @ tile[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].flatten()
        + state[f"{base}patch_embedding.bias"]
        for y in range(across)
        for x in range(across)
    ]
    x = torch.stack([state[f"{base}class_embedding"][0, 0], *cells])
    x = x + state[f"{base}position_embedding"][0]
    states = [x]
    for layer in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        q, k, v = _linear(state, f"{at}attn.qkv", normed(state, f"{at}norm1", x, eps)).split(
            x.shape[1], dim=1
        )
        if vision["qk_normalization"]:
            q, k = (_rms(state, f"{at}attn.{n}_norm", t, eps) for n, t in (("q", q), ("k", k)))
        q, k, v = (heads(part, count) for part in (q, k, v))
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = _linear(state, f"{at}attn.proj", mixed.transpose(0, 1).flatten(1))
        x = x + state[f"{at}ls1"] * y
        y = _gelu(_linear(state, f"{at}mlp.fc1", normed(state, f"{at}norm2", x, eps)))
        x = x + state[f"{at}ls2"] * _linear(state, f"{at}mlp.fc2", y)
        states.append(x)
    seen = states[config["select_layer"]][1:].view(across, across, -1)
    # Four neighbours become one, row by row: upper left, upper right, lower left, lower right.
    corners = [seen[y::2, x::2] for y in (0, 1) for x in (0, 1)]
    merged = torch.cat(corners, dim=-1).flatten(0, 1)
    hidden = _linear(state, "mlp1.1", layer_norm(state, "mlp1.0", merged, 1e-5))
    return _linear(state, "mlp1.3", _gelu(hidden))


def _theta(text: dict[str, Any], length: int) -> float:
    """The base of the rotary angles; larger where a row is longer than the model was made for."""
    theta, scaling = float(text["rope_theta"]), text["rope_scaling"]
    longest = text["max_position_embeddings"]
    if scaling is None or length <= longest:
        return theta
    size = text["hidden_size"] // text["num_attention_heads"]
    stretch = scaling["factor"] * length / longest - (scaling["factor"] - 1)
    return float(theta * stretch ** (size / (size - 2)))


def original_logits(
    state: dict[str, Tensor],
    config: dict[str, Any],
    before: Sequence[int],
    tiles: Sequence[Tensor] | Tensor,
    behind: Sequence[int],
) -> Tensor:
    """Logits [T, words] of words, an image of any number of tiles, and words again."""
    text = config["llm_config"]
    eps, table = text["rms_norm_eps"], state["language_model.model.tok_embeddings.weight"]
    seen = [image_features(state, config, tile) for tile in tiles]
    x = torch.cat([table[list(before)], *seen, table[list(behind)]])
    length, theta = len(x), _theta(text, len(x))
    size = text["hidden_size"] // text["num_attention_heads"]
    groups = text["num_key_value_heads"]
    shared = text["num_attention_heads"] // groups
    hidden_future = torch.full((length, length), -math.inf).triu(1)
    for layer in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        packed = _linear(
            state, f"{at}attention.wqkv", _rms(state, f"{at}attention_norm", x, eps)
        ).unflatten(1, (groups, shared + 2, size))
        mixed = []
        for group in range(groups):
            *queries, key, value = packed[:, group].unbind(1)
            key = turned(key[None], theta)[0]
            for query in queries:
                weights = turned(query[None], theta)[0] @ key.T / math.sqrt(size)
                mixed.append((weights + hidden_future).softmax(-1) @ value)
        x = x + _linear(state, f"{at}attention.wo", torch.cat(mixed, dim=1))
        y = _rms(state, f"{at}ffn_norm", x, eps)
        gate = F.silu(_linear(state, f"{at}feed_forward.w1", y))
        up = _linear(state, f"{at}feed_forward.w3", y)
        x = x + _linear(state, f"{at}feed_forward.w2", gate * up)
    return _linear(state, "language_model.output", _rms(state, "language_model.model.norm", x, eps))
