"""Configurations of models: values checked before anything is built of them, and what all
families' configurations have alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError

__all__ = [
    "ModelConfig",
    "bad_value",
    "check_feature_layer",
    "check_integer",
    "check_number",
    "check_token",
    "section",
    "tokens",
    "unreadable",
]


def bad_value(field: str, value: object, expected: str) -> ModelError:
    """The error for a field, named with its file: "config.json: text_config.vocab_size"."""
    return ModelError(ErrorCode.BAD_CONFIG, f"{field} is {value!r}, expected {expected}")


def check_integer(field: str, value: object, least: int, most: int | None = None) -> None:
    """Raises ModelError BAD_CONFIG for what is no integer, or beyond these bounds."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        bounds = f"from {least}" if most is None else f"from {least} to {most}"
        raise bad_value(field, value, f"an integer {bounds}")


def check_number(field: str, value: object, least: float, most: float) -> None:
    """Raises ModelError BAD_CONFIG for what is no finite number, or beyond these bounds."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not least <= value <= most:  # type: ignore[operator]  # NaN is refused, too
        raise bad_value(field, value, f"a number from {least:g} to {most:g}")


def check_token(field: str, value: object, vocabulary: int) -> None:
    """Raises ModelError BAD_CONFIG for what is no id of a vocabulary of this size."""
    check_integer(field, value, 0, vocabulary - 1)


def tokens(field: str, value: object, vocabulary: int) -> list[int]:
    """One id or a list of them, one at least. Raises ModelError BAD_CONFIG for anything else."""
    listed: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not listed:
        raise bad_value(field, value, "an id or a list of ids")
    for token in listed:
        check_token(field, token, vocabulary)
    return listed


def check_feature_layer(config: Any) -> None:
    """Raises ModelError BAD_CONFIG where a model is to take what a tower has no layer for."""
    stated, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    for layer in stated if isinstance(stated, (list, tuple)) else [stated]:
        # Before the first layer there is something to be taken, too.
        check_integer("config.json: the vision feature layer", layer, -layers - 1, layers)


def section(config: Mapping[str, Any], name: str, file: str = "config.json") -> dict[str, Any]:
    """An object in an object, {} where there is none. Raises ModelError BAD_CONFIG for others."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise bad_value(f"{file}: {name}", value, "an object")
    return dict(value or {})


@contextmanager
def unreadable(what: str, hint: str = "") -> Iterator[None]:
    """Reading fields in here, whatever they hold: what that trips over becomes BAD_CONFIG."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            ErrorCode.BAD_CONFIG, f"{what}: {type(error).__name__} {error}", hint
        ) from error


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of the families' configurations; its fields are given by name.

    Raises ModelError BAD_CONFIG for a value out of bounds.
    """

    #: Compute activations again in the backward pass instead of keeping them.
    gradient_checkpointing: bool = False
    #: Prefer flash-attn 2 where it can be used; where it can't, the log says why and what is used
    #: instead. attention="flash_attention_2" insists on it, any other attention is taken as given.
    use_flash_attn: bool = False
    #: Train a low-rank adapter (Hu et al., 2021, arXiv:2106.09685); the rest stays as it is.
    use_lora: bool = False
    #: The same on a language model in 4-bit NormalFloat (Dettmers et al., 2023, arXiv:2305.14314).
    use_qlora: bool = False
    #: Columns of the adapter's matrices.
    lora_rank: int = 16
    #: The adapter's output is scaled by lora_alpha / lora_rank.
    lora_alpha: float = 32
    #: Share of the adapter's inputs that is dropped while training.
    lora_dropout: float = 0.0
    #: Ends of the paths of the layers to adapt ("q_proj"), anywhere in the model; or one regular
    #: expression of whole paths. None takes every linear layer of the language model: the
    #: projections of attention and MLP.
    lora_target_modules: tuple[str, ...] | list[str] | str | None = None
    #: Folder of an adapter to put in, in place of a new one.
    adapter: str | None = None

    def __post_init__(self) -> None:
        rank, alpha, dropout = self.lora_rank, self.lora_alpha, self.lora_dropout
        whole = isinstance(rank, int) and not isinstance(rank, bool)
        if not whole or rank < 1:
            raise _bad("lora_rank", rank, "an integer of at least 1")
        if not _is_number(alpha) or not alpha > 0:
            raise _bad("lora_alpha", alpha, "a number above 0")
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise _bad("lora_dropout", dropout, "a number from 0 to below 1")
        target = self.lora_target_modules
        named = isinstance(target, (list, tuple)) and all(isinstance(name, str) for name in target)
        if target is not None and (not (named or isinstance(target, str)) or not target):
            raise _bad("lora_target_modules", target, "names of layers, or one regular expression")


def _is_number(value: object) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and math.isfinite(value)  # type: ignore[arg-type]


def _bad(name: str, value: object, expected: str) -> ModelError:
    return ModelError(ErrorCode.BAD_CONFIG, f"{name} is {value!r}, expected {expected}")
