"""Names to models, without torch: a family's module is imported when its class is first needed.

The models of this package stand in `catalog.py`, one row a name. A family's module binds its
class to its rows with ``@register_vlm("name", ...)``; a class from elsewhere passes a `ModelInfo`
of its own.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError
from librobot_vlm_ros.models.backend import ModelInfo, VlmBackend
from librobot_vlm_ros.models.catalog import CATALOG

_rows: dict[str, ModelInfo] = {info.name: info for info in CATALOG}
_classes: dict[str, type[Any]] = {}
_Class = TypeVar("_Class", bound=type)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_log = logging.getLogger(__name__)


def register_vlm(*names: str, info: ModelInfo | None = None) -> Callable[[_Class], _Class]:
    """Bind the decorated class to the catalogue rows that name its module.

    Or to the rows called `names`, or to a row of its own given as `info`.

    Raises ValueError for a name that has no row, and for a name that another class holds.
    """
    if info is not None:
        if info.name in _rows and _rows[info.name] != info:
            raise ValueError(f"the model name {info.name!r} is already registered")
        _rows[info.name] = info
        names = (*names, info.name)
    unknown = [name for name in names if name not in _rows]
    if unknown:
        raise ValueError(f"no catalogue row for {unknown}: pass info=ModelInfo")

    def bind(cls: _Class) -> _Class:
        bound = names or [n for n, row in _rows.items() if row.full_module == cls.__module__]
        if not bound:
            raise ValueError(f"no catalogue row names {cls.__module__}: pass info=ModelInfo")
        for name in bound:
            held = _classes.get(name)
            if held is not None and held.__qualname__ != cls.__qualname__:
                raise ValueError(f"the model name {name!r} belongs to {held.__qualname__} already")
            _classes[name] = cls
        return cls

    return bind


def list_vlms() -> list[str]:
    """Every registered name, sorted. Aliases are not listed; `get_vlm` takes them."""
    return sorted(_rows)


def model_info(name: str) -> ModelInfo:
    """The row of a name or alias. Raises ModelError UNKNOWN_MODEL naming the nearest ones."""
    wanted = name.strip().lower() if isinstance(name, str) else ""
    for row in _rows.values():
        if wanted == row.name or wanted in row.aliases:
            return row
    known = list_vlms()
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    raise ModelError(
        ErrorCode.UNKNOWN_MODEL,
        f"there is no model named {name!r}",
        f"nearest: {', '.join(near)}" if near else f"known models: {', '.join(known)}",
    )


def models_with_task(task: str) -> list[str]:
    """Names of the models that can do a common task, the fake model left out."""
    return sorted(r.name for r in _rows.values() if task in r.tasks and r.family != "fake")


def get_vlm(name: str) -> type[Any]:
    """The class behind a name or alias, its module imported now.

    Raises ModelError UNKNOWN_MODEL, or MISSING_DEPENDENCY when torch or transformers is absent.
    """
    info = model_info(name)
    if info.name not in _classes:
        module = info.full_module
        _share_cores()
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            if missing not in info.requires:
                raise
            raise ModelError(
                ErrorCode.MISSING_DEPENDENCY,
                f"the model {info.name!r} needs the Python package {missing!r}",
                f"install it: pip install {missing}",
            ) from error
    return _classes[info.name]


def sha256_list(given: str | Sequence[str]) -> tuple[str, ...]:
    """The digests in lower case; ("",) and "" mean none. Raises RequestError BAD_PARAMETER."""
    words = [given] if isinstance(given, str) else list(given)
    words = [word.strip() for word in words if word.strip()]
    for word in words:
        if _SHA256.fullmatch(word) is None:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"weights_sha256 is {word!r}, expected 64 hexadecimal digits",
                "`librobot-vlm models --sha256 FOLDER` prints that of a folder.",
            )
    return tuple(word.lower() for word in words)


def _share_cores() -> None:
    """Let torch's CPU threads sleep while they wait for each other; read when torch is imported.

    They spin by default, and on a computer that has anything else to do (a robot's has) every
    small operation then waits for a thread that is not running. Measured on two busy cores: 0.69 s
    a frame spinning, 0.16 s sleeping. An OMP_WAIT_POLICY of the user's own stands.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def create_vlm(
    name: str,
    config: Mapping[str, Any] | Any | None = None,
    pretrained: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    quantization: str = "none",
    freeze_vision: bool = False,
    freeze_language: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    should_cancel: Callable[[], bool] | None = None,
    weights_sha256: str | Sequence[str] = (),
    **options: Any,
) -> Any:
    """Build a model by name.

    Without `config` and `pretrained` the model's own weights are used: the shipped folder, or
    its hub id at the pinned revision. `pretrained` is a local folder or a hub id
    ("" counts as None). `config` alone
    (a mapping or the family's config object) builds that architecture with random weights.
    `device`: auto, cpu, cuda, cuda:N. `dtype`: auto, float32, float16, bfloat16 (or fp32, fp16,
    bf16). `attention`: auto, flash_attention_2, sdpa, eager. An explicit choice is honoured or
    refused with a ModelError; ``auto`` logs what it chose. `quantization` of the language model's
    linear layers: none, int8, nf4 (see `quantize`). `adapter`: a folder of `save_adapter` or of
    peft. `should_cancel` is asked between tensors while loading; true gives LOAD_CANCELLED.
    `weights_sha256`: sha256 of weights that may be loaded (see `checksum.weights_sha256`), checked
    before anything is read from them; others give CHECKSUM_MISMATCH. Other options go to the class.
    """
    info = model_info(name)
    if name.strip().lower() != info.name:
        _log.info("%s is an alias of %s: %s", name, info.name, info.description)
    allowed = sha256_list(weights_sha256)
    if allowed:  # a class from elsewhere need not know the option, unless it is used
        options["weights_sha256"] = allowed
    return get_vlm(name).create(
        info.name,
        config=config,
        pretrained=pretrained or None,
        device=device,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        freeze_vision=freeze_vision,
        freeze_language=freeze_language,
        **({} if adapter is None else {"adapter": adapter}),
        should_cancel=should_cancel,
        **options,
    )


def create_backend(name: str, **options: Any) -> VlmBackend:
    """The robot's side of a model: what `create_vlm` builds with these options, as a `VlmBackend`.

    A registered class that is a backend itself, such as the fake one, is given as it is.
    """
    made = create_vlm(name, **options)
    backend: VlmBackend = getattr(made, "backend", made)
    return backend
