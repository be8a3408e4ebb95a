"""What every family's configuration has alike: how to compute, and what to train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from librobot_vlm_ros.core import ErrorCode, ModelError

__all__ = ["ModelConfig"]


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
