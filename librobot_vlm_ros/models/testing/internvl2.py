"""InternVL2 at tiny size: an official checkpoint, and the original arithmetic."""

from __future__ import annotations

import json
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
from librobot_vlm_ros.models.testing.conformance import our_pixels
from librobot_vlm_ros.models.testing.parts import (
    RandomWeights,
    State,
    attention,
    causal_mask,
    gelu,
    heads,
    layer_norm,
    linear,
    official_config,
    patches,
    pieces,
    reference_pixels,
    rms_norm,
    rotary,
    rotary_angles,
    write_json,
    write_shards,
)

_CONFIG = official_config("internvl2")
VISION, TEXT = _CONFIG["vision_config"], _CONFIG["llm_config"]
#: Tokens that take the place of pieces, and tokens that stand behind all pieces, in this order.
_RENAMED = (
    *("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"),
    *("<|im_end|>", "<|im_start|>"),
)
ADDED = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>"),
    *("<box>", "</box>"),
)


def _pieces() -> bytes:
    """A sentencepiece file like InternLM2's, with unused pieces."""
    return pieces(
        [SYSTEM, *INTERNVL_TASKS.values(), "[[251, 37, 468, 990]] a red cube"],
        440,
        add_dummy_prefix=False,
        user_defined_symbols=[f"[UNUSED_TOKEN_{141 + i}]" for i in range(len(_RENAMED))],
    )


def _weights(config: dict[str, Any]) -> State:
    made = RandomWeights(7)
    seen, text = config["vision_config"], config["llm_config"]
    wide, patch = seen["hidden_size"], seen["patch_size"]
    at, normed = "vision_model.embeddings.", seen["norm_type"] == "layer_norm"
    places = (seen["image_size"] // patch) ** 2 + 1
    made.add(f"{at}class_embedding", 1, 1, wide)
    made.add(f"{at}position_embedding", 1, places, wide)
    made.add(f"{at}patch_embedding.weight", wide, 3, patch, patch, scale=0.2)
    made.add(f"{at}patch_embedding.bias", wide)
    for layer in range(seen["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        for name in ("ls1", "ls2"):
            made.state[f"{at}{name}"] = 1 + made.normal(wide)
        made.norm(f"{at}norm1", wide, bias=normed)
        made.norm(f"{at}norm2", wide, bias=normed)
        made.linear(f"{at}attn.qkv", 3 * wide, wide, bias=seen["qkv_bias"])
        made.linear(f"{at}attn.proj", wide, wide)
        made.linear(f"{at}mlp.fc1", seen["intermediate_size"], wide)
        made.linear(f"{at}mlp.fc2", wide, seen["intermediate_size"])
        if seen["qk_normalization"]:
            made.norm(f"{at}attn.q_norm", wide, bias=False)
            made.norm(f"{at}attn.k_norm", wide, bias=False)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    made.norm("mlp1.0", 4 * wide)
    made.linear("mlp1.1", hidden, 4 * wide)
    made.linear("mlp1.3", hidden, hidden)
    # Wide, so that answers vary: a freshly initialised model repeats the token it was fed.
    made.linear("language_model.model.tok_embeddings", text["vocab_size"], hidden, bias=False)
    made.linear("language_model.output", text["vocab_size"], hidden, bias=False)
    made.norm("language_model.model.norm", hidden, bias=False)
    size = hidden // text["num_attention_heads"]
    packed = (text["num_attention_heads"] + 2 * text["num_key_value_heads"]) * size
    for layer in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        made.linear(f"{at}attention.wqkv", packed, hidden, bias=text["bias"])
        made.linear(f"{at}attention.wo", hidden, hidden, bias=text["bias"])
        made.linear(f"{at}feed_forward.w1", inner, hidden, bias=False)
        made.linear(f"{at}feed_forward.w3", inner, hidden, bias=False)
        made.linear(f"{at}feed_forward.w2", hidden, inner, bias=False)
        made.norm(f"{at}attention_norm", hidden, bias=False)
        made.norm(f"{at}ffn_norm", hidden, bias=False)
    return made.state


def write_official(
    folder: Path,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> None:
    """A folder laid out as OpenGVLab/InternVL2-8B; the rest changes its config.json."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = _pieces()
    (folder / "tokenizer.model").write_bytes(model)
    known = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = known.get_piece_size()
    first = known.piece_to_id("[UNUSED_TOKEN_141]")
    added = {token: first + place for place, token in enumerate(_RENAMED)}
    added |= {token: count + place for place, token in enumerate(ADDED)}
    config = {**_CONFIG, **top, "vision_config": {**VISION, **(vision or {})}}
    config["llm_config"] = {**TEXT, "vocab_size": count + len(ADDED), **(text or {})}
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
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files = {
        "config": config,
        "added_tokens": added,
        "tokenizer_config": settings,
        "preprocessor_config": images,
        "generation_config": {"eos_token_id": [added["<|im_end|>"], added["<|im_start|>"]]},
        "model.safetensors.index": write_shards(folder, _weights(config), shards, save_file),
    }
    write_json(folder, **files)


SIDE = 448
#: Ids before and behind an image.
BEFORE, BEHIND = [1, 300, 301, 7], [20, 33, 9]


def read_official(folder: Path) -> tuple[State, dict[str, Any]]:
    """All tensors of such a folder by their official names, and its config.json."""
    state: State = {}
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
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    settings = vlm.images
    reference = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        min_patches=settings.min_tiles,
        max_patches=settings.max_tiles,
        size={"height": SIDE, "width": SIDE},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
    return our_pixels(vlm, image, side=SIDE), reference_pixels(reference, image)


def image_features(state: State, config: dict[str, Any], tile: Tensor) -> Tensor:
    """A tile [3, side, side] to vectors [N, D] of the language model's space."""
    vision = config["vision_config"]
    count, eps = vision["num_attention_heads"], vision["layer_norm_eps"]
    normed = layer_norm if vision["norm_type"] == "layer_norm" else rms_norm
    across = vision["image_size"] // vision["patch_size"]
    base = "vision_model.embeddings."
    x = patches(tile, state[f"{base}patch_embedding.weight"])
    x = torch.cat([state[f"{base}class_embedding"][0], x + state[f"{base}patch_embedding.bias"]])
    x = x + state[f"{base}position_embedding"][0]
    states = [x]
    for layer in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        q, k, v = linear(state, f"{at}attn.qkv", normed(state, f"{at}norm1", x, eps)).chunk(3, 1)
        if vision["qk_normalization"]:
            q, k = (rms_norm(state, f"{at}attn.{n}_norm", t, eps) for n, t in (("q", q), ("k", k)))
        mixed = attention(*(heads(part, count) for part in (q, k, v)))
        x = x + state[f"{at}ls1"] * linear(state, f"{at}attn.proj", mixed)
        y = gelu(linear(state, f"{at}mlp.fc1", normed(state, f"{at}norm2", x, eps)))
        x = x + state[f"{at}ls2"] * linear(state, f"{at}mlp.fc2", y)
        states.append(x)
    seen = states[config["select_layer"]][1:].view(across, across, -1)
    # Four neighbours become one, row by row: upper left, upper right, lower left, lower right.
    corners = [seen[y::2, x::2] for y in (0, 1) for x in (0, 1)]
    merged = torch.cat(corners, dim=-1).flatten(0, 1)
    hidden = linear(state, "mlp1.1", layer_norm(state, "mlp1.0", merged, 1e-5))
    return linear(state, "mlp1.3", gelu(hidden))


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
    state: State,
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
    groups = text["num_key_value_heads"]
    shared = text["num_attention_heads"] // groups
    size = text["hidden_size"] // text["num_attention_heads"]
    angles, mask = rotary_angles(len(x), size, _theta(text, len(x))), causal_mask(len(x))
    for layer in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        y = rms_norm(state, f"{at}attention_norm", x, eps)
        # A group is its queries, the key that they share, and the value.
        packed = linear(state, f"{at}attention.wqkv", y).unflatten(1, (groups, shared + 2, size))
        q, k, v = packed.permute(1, 2, 0, 3).split([shared, 1, 1], dim=1)
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        mixed = attention(rotary(q, angles), rotary(k, angles), v, mask)
        x = x + linear(state, f"{at}attention.wo", mixed)
        y = rms_norm(state, f"{at}ffn_norm", x, eps)
        gate = F.silu(linear(state, f"{at}feed_forward.w1", y))
        up = linear(state, f"{at}feed_forward.w3", y)
        x = x + linear(state, f"{at}feed_forward.w2", gate * up)
    x = rms_norm(state, "language_model.model.norm", x, eps)
    return linear(state, "language_model.output", x)
