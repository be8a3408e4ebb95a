"""Names in transformers' own checkpoints of tower, projector and language model.

Version 5 writes ``model.vision_tower.``; what was published before has names of two older kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

__all__ = ["DERIVED", "native_tensors", "renamed"]

_NATIVE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.language_model|language_model\.model)\.", "model.language_model."),
        (r"^lm_head\.", "lm_head."),
    )
)
#: No weights: what older versions wrote although it follows from the configuration.
DERIVED = re.compile(r"\.(?:inv_freq|position_ids)$")


def renamed(key: str, renames: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """The name that the first matching pattern gives."""
    for pattern, replacement in renames:
        name, count = pattern.subn(replacement, key)
        if count:
            return name
    return f"(unknown key) {key}"  # no parameter is called so: it is reported as strange


def native_tensors(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    """A `LoadPlan.convert` for these checkpoints."""
    if not DERIVED.search(key):
        yield renamed(key, _NATIVE), value
