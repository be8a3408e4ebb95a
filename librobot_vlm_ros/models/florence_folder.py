"""A Florence-2 checkpoint folder: weights, tokenizer, image settings, generation settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.core.requests import MAX_BEAMS
from librobot_vlm_ros.models.checkpoint import load_module
from librobot_vlm_ros.models.config_values import (
    bad_value,
    check_integer,
    check_number,
    check_token,
    section,
)
from librobot_vlm_ros.models.florence_config import is_original
from librobot_vlm_ros.models.florence_tokenizer import FlorenceTokenizer
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.preprocess import ImageSettings, image_settings
from librobot_vlm_ros.models.shards import read_config, read_json

__all__ = ["PUBLISHED", "FlorenceParts", "FlorenceSettings", "read_folder", "write_folder"]

_FILE = "generation_config.json"
#: Tokens that settings may force.
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
#: Integers, from and to; beams as a request may ask for them.
_BOUNDS: dict[str, tuple[int, int | None]] = {
    "num_beams": (1, MAX_BEAMS),
    "max_new_tokens": (1, None),
    "no_repeat_ngram_size": (0, 1024),
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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check(_FILE, name, value)

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
        for name in _FORCED:
            if getattr(self, name) is not None:
                check_token(f"{_FILE} or config.json: {name}", getattr(self, name), size)


def _check(file: str, name: str, value: Any) -> None:
    """Raises ModelError BAD_CONFIG for a value that no answer can be decoded by."""
    field = f"{file}: {name}"
    if name in _FORCED:
        if value is not None:
            check_integer(field, value, 0)
    elif name == "early_stopping":
        if not isinstance(value, bool):
            raise bad_value(field, value, "true or false")
    elif name == "length_penalty":
        check_number(field, value, -_MAX_PENALTY, _MAX_PENALTY)
    else:
        check_integer(field, value, *_BOUNDS[name])


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
