"""InternVL2 at tiny size: the original arithmetic, to compare a converted checkpoint with.

`original_logits` follows InternViT (Chen et al., 2023, arXiv:2312.14238), the pixel shuffle of
InternVL 1.5 (Chen et al., 2024, arXiv:2404.16821) and InternLM2 (Cai et al., 2024,
arXiv:2403.17297). It reads tensors by their official names and knows nothing of transformers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.models.conformance_internvl_folder import write_official
from librobot_vlm_ros.models.conformance_parts import heads, layer_norm, turned
from librobot_vlm_ros.models.preprocess import normalise

__all__ = [
    "difference",
    "image_features",
    "original_logits",
    "pixels",
    "read_official",
    "write_official",
]

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
