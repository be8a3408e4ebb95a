"""Load a checkpoint folder of any known layout into a transformers model, checked as it is read.

A `CheckpointLayout` says how to recognise a folder by its config.json, which transformers model it
becomes, and what each of its keys is called there. Loading goes tensor by tensor: each is
converted, cast and put on its device before the next is read. At the end every key must have been
used and every parameter filled; one that would not fit into the machine is refused before it is
built. A family registers its layouts when its module is imported.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from librobot_vlm_ros.core import ErrorCode, InferenceError, ModelError
from librobot_vlm_ros.models.catalog import CATALOG
from librobot_vlm_ros.models.checkpoints.progress import LoggedProgress
from librobot_vlm_ros.models.checkpoints.shards import iterate_tensors, read_config, weight_files
from librobot_vlm_ros.models.configuration import bad_config, check_integer
from librobot_vlm_ros.models.placement import Placement, dtype_name, move_module, resolve_placement

_log = logging.getLogger(__name__)

#: Gives (native key, tensor) for each that a checkpoint tensor becomes; nothing means dropped.
Convert = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
#: Expressions of a checkpoint's keys, and what transformers calls them.
KeyMap = tuple[tuple[re.Pattern[str], str], ...]
#: No weights: what older versions wrote although it follows from the configuration.
DERIVED = re.compile(r"\.(?:inv_freq|position_ids)$")

#: transformers switches initialisation off for the whole process while a model is built empty.
_build_lock = threading.Lock()

#: What weights may be stored in. Others (float8, int8, packed 4 bit) mean something only together
#: with scales, and copied without them they would be other weights.
_STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


#: What transformers' classes raise for dimensions that make no model.
_UNBUILDABLE = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
_SWAP = re.compile(r"^SwapTotal:\s+(\d+) kB$", re.MULTILINE)
#: Heads of attention, by the names that they have in the families' configurations.
_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)


@dataclass(frozen=True)
class LoadPlan:
    """How one folder is loaded."""

    #: The transformers class and its configuration, every dimension from the folder's config.json.
    model_class: type[Any]
    config: Any
    convert: Convert
    #: Folders to read one after the other; () means the checkpoint folder alone.
    folders: tuple[Path, ...] = ()
    #: What transformers is told for an attention: its name, or one name a part of the model.
    attention: Callable[[str], str | dict[str, str]] = str


@dataclass(frozen=True)
class CheckpointLayout:
    """One way in which checkpoints of a family are written."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    #: (config.json, folder) -> plan. Raises ModelError BAD_CONFIG.
    plan: Callable[[dict[str, Any], Path], LoadPlan]
    #: (config.json, folder) -> files of weights that are loaded beside the folder's own, by names
    #: that their place does not change. Raises ModelError where one is missing.
    companions: Callable[[dict[str, Any], Path], Mapping[str, Path]]


_layouts: dict[str, CheckpointLayout] = {}


def register_layout(
    name: str,
    matches: Callable[[Mapping[str, Any]], bool],
    plan: Callable[[dict[str, Any], Path], LoadPlan],
    companions: Callable[[dict[str, Any], Path], Mapping[str, Path]] = lambda config, folder: {},
) -> None:
    """Make a `CheckpointLayout` known. Two layouts must never match the same config.json."""
    _layouts[name] = CheckpointLayout(name, matches, plan, companions)


def model_type(kind: str) -> Callable[[Mapping[str, Any]], bool]:
    """For `CheckpointLayout.matches`: whether a config.json states this model_type."""
    return lambda config: config.get("model_type") == kind


def find_layout(config: Mapping[str, Any]) -> CheckpointLayout:
    """The layout of a config.json. Raises ModelError BAD_CONFIG for one of no known family."""
    for module in sorted({info.full_module for info in CATALOG if "torch" in info.requires}):
        importlib.import_module(module)
    matching = [layout for layout in _layouts.values() if layout.matches(config)]
    if len(matching) == 1:
        return matching[0]
    raise bad_config(
        f"config.json (model_type {config.get('model_type')!r}) is of no known layout",
        f"known layouts: {', '.join(sorted(_layouts))}",
    )


def load_module(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    attention: str = "auto",
    should_cancel: Callable[[], bool] = lambda: False,
) -> Any:
    """The transformers model of a checkpoint folder, in eval mode; no tokenizer is needed.

    The folder is in its family's official or in transformers' native layout. Raises ModelError:
    WEIGHTS_NOT_FOUND, BAD_CONFIG, WEIGHTS_CORRUPT, UNSAFE_CHECKPOINT, SHAPE_MISMATCH, KEY_MISMATCH,
    NAN_WEIGHTS, DTYPE_UNSUPPORTED, LOAD_CANCELLED, and what `placement.place` raises.
    """
    where = resolve_placement(device, dtype, attention)
    root = Path(folder).expanduser()
    config = read_config(root)
    layout = find_layout(config)
    plan = layout.plan(config, root)
    _check_counts(plan.config)
    files = [path for source in plan.folders or (root,) for path in weight_files(source)]
    module = build_empty(plan, where)
    _fill(module, files, plan.convert, where, should_cancel)
    _log.info("loaded %s (%s) as %s", root, layout.name, where)
    return module.eval()


def _check_counts(config: Any) -> None:
    """What transformers builds a model of, that cannot answer. Raises ModelError BAD_CONFIG."""
    text = config.text_config
    check_integer("config.json: max_position_embeddings", text.max_position_embeddings, 1)
    for part in (text, config.vision_config):
        for name in _HEADS:
            stated = getattr(part, name, None)
            for count in stated if isinstance(stated, (list, tuple)) else [stated]:
                if count is not None:
                    check_integer(f"config.json: {name}", count, 1)


def build_empty(plan: LoadPlan, where: Placement) -> Any:
    """The planned model with buffers computed and parameters allocated, not initialised."""
    from transformers.initialization import no_init_weights

    with _build_lock, no_init_weights():
        module = _construct(plan, where)
    # The parameters made so far are untouched pages: replace them by ones of the right kind.
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=where.dtype, device=where.device)
            setattr(owner, name, nn.Parameter(empty))
        for name, buffer in owner.named_buffers(recurse=False):
            # Buffers that are no part of a checkpoint (rotary frequencies) stay in full precision.
            kept = name in owner._non_persistent_buffers_set or not buffer.is_floating_point()
            setattr(owner, name, buffer.to(where.device, buffer.dtype if kept else where.dtype))
    module.tie_weights()
    return module


def expect_rank(key: str, value: Tensor, rank: int) -> None:
    """For a `Convert` that takes a tensor apart. Raises ModelError SHAPE_MISMATCH."""
    if value.dim() != rank:
        raise ModelError(
            ErrorCode.SHAPE_MISMATCH,
            f"{key} is {list(value.shape)} in the checkpoint, expected {rank} dimensions",
        )


def build_random(plan: LoadPlan, where: Placement) -> Any:
    """The planned model with random weights, in eval mode."""
    with _build_lock:
        module = _construct(plan, where)
    move_module(module, device=where.device, dtype=where.dtype)
    return module.eval()


def _construct(plan: LoadPlan, where: Placement) -> Any:
    plan.config._attn_implementation = plan.attention(where.attention)
    plan.config.dtype = where.dtype
    try:
        with torch.device("meta"):
            shape = plan.model_class(plan.config)
        refuse_oversized(shape, where)
        return plan.model_class(plan.config)
    except _UNBUILDABLE as error:
        raise bad_config(f"no {plan.model_class.__name__} can be built: {error}") from error


def _fill(
    module: Any,
    files: list[Path],
    convert: Convert,
    where: Placement,
    should_cancel: Callable[[], bool],
) -> None:
    """Copy every tensor to its place. Raises when a key is strange or a parameter stays empty."""
    targets = module.state_dict(keep_vars=True)
    filled: dict[int, str] = {}  # parameter -> the name that filled it
    strange: list[str] = []
    total, done = sum(path.stat().st_size for path in files), 0
    progress = LoggedProgress("loading weights")
    for path in files:
        for key, value in iterate_tensors(path):
            done += value.nbytes
            progress.at(done, total)
            if should_cancel():
                raise ModelError(ErrorCode.LOAD_CANCELLED, "loading the model was cancelled")
            if value.is_floating_point() and value.dtype not in _STORED:
                raise _quantised(key, value)  # before arithmetic that float8 does not have
            for name, tensor in convert(key, value):
                target = targets.get(name)
                if target is None:
                    strange.append(key)
                    continue
                _copy(name, target, tensor, where, filled.get(id(target)))
                filled.setdefault(id(target), name)
    progress.finish()
    empty = sorted(name for name, value in targets.items() if id(value) not in filled)
    if strange or empty:
        raise ModelError(
            ErrorCode.KEY_MISMATCH,
            "the checkpoint does not fit its config.json: "
            f"{len(strange)} keys have no place{_some(strange)}, "
            f"{len(empty)} parameters have no key{_some(empty)}",
            "is it the checkpoint of another model, or was a shard left out?",
        )


def _copy(
    name: str, target: Tensor, value: Tensor, where: Placement, filled_by: str | None
) -> None:
    if target.is_floating_point() and value.dtype not in _STORED:
        raise _quantised(name, value)  # before its shape, which packing has changed
    if target.shape != value.shape:
        raise ModelError(
            ErrorCode.SHAPE_MISMATCH,
            f"{name} is {list(value.shape)} in the checkpoint, {list(target.shape)} by config.json",
        )
    with torch.no_grad():
        if filled_by is not None:  # what a checkpoint holds twice, tied or not, must not differ
            if not torch.equal(target, value.to(target.device, target.dtype)):
                raise ModelError(
                    ErrorCode.KEY_MISMATCH,
                    f"{name} is in the checkpoint twice, with different values"
                    if filled_by == name
                    else f"{name} shares its weights with {filled_by} by config.json, but differs "
                    "in the checkpoint",
                )
            return
        target.copy_(value)
        if not target.is_floating_point() or _finite(target):
            return
    if _finite(value):
        raise ModelError(
            ErrorCode.DTYPE_UNSUPPORTED,
            f"{name} holds values beyond the range of {dtype_name(where.dtype)}",
            "use bfloat16 or float32"
            if where.dtype == torch.float16
            else "there is no wider dtype to load them in: the checkpoint is damaged",
        )
    raise ModelError(
        ErrorCode.NAN_WEIGHTS, f"{name} holds NaN or infinity", "the checkpoint is damaged"
    )


def _quantised(name: str, value: Tensor) -> ModelError:
    stored = ", ".join(dtype_name(dtype) for dtype in _STORED)
    return ModelError(
        ErrorCode.DTYPE_UNSUPPORTED,
        f"{name} is stored as {dtype_name(value.dtype)}, expected one of {stored}",
        "take the model's unquantised weights; quantization int8 or nf4 makes them small in memory",
    )


def _finite(tensor: Tensor) -> bool:
    """Whether every value is: NaN and infinity show in the extremes, found in a single pass."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f" ({shown}{', ...' if len(names) > 4 else ''})" if names else ""


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
