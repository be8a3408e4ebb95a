"""From the keys of a checkpoint to those of transformers' model.

Version 5 writes ``model.vision_tower.``; what was published before has names of two older kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor

#: Gives (native key, tensor) for each that a checkpoint tensor becomes; nothing means dropped.
Convert = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
#: Expressions of a checkpoint's keys, and what transformers calls them.
KeyMap = tuple[tuple[re.Pattern[str], str], ...]
#: No weights: what older versions wrote although it follows from the configuration.
DERIVED = re.compile(r"\.(?:inv_freq|position_ids)$")


def key_map(*renames: tuple[str, str]) -> KeyMap:
    """A table of (regular expression, replacement); the first that matches counts."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in renames)


def renamed(key: str, renames: KeyMap) -> str:
    """The name that the first matching pattern gives."""
    for pattern, replacement in renames:
        name, count = pattern.subn(replacement, key)
        if count:
            return name
    return f"(unknown key) {key}"  # no parameter is called so: it is reported as strange


def renaming(renames: KeyMap) -> Convert:
    """A `Convert` that renames, and leaves every tensor as it is."""

    def convert(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        if not DERIVED.search(key):
            yield renamed(key, renames), value

    return convert


#: For checkpoints of transformers of a model with tower, projector and language model.
native_tensors = renaming(
    key_map(
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.language_model|language_model\.model)\.", "model.language_model."),
        (r"^lm_head\.", "lm_head."),
    )
)
