"""Layouts of InternVL2 checkpoints: the official one and transformers' own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.loading import (
    DERIVED,
    LoadPlan,
    expect_rank,
    key_map,
    model_type,
    native_tensors,
    register_layout,
    renamed,
)
from librobot_vlm_ros.models.checkpoints.shards import tensor_names
from librobot_vlm_ros.models.configuration import (
    bad_config,
    check_feature_layer,
    from_dict,
    section,
)
from librobot_vlm_ros.models.families.internvl2.configuration import (
    is_original,
    original_to_native,
    tile_tokens,
)
from librobot_vlm_ros.models.inputs.tokenizer import added_tokens

_TOWER, _READER = "model.vision_tower.", "model.language_model."
_SEEN_FIRST = r"^vision_model\.embeddings\."
_SEEN = r"^vision_model\.encoder\.layers\.(\d+)\."
_READ = r"^language_model\.model\.layers\.(\d+)\."
_SEES, _READS = rf"{_TOWER}encoder.layer.\1.", rf"{_READER}layers.\1."
_OFFICIAL = key_map(
    (rf"{_SEEN_FIRST}class_embedding$", f"{_TOWER}embeddings.cls_token"),
    (rf"{_SEEN_FIRST}position_embedding$", f"{_TOWER}embeddings.position_embeddings"),
    (rf"{_SEEN_FIRST}patch_embedding\.", f"{_TOWER}embeddings.patch_embeddings.projection."),
    (rf"{_SEEN}ls([12])$", rf"{_SEES}lambda_\2"),
    (rf"{_SEEN}norm1\.", f"{_SEES}layernorm_before."),
    (rf"{_SEEN}norm2\.", f"{_SEES}layernorm_after."),
    (rf"{_SEEN}attn\.proj\.", f"{_SEES}attention.projection_layer."),
    (rf"{_SEEN}attn\.([qk])_norm\.", rf"{_SEES}attention.\2_norm."),
    (rf"{_SEEN}mlp\.(fc[12])\.", rf"{_SEES}mlp.\2."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.tok_embeddings\.", f"{_READER}embed_tokens."),
    (r"^language_model\.model\.norm\.", f"{_READER}norm."),
    (r"^language_model\.output\.", "lm_head."),
    (rf"{_READ}attention\.wo\.", f"{_READS}self_attn.o_proj."),
    (rf"{_READ}feed_forward\.w1\.", f"{_READS}mlp.gate_proj."),
    (rf"{_READ}feed_forward\.w3\.", f"{_READS}mlp.up_proj."),
    (rf"{_READ}feed_forward\.w2\.", f"{_READS}mlp.down_proj."),
    (rf"{_READ}attention_norm\.", f"{_READS}input_layernorm."),
    (rf"{_READ}ffn_norm\.", f"{_READS}post_attention_layernorm."),
)
#: Queries, keys and values in one: of the tower one after the other, of the reader by groups.
_VISION_PACKED = re.compile(rf"{_SEEN}attn\.qkv\.(weight|bias)$")
_TEXT_PACKED = re.compile(rf"{_READ}attention\.wqkv\.(weight|bias)$")


def plan_for(config: Any) -> LoadPlan:
    """Keys as transformers names them, for its InternVLConfig. Raises ModelError BAD_CONFIG."""
    from transformers import InternVLForConditionalGeneration

    check_feature_layer(config)
    return LoadPlan(InternVLForConditionalGeneration, config, native_tensors)


def _plan_native(config: dict[str, Any], folder: Path) -> LoadPlan:
    kind = section(config, "text_config").get("model_type", "qwen2")
    if kind != "llama":
        raise bad_config(
            f"config.json of an InternVL: the language model is a {kind}, InternVL2's a llama",
            "InternVL2-2B and InternVL2-8B can be loaded",
        )
    native = from_dict("InternVLConfig", config, "an InternVL")
    tile_tokens(native)
    return plan_for(native)


def _plan_original(config: dict[str, Any], folder: Path) -> LoadPlan:
    config = _completed(config, tensor_names(folder))
    native = original_to_native(config, added_tokens(folder).get("<IMG_CONTEXT>"))
    text = native.text_config
    groups = text.num_key_value_heads
    queries = text.num_attention_heads // groups

    def convert(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        if DERIVED.search(key):
            return
        found = _VISION_PACKED.match(key) or _TEXT_PACKED.match(key)
        if found:
            expect_rank(key, value, 1 if found[2] == "bias" else 2)
        if found := _VISION_PACKED.match(key):
            at = f"{_TOWER}encoder.layer.{found[1]}.attention."
            parts = value.chunk(3) if value.shape[0] % 3 == 0 else ()
        elif found := _TEXT_PACKED.match(key):
            # A group is its queries, the key that they share, and the value.
            at = f"{_READER}layers.{found[1]}.self_attn."
            rows = (queries + 2) * groups
            parts = ()
            if value.shape[0] and value.shape[0] % rows == 0:
                packed = value.unflatten(0, (groups, queries + 2, -1))
                parts = (packed[:, :-2].flatten(0, 2), packed[:, -2].flatten(0, 1))
                parts = (*parts, packed[:, -1].flatten(0, 1))
        else:
            yield renamed(key, _OFFICIAL), value
            return
        if not parts:
            raise ModelError(
                ErrorCode.SHAPE_MISMATCH,
                f"{key} is {list(value.shape)}, which are no queries, keys and values by "
                "config.json",
            )
        for letter, part in zip("qkv", parts, strict=True):
            yield f"{at}{letter}_proj.{found[2]}", part

    return dataclasses.replace(plan_for(native), convert=convert)


def _completed(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """config.json with what it leaves out and the tensors show.

    The original's classes have other defaults than transformers' (InternVisionConfig is that of the
    6B tower), so that neither tells what a checkpoint has.
    """
    names = list(names)

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    shown: dict[str, dict[str, Any]] = {
        "vision_config": {
            "qkv_bias": some(r"^vision_model\..*\.attn\.qkv\.bias$"),
            "qk_normalization": some(r"^vision_model\..*\.attn\.q_norm\."),
            "norm_type": "layer_norm" if some(r"^vision_model\..*\.norm1\.bias$") else "rms_norm",
        },
        "llm_config": {"bias": some(r"^language_model\..*\.attention\.wqkv\.bias$")},
    }
    full = dict(config)
    for part, values in shown.items():
        if isinstance(config.get(part), Mapping):
            given = {name: value for name, value in config[part].items() if value is not None}
            full[part] = {**values, **given}
    return full


register_layout("internvl2 (official)", is_original, _plan_original)
register_layout("internvl2 (transformers)", model_type("internvl"), _plan_native)
