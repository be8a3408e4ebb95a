"""Florence-2 checkpoint folders: the official layout and transformers' own, with tokenizer, image
and generation settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.core.requests import MAX_BEAMS
from librobot_vlm_ros.models.checkpoints.key_mapping import key_map, renamed
from librobot_vlm_ros.models.checkpoints.loading import (
    CheckpointLayout,
    LoadPlan,
    expect_rank,
    load_module,
    register_layout,
)
from librobot_vlm_ros.models.checkpoints.shards import read_config, read_json
from librobot_vlm_ros.models.configuration import (
    bad_value,
    check_integer,
    check_number,
    check_token,
    from_dict,
    section,
)
from librobot_vlm_ros.models.families.florence2.configuration import is_original, original_to_native
from librobot_vlm_ros.models.families.florence2.processor import FlorenceTokenizer
from librobot_vlm_ros.models.families.preprocess import ImageSettings, image_settings
from librobot_vlm_ros.models.making import Loading

__all__ = [
    "FlorenceParts",
    "FlorenceSettings",
    "PUBLISHED",
    "attention_parts",
    "plan_for",
    "read_folder",
    "write_folder",
]

_BLOCK = r"^vision_tower\.(blocks\..+?_block)\."
_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
#: Official name to transformers' name.
_OFFICIAL = key_map(
    (r"^vision_tower\.convs\.(\d+)\.proj\.", rf"{_TOWER}.convs.\1.conv."),
    (r"^vision_tower\.convs\.(\d+)\.norm\.", rf"{_TOWER}.convs.\1.norm."),
    (rf"{_BLOCK}(conv[12])\.fn\.dw\.", rf"{_TOWER}.\1.\2."),
    (rf"{_BLOCK}(?:window|channel)_attn\.norm\.", rf"{_TOWER}.\1.norm1."),
    (rf"{_BLOCK}((?:window|channel)_attn)\.fn\.(qkv|proj)\.", rf"{_TOWER}.\1.\2.\3."),
    (rf"{_BLOCK}ffn\.norm\.", rf"{_TOWER}.\1.norm2."),
    (rf"{_BLOCK}ffn\.fn\.net\.(fc[12])\.", rf"{_TOWER}.\1.ffn.\2."),
    (r"^image_projection$", f"{_PROJECTOR}.image_projection.weight"),
    (r"^image_proj_norm\.", f"{_PROJECTOR}.image_proj_norm."),
    (r"^image_pos_embed\.(row|column)_", rf"{_PROJECTOR}.image_position_embed.\1_"),
    (r"^visual_temporal_embed\.", f"{_PROJECTOR}.visual_temporal_embed."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
#: What prompts and answers are put together from.
_TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
#: Tables with one row a token, to which the row of the image token is added.
_TOKEN_TABLES = ("shared.weight", "embed_tokens.weight", "lm_head.weight")


def attention_parts(attention: str) -> str | dict[str, str]:
    """flash-attn serves the text model only.

    DaViT's channel attention takes the number of pixels as its head size, far beyond what
    flash-attn can do.
    """
    if attention != "flash_attention_2":
        return attention
    return {"": attention, "text_config": attention, "vision_config": "sdpa"}


def plan_for(config: Any) -> LoadPlan:
    """Keys as transformers names them, for a Florence2Config. Raises ModelError BAD_CONFIG."""
    from transformers import Florence2ForConditionalGeneration

    text = config.text_config
    for name in _TEXT_IDS:
        check_token(f"config.json: text_config.{name}", getattr(text, name), text.vocab_size)
    check_token("config.json: image_token_id", config.image_token_id, text.vocab_size)
    return LoadPlan(
        model_class=Florence2ForConditionalGeneration,
        config=config,
        convert=lambda key, value: [(key, value)],
        attention=attention_parts,
    )


def _plan_native(config: dict[str, Any], folder: Path) -> LoadPlan:
    return plan_for(from_dict("Florence2Config", config, "a Florence-2"))


def _plan_original(config: dict[str, Any], folder: Path) -> LoadPlan:
    native = original_to_native(config)

    def convert(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        if key == "language_model.final_logits_bias":
            if bool(value.any()):
                raise ModelError(
                    ErrorCode.KEY_MISMATCH,
                    f"{key} is not zero, and transformers' Florence-2 has no place for it",
                )
            return
        name = renamed(key, _OFFICIAL)
        if key == "image_projection":
            expect_rank(key, value, 2)
            value = value.t()
        elif name.endswith(_TOKEN_TABLES):
            expect_rank(key, value, 2)
            if value.shape[0] == native.text_config.vocab_size - 1:
                value = torch.cat([value, value.new_zeros(1, value.shape[1])])
        yield name, value

    return dataclasses.replace(plan_for(native), convert=convert)


register_layout(CheckpointLayout("florence-2 (official)", is_original, _plan_original))
register_layout(
    CheckpointLayout(
        "florence-2 (transformers)",
        lambda config: config.get("model_type") == "florence2" and not is_original(config),
        _plan_native,
    )
)


_FILE = "generation_config.json"
#: Integers, from and to; beams as a request may ask for them.
_BOUNDS: dict[str, tuple[int, int | None]] = {
    "num_beams": (1, MAX_BEAMS),
    "max_new_tokens": (1, None),
    "no_repeat_ngram_size": (0, 1024),
    "forced_bos_token_id": (0, None),
    "forced_eos_token_id": (0, None),
}
#: An answer's length to a power beyond it is no number.
_MAX_PENALTY = 10.0


@dataclass(frozen=True)
class FlorenceSettings:
    """How a checkpoint is meant to be decoded."""

    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    #: Token that stands first, and the one that stands last when the room is used up.
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    early_stopping: bool = False
    length_penalty: float = 1.0
    max_new_tokens: int = 1024

    def overlaid(self, found: Mapping[str, Any], file: str = _FILE) -> FlorenceSettings:
        """These settings with those that `found` (the content of `file`) states."""
        stated = {k: v for k, v in found.items() if k in vars(self) and v is not None}
        if "max_new_tokens" not in stated and found.get("max_length"):
            check_integer(f"{file}: max_length", found["max_length"], 2)
            stated["max_new_tokens"] = found["max_length"] - 1  # the start token counts there
        for name, value in stated.items():
            _check(file, name, value)
        return dataclasses.replace(self, **stated)

    def check_vocabulary(self, size: int) -> None:
        """Raises ModelError BAD_CONFIG for a token that a model of this vocabulary has not."""
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if (token := getattr(self, name)) is not None:
                check_token(f"{_FILE} or config.json: {name}", token, size)


def _check(file: str, name: str, value: Any) -> None:
    """Raises ModelError BAD_CONFIG for a value that no answer can be decoded by."""
    field = f"{file}: {name}"
    if name in _BOUNDS:
        check_integer(field, value, *_BOUNDS[name])
    elif name == "length_penalty":
        check_number(field, value, -_MAX_PENALTY, _MAX_PENALTY)
    elif not isinstance(value, bool):
        raise bad_value(field, value, "true or false")


#: Settings published with microsoft/Florence-2-base and -large. Conversions to transformers' layout
#: lose the forced first token, the n-gram rule and the beams, so they stand here.
PUBLISHED = FlorenceSettings(
    num_beams=3,
    no_repeat_ngram_size=3,
    forced_bos_token_id=0,
    forced_eos_token_id=2,
    early_stopping=True,
)


@dataclass(frozen=True)
class FlorenceParts:
    """Everything that a Florence-2 is made of."""

    module: Any
    images: ImageSettings
    settings: FlorenceSettings
    tokenizer: FlorenceTokenizer | None = None


def read_folder(folder: Path, base: FlorenceSettings, loading: Loading) -> FlorenceParts:
    """Load a folder in either layout. `base`: settings where the folder states none.

    The cheap files are read first, so that a wrong folder is refused before its weights are.
    """
    config = read_config(folder)
    images = image_settings(_required(folder / "preprocessor_config.json"))
    stated = folder / _FILE
    if is_original(config):
        # There the settings stand in text_config; its max_length is BART's and means nothing.
        text = {**section(config, "text_config"), "max_length": None}
        base = PUBLISHED.overlaid(text, "config.json")
    settings = base.overlaid(read_json(stated) if stated.is_file() else {})
    module = load_module(folder, **vars(loading))
    settings.check_vocabulary(module.config.text_config.vocab_size)
    tokenizer = FlorenceTokenizer.from_folder(folder, module.config)
    return FlorenceParts(module, images, settings, tokenizer)


def write_folder(folder: Path, parts: FlorenceParts) -> None:
    """Write the parts in transformers' native layout. The folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    parts.module.save_pretrained(str(folder))
    if parts.tokenizer is not None:
        parts.tokenizer.save(folder)
    text = parts.module.config.text_config
    generation = {
        **{k: v for k, v in dataclasses.asdict(parts.settings).items() if v is not None},
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        "decoder_start_token_id": text.decoder_start_token_id,
    }
    _write_json(folder / _FILE, generation)
    _write_json(folder / "preprocessor_config.json", parts.images.to_json())


def _required(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"{path.parent} holds no {path.name}",
            "copy it from the model's repository into the folder",
        )
    return read_json(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
