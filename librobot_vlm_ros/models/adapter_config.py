"""adapter_config.json: what of peft's settings for an adapter is taken, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.shards import read_json

__all__ = ["CONFIG", "WEIGHTS", "base_name", "load_peft", "read_config"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
#: Fields of an adapter_config.json that say what the adapter computes.
_TAKEN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
)
#: Fields that say how it came about, or nothing by themselves.
_IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
#: Ways to begin that leave the base weights as they are.
_PLAIN_BEGINNINGS = (None, True, False, "eva", "gaussian", "orthogonal")


def read_config(folder: Path) -> Any:
    """peft's LoraConfig of an adapter folder.

    Raises ModelError WEIGHTS_NOT_FOUND, UNSAFE_CHECKPOINT where the weights are a pickle,
    BAD_CONFIG for what is no low-rank adapter or would change the model in other ways, too.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            ErrorCode.WEIGHTS_NOT_FOUND,
            f"{folder} holds no {CONFIG}" if folder.is_dir() else f"there is no folder {folder}",
            f"an adapter folder holds {CONFIG} and {WEIGHTS}",
        )
    if not (folder / WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise ModelError(
                ErrorCode.UNSAFE_CHECKPOINT,
                f"{_PICKLE} is a pickle, which may run code; it was not opened",
                f"save the adapter as {WEIGHTS}",
            )
        raise ModelError(ErrorCode.WEIGHTS_NOT_FOUND, f"{folder} holds no {WEIGHTS}")
    given = read_json(folder / CONFIG)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise ModelError(ErrorCode.BAD_CONFIG, f"{CONFIG}: peft_type is {kind!r}, expected 'LORA'")
    if (beginning := given.get("init_lora_weights")) not in _PLAIN_BEGINNINGS:
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"{CONFIG}: init_lora_weights {beginning!r} changes the base weights, too",
            "convert it to a plain LoRA when saving it (see peft's documentation)",
        )
    if strange := _not_understood(given):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"{CONFIG} asks for what is not supported here: {', '.join(strange)}",
            "use a plain LoRA adapter",
        )
    try:
        return load_peft().LoraConfig(**{name: given[name] for name in _TAKEN if name in given})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(ErrorCode.BAD_CONFIG, f"{CONFIG}: {error}") from error


def _not_understood(given: Mapping[str, Any]) -> list[str]:
    """Fields that would change the model in other ways."""
    known = {*_TAKEN, *_IGNORED}
    neutral = (None, False, "none", [], {})
    return sorted(key for key, value in given.items() if key not in known and value not in neutral)


def base_name(folder: Path) -> str:
    """The model that an adapter says it was made for."""
    return str(read_json(folder / CONFIG).get("base_model_name_or_path") or "another model")


def load_peft() -> Any:
    """The package peft. Raises ModelError MISSING_DEPENDENCY."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"adapters need the package peft: {error}",
            "install it: pip install peft",
        ) from error
    return peft
