"""Florence-2 at tiny size: an official checkpoint, and the comparison with what was published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from librobot_vlm_ros.models.checkpoint import LoadPlan
from librobot_vlm_ros.models.conformance_davit import (
    D_MODEL,
    DEPTHS,
    DIMS,
    HEADS,
    LAYERS,
    TEXT_HEADS,
    WINDOW,
    Weights,
    original_logits,
)
from librobot_vlm_ros.models.florence_config import FlorenceConfig
from librobot_vlm_ros.models.florence_convert import plan_for
from librobot_vlm_ros.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise, squash
from librobot_vlm_ros.models.tiny import word_tokenizer

__all__ = [
    "added_parameters",
    "difference",
    "full_size",
    "official_config",
    "pixels",
    "random_weights",
    "write_official",
]

SIDE, POSITIONS, FFN, MAX_POSITIONS = 768, 20, 40, 150


def full_size(name: str) -> LoadPlan:
    """The true configuration of a published variant."""
    return plan_for(FlorenceConfig(name).to_transformers())


def added_parameters(module: Any) -> int:
    """transformers' place holder for the image is one row that the published models have not."""
    return int(module.config.text_config.d_model)


def official_config(vocab_size: int) -> dict[str, Any]:
    """A config.json with the official fields, small numbers in them."""
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"},
        "model_type": "florence2",
        "projection_dim": D_MODEL,
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "text_config": {
            "vocab_size": vocab_size,
            "activation_function": "gelu",
            "d_model": D_MODEL,
            "decoder_attention_heads": TEXT_HEADS,
            "decoder_ffn_dim": FFN,
            "decoder_layers": LAYERS,
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "encoder_attention_heads": TEXT_HEADS,
            "encoder_ffn_dim": FFN,
            "encoder_layers": LAYERS,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
            "is_encoder_decoder": True,
            "max_position_embeddings": MAX_POSITIONS,
            "no_repeat_ngram_size": 3,
            "num_hidden_layers": LAYERS,
            "num_beams": 3,
            "scale_embedding": False,
        },
        "vision_config": {
            "model_type": "davit",
            "drop_path_rate": 0.1,
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "enable_checkpoint": False,
            "dim_embed": list(DIMS),
            "num_heads": list(HEADS),
            "num_groups": list(HEADS),
            "depths": list(DEPTHS),
            "window_size": WINDOW,
            "projection_dim": D_MODEL,
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 5},
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": POSITIONS},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }


def _official_shapes(vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every official key with its shape."""

    def linear(name: str, out: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, inner)
        yield f"{name}.bias", (out,)

    def norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (size,)
        yield f"{name}.bias", (size,)

    before = 3
    for stage, dim in enumerate(DIMS):
        conv = f"vision_tower.convs.{stage}"
        kernel = 7 if stage == 0 else 3
        yield f"{conv}.proj.weight", (dim, before, kernel, kernel)
        yield f"{conv}.proj.bias", (dim,)
        yield from norm(f"{conv}.norm", dim if stage == 0 else before)
        for depth in range(DEPTHS[stage]):
            for block, attention in (
                ("spatial_block", "window_attn"),
                ("channel_block", "channel_attn"),
            ):
                base = f"vision_tower.blocks.{stage}.{depth}.{block}"
                for number in (1, 2):
                    yield f"{base}.conv{number}.fn.dw.weight", (dim, 1, 3, 3)
                    yield f"{base}.conv{number}.fn.dw.bias", (dim,)
                yield from norm(f"{base}.{attention}.norm", dim)
                yield from linear(f"{base}.{attention}.fn.qkv", 3 * dim, dim)
                yield from linear(f"{base}.{attention}.fn.proj", dim, dim)
                yield from norm(f"{base}.ffn.norm", dim)
                yield from linear(f"{base}.ffn.fn.net.fc1", 4 * dim, dim)
                yield from linear(f"{base}.ffn.fn.net.fc2", dim, 4 * dim)
        before = dim
    yield "image_projection", (DIMS[-1], D_MODEL)
    yield from norm("image_proj_norm", D_MODEL)
    yield "image_pos_embed.row_embeddings.weight", (POSITIONS, DIMS[-1] // 2)
    yield "image_pos_embed.column_embeddings.weight", (POSITIONS, DIMS[-1] - DIMS[-1] // 2)
    yield "visual_temporal_embed.pos_idx_to_embed", (5, DIMS[-1])
    yield "language_model.model.shared.weight", (vocab_size, D_MODEL)
    yield "language_model.final_logits_bias", (1, vocab_size)
    for side in ("encoder", "decoder"):
        base = f"language_model.model.{side}"
        yield f"{base}.embed_positions.weight", (MAX_POSITIONS + 2, D_MODEL)
        yield from norm(f"{base}.layernorm_embedding", D_MODEL)
        for layer in range(LAYERS):
            name = f"{base}.layers.{layer}"
            for kind in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield from linear(f"{name}.{kind}.{part}", D_MODEL, D_MODEL)
                yield from norm(f"{name}.{kind}_layer_norm", D_MODEL)
            yield from linear(f"{name}.fc1", FFN, D_MODEL)
            yield from linear(f"{name}.fc2", D_MODEL, FFN)
            yield from norm(f"{name}.final_layer_norm", D_MODEL)


def random_weights(vocab_size: int) -> Weights:
    """Every official tensor, the same ones at each call."""
    random = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in _official_shapes(vocab_size):
        value = torch.randn(shape, generator=random) * 0.3
        if "norm" in name and name.endswith("weight"):
            value = 1 + value
        weights[name] = value
    weights["language_model.final_logits_bias"].zero_()
    return weights


def write_official(folder: Path) -> None:
    """A folder laid out as microsoft/Florence-2-base."""
    folder.mkdir(parents=True)
    tokenizer = word_tokenizer(added=())  # the location and task tokens are added while loading
    vocab_size = tokenizer.get_vocab_size() + 1024
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(official_config(vocab_size)))
    save_file(random_weights(vocab_size), folder / "model.safetensors")
    images = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3}
    images["size"] = {"height": 56, "width": 56}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the converted module and the original arithmetic."""
    random = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 56, 56, generator=random)  # 7 x 7 cells
    words = torch.tensor([[0, 11, 12, 13, 2], [0, 21, 22, 23, 2]])
    answer = torch.tensor([[2, 0, 30, 31], [2, 0, 40, 41]])
    expected = original_logits(load_file(folder / "model.safetensors"), image, words, answer)
    places = torch.full((2, 1 + 7 * 7), module.config.image_token_id)
    with torch.no_grad():
        found = module(
            input_ids=torch.cat([places, words], dim=1),
            pixel_values=image,
            decoder_input_ids=answer,
        ).logits[..., : expected.shape[-1]]
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """The published side's pixels [1, 3, H, W]: ours, and the reference processor's."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = dataclasses.replace(vlm.images, height=SIDE, width=SIDE)
    cpu = torch.device("cpu")
    ours = normalise([squash(image, settings)], settings, cpu, torch.float32)
    reference = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    theirs = reference(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return ours, theirs
