"""A Florence-2 checkpoint folder: weights, tokenizer, image settings, generation settings."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoint import load_module
from librobot_vlm_ros.models.florence_config import is_original
from librobot_vlm_ros.models.florence_tokenizer import FlorenceTokenizer
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.preprocess import ImageSettings, image_settings
from librobot_vlm_ros.models.shards import read_config, read_json

__all__ = ["PUBLISHED", "FlorenceParts", "FlorenceSettings", "read_folder", "write_folder"]


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

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(
                    ErrorCode.BAD_CONFIG,
                    f"generation_config.json: {name} is {value!r}, expected an integer from 1",
                )

    def overlaid(self, found: dict[str, Any]) -> FlorenceSettings:
        """These settings with those that `found` (a generation_config.json) states."""
        names = {field.name for field in dataclasses.fields(self)}
        stated = {k: v for k, v in found.items() if k in names and v is not None}
        if "max_new_tokens" not in stated and found.get("max_length"):
            stated["max_new_tokens"] = int(found["max_length"]) - 1  # the start token counts there
        return dataclasses.replace(self, **stated)


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
    stated = folder / "generation_config.json"
    if is_original(config):
        # There the settings stand in text_config; its max_length is BART's and means nothing.
        base = PUBLISHED.overlaid({**config["text_config"], "max_length": None})
    settings = base.overlaid(read_json(stated) if stated.is_file() else {})
    module = load_module(folder, **vars(loading))
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
    _write_json(folder / "generation_config.json", generation)
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
