"""Models: the registry, the backends behind it, and checkpoint loading.

Importing this package does not import torch; a model's module is imported when first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from librobot_vlm_ros.models.backend import ModelInfo, VlmBackend
from librobot_vlm_ros.models.registry import (
    create_backend,
    create_vlm,
    get_vlm,
    list_vlms,
    model_info,
    models_with_task,
    register_vlm,
    sha256_list,
)

#: Names that need torch, and the module of this package that holds each.
_LAZY = {
    "AbstractVLM": "vlm",
    "load_module": "checkpoints.loading",
}

__all__ = [
    "AbstractVLM",
    "ModelInfo",
    "VlmBackend",
    "create_backend",
    "create_vlm",
    "get_vlm",
    "list_vlms",
    "load_module",
    "model_info",
    "models_with_task",
    "register_vlm",
    "sha256_list",
]


# `librobot_vlm_ros.models.qwen_vl` and the like: see `families/aliases`.
__path__ = [*__path__, *(os.path.join(folder, "families", "aliases") for folder in __path__)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
