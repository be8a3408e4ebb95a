"""LLaVA-1.5 at tiny size: an official checkpoint, and the original arithmetic to compare with.

`original_logits` follows LLaVA (llava_arch.py: features of the last but one CLIP layer without the
class token, an MLP of two layers, put in the image's place), CLIP (Radford et al. 2021) and Llama
(Touvron et al. 2023). It reads tensors by their official names and knows nothing of transformers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.models.families.llava.model import CLIP_MEAN, CLIP_STD
from librobot_vlm_ros.models.families.llava.processor import BEFORE_IMAGE, LLAVA_TASKS
from librobot_vlm_ros.models.families.preprocess import normalise
from librobot_vlm_ros.models.testing.parts import (
    encoder_weights,
    heads,
    layer_norm,
    projection_sizes,
    turned,
)

__all__ = ["difference", "original_logits", "pixels", "read_weights", "write_official"]

SIDE = 336
VISION: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16}
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PATCHES, EPS = 4, 1e-5
#: Token ids; the image stands behind the first.
IDS = [1, 300, 301, 7, 20, 33]


def _pieces() -> bytes:
    """A sentencepiece file like Llama's: a few merges, bytes for the rest."""
    import sentencepiece

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


def _config(words: int) -> dict[str, Any]:
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


def _clip_weights(normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    width, base = VISION["hidden_size"], "vision_model."
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
    return state | encoder_weights(normal, base, VISION, norms)


def _llama_weights(normal: Callable[..., Tensor], words: int) -> dict[str, Tensor]:
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
        for name, size in projection_sizes(width, inner, kv).items():
            state[f"{at}{name}.weight"] = normal(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{norm}.weight"] = 1 + normal(width)
    return state


def write_official(folder: Path) -> None:
    """A folder laid out as liuhaotian/llava-v1.5-7b, its tower beside it."""
    import sentencepiece

    (folder / "vision_tower").mkdir(parents=True)
    pieces = _pieces()
    (folder / "tokenizer.model").write_bytes(pieces)
    words = sentencepiece.SentencePieceProcessor(model_proto=pieces).get_piece_size()
    (folder / "config.json").write_text(json.dumps(_config(words)))
    random = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.2

    state = _llama_weights(normal, words)
    names = sorted(state)
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    for shard, keys in shards.items():
        torch.save({key: state[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    save_file(_clip_weights(normal), folder / "vision_tower" / "model.safetensors")
    config = {"model_type": "clip", "vision_config": {**VISION, "model_type": "clip_vision_model"}}
    (folder / "vision_tower" / "config.json").write_text(json.dumps(config))


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the converted module and the original arithmetic."""
    image = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = original_logits(read_weights(folder), image, IDS, at=1)
    words = expected.shape[1]
    ids = torch.tensor([[IDS[0], *[module.config.image_token_id] * PATCHES, *IDS[1:]]])
    with torch.no_grad():
        found = module(
            input_ids=ids, pixel_values=image[None], attention_mask=torch.ones_like(ids)
        ).logits[0, :, :words]
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """The published side's pixels [1, 3, H, W]: ours, and the reference processor's."""
    from PIL import Image
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    vlm.images = dataclasses.replace(vlm.images, height=SIDE, width=SIDE)
    ours = normalise([vlm._pixels(image)], vlm.images, torch.device("cpu"), torch.float32)
    reference = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    theirs = reference(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return ours, theirs


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of such a folder by their official names."""
    state = {}
    for shard in ("a.bin", "b.bin"):
        state |= torch.load(folder / shard, weights_only=True)
    return state | load_file(folder / "vision_tower" / "model.safetensors")


def _clip_features(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """[3, 28, 28] to the patches [4, 24] of the last but one layer."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(state, name, x, EPS)

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

    seen = _clip_features(state, image)
    seen = seen @ state["model.mm_projector.0.weight"].T + state["model.mm_projector.0.bias"]
    seen = seen * 0.5 * (1 + torch.erf(seen / math.sqrt(2)))
    seen = seen @ state["model.mm_projector.2.weight"].T + state["model.mm_projector.2.bias"]
    words = state["model.embed_tokens.weight"][ids]
    x = torch.cat([words[:at], seen, words[at:]])
    count, groups = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    size, length = TEXT["hidden_size"] // count, len(x)
    hidden_future = torch.full((length, length), -math.inf).triu(1)
    for layer in range(TEXT["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        y = norm(x, f"{base}input_layernorm")
        q, k, v = (
            heads(y @ state[f"{base}self_attn.{n}_proj.weight"].T, c)
            for n, c in (("q", count), ("k", groups), ("v", groups))
        )
        k, v = (t.repeat_interleave(count // groups, dim=0) for t in (turned(k), v))
        weights = (turned(q) @ k.transpose(1, 2) / math.sqrt(size) + hidden_future).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ state[f"{base}self_attn.o_proj.weight"].T
        y = norm(x, f"{base}post_attention_layernorm")
        gate = y @ state[f"{base}mlp.gate_proj.weight"].T
        up = y @ state[f"{base}mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ state[f"{base}mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ state["lm_head.weight"].T
