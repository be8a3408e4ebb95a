"""Refuse a config.json that asks for more layers or memory than there can be, before building it.

Others write these files: one that asks for a billion layers would be built until memory ends, and
nobody could stop it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from librobot_vlm_ros.core import ErrorCode, InferenceError
from librobot_vlm_ros.models.configuration import bad_config
from librobot_vlm_ros.models.placement import Placement

#: The largest published ones have about a hundred.
_MOST_LAYERS = 1000
_COUNT_OF_LAYERS = re.compile(r"(?:^|_)(?:layers|depths?|blocks)$")
_SWAP = re.compile(r"^SwapTotal:\s+(\d+) kB$", re.MULTILINE)


def refuse_endless(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raises ModelError BAD_CONFIG for more layers than any model has, wherever they stand."""
    found: list[tuple[str, Any]] = list(config.items())
    while found:
        name, value = found.pop()
        if isinstance(value, Mapping):
            found += value.items()
        elif _COUNT_OF_LAYERS.search(str(name)):
            numbers = value if isinstance(value, (list, tuple)) else [value]
            count = sum(number for number in numbers if isinstance(number, int))
            if max(count, len(numbers)) > _MOST_LAYERS:
                raise bad_config(
                    f"{source} asks for {count} layers as {name}, expected at most {_MOST_LAYERS}",
                    "use the file that came with the weights",
                )


def refuse_oversized(shape: torch.nn.Module, where: Placement) -> None:
    """Raises InferenceError OUT_OF_MEMORY where the whole device could not hold the model.

    `shape` is the model on torch's device "meta", where tensors take no memory.
    """
    size = torch.empty((), dtype=where.dtype).element_size()
    needed = sum(parameter.numel() * size for parameter in shape.parameters())
    needed += sum(buffer.nbytes for buffer in shape.buffers())
    has = _memory_bytes(where.device)
    if needed > has:
        raise InferenceError(
            ErrorCode.OUT_OF_MEMORY,
            f"by its config.json the model takes {needed / 1e9:.1f} GB as {where}, and there are "
            f"{has / 1e9:.1f} GB in all",
            "Use a smaller model or dtype, or a machine with more memory.",
        )


def _memory_bytes(device: torch.device) -> int:
    """All that the device has; on the CPU with the swap space."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    swap_kib = 0
    with suppress(OSError):
        told = _SWAP.search(Path("/proc/meminfo").read_text("ascii"))
        swap_kib = int(told[1]) if told else 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + swap_kib * 1024
