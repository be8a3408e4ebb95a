"""Values that other people's JSON files state, checked before anything is made of them.

A checkpoint's files may hold anything: what is of no use is BAD_CONFIG, with file, field, value and
what was expected, when the model is loaded and not at its first request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError

__all__ = [
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
