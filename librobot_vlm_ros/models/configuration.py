"""What configurations of all families have alike, and checks of values that others wrote.

A family's own stands in ``families/<family>/configuration.py``.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from librobot_vlm_ros.core import ErrorCode, ModelError


def bad_config(what: str, hint: str = "") -> ModelError:
    """The error BAD_CONFIG, with what to do about it."""
    return ModelError(ErrorCode.BAD_CONFIG, what, hint)


def bad_value(field: str, value: object, expected: str) -> ModelError:
    """The error for a field, named with its file: "config.json: text_config.vocab_size"."""
    return bad_config(f"{field} is {value!r}, expected {expected}")


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


def check_marks(marks: Mapping[str, int], vocabulary: int) -> None:
    """Raises ModelError BAD_CONFIG where a vocabulary has no room for these tokens."""
    for name, token in marks.items():
        if token >= vocabulary:
            raise bad_config(
                f"{name} is {token}, the vocabulary has {vocabulary}",
                f"give a smaller vocabulary its own {', '.join(marks)}",
            )


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
        raise bad_config(f"{what}: {type(error).__name__} {error}", hint) from error


@contextmanager
def strict_config(what: str) -> Iterator[None]:
    """Making one of transformers' configurations in here: what it refuses becomes BAD_CONFIG."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # its strict classes raise errors of their own kinds
        raise bad_config(f"{what}: {error}") from error


def from_dict(kind: str, config: Mapping[str, Any], what: str) -> Any:
    """transformers' configuration of that name from the config.json of `what`, such as "a LLaVA".

    Raises ModelError BAD_CONFIG.
    """
    import transformers

    with strict_config(f"config.json of {what}"):
        return getattr(transformers, kind).from_dict(dict(config))


def stated(config: Mapping[str, Any], names: Iterable[str], **renamed: str) -> dict[str, Any]:
    """Fields that a config.json states, None not counted; `renamed`: new name = its name there."""
    places = {**{name: name for name in names}, **renamed}
    return {new: config[old] for new, old in places.items() if config.get(old) is not None}


_LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def llama_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for transformers' LlamaConfig of a config.json with Llama's names of before version 5,
    where the rotary embedding is `rope_theta` and `rope_scaling`.
    """
    rope = dict(config.get("rope_scaling") or {"type": "default"})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type")
    rope["rope_theta"] = config.get("rope_theta", 10000.0)
    return {**stated(config, _LLAMA_FIELDS), "rope_parameters": rope}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is to be trained of a model, and how; the fields are given by name.

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
            raise bad_value("lora_rank", rank, "an integer of at least 1")
        if not _is_number(alpha) or not alpha > 0:
            raise bad_value("lora_alpha", alpha, "a number above 0")
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise bad_value("lora_dropout", dropout, "a number from 0 to below 1")
        target = self.lora_target_modules
        named = isinstance(target, (list, tuple)) and all(isinstance(name, str) for name in target)
        if target is not None and (not (named or isinstance(target, str)) or not target):
            expected = "names of layers, or one regular expression"
            raise bad_value("lora_target_modules", target, expected)


def _is_number(value: object) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and math.isfinite(value)  # type: ignore[arg-type]


def published_variants(module: str) -> dict[str, dict[str, Any]]:
    """What each published variant is made of, by its registered name: the file variants.json beside
    a family's `module`, in fields of transformers' configurations.
    """
    text = Path(module).with_name("variants.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


@dataclass(frozen=True)
class FamilyConfig(ModelConfig):
    """A family's architecture: one of its published variants, and what differs from it.

    Raises ModelError BAD_CONFIG for an unknown variant.
    """

    #: The family as errors call it, and `published_variants` of it.
    family: ClassVar[str]
    variants: ClassVar[Mapping[str, dict[str, Any]]]

    variant: str = ""
    #: Fields of transformers' configurations of tower and language model.
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.variants:
            raise bad_config(
                f"there is no {self.family} variant {self.variant!r}",
                f"variants: {', '.join(self.variants)}",
            )

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of the tower's and of the language model's configuration, changes included."""
        published = self.variants[self.variant]
        vision = {**published["vision_config"], **self.vision_config}
        return vision, {**published["text_config"], **self.text_config}

    @abstractmethod
    def to_transformers(self) -> Any:
        """transformers' configuration of the whole model. Raises ModelError BAD_CONFIG."""
