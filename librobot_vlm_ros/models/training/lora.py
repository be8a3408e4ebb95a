"""LoRA adapters (Hu et al., 2021, arXiv:2106.09685) in a transformers model, one at a time.

The model stays transformers' class; peft wraps the linear layers inside it that are adapted, and
the folders are peft's. Every function leaves the model as it was when it raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.shards import iterate_tensors, read_json
from librobot_vlm_ros.models.configuration import ModelConfig, bad_config

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_NAME = "default"
_PREFIX = "base_model.model."
#: Fields of an adapter_config.json that say what the adapter computes.
_TAKEN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
)
#: Fields that say how it came about.
_IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
#: Initialisations that leave the base weights as they are.
_PLAIN_INITS = (None, True, False, "eva", "gaussian", "orthogonal")


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter is in place; a merged one is part of the weights."""
    return bool(wrapped_layers(module))


def add_adapter(module: nn.Module, language_model: nn.Module, settings: ModelConfig) -> None:
    """Put in a new adapter, which changes no answer until it is trained.

    From here on only the adapter learns. Without `lora_target_modules`, every linear layer inside
    `language_model`, a part of `module`, is adapted. Raises ModelError BAD_CONFIG where there is an
    adapter already or for targets that are no layers, MISSING_DEPENDENCY without peft.
    """
    if has_adapter(module):
        raise bad_config(
            "the model has an adapter already", "merge_adapter or remove_adapter first"
        )
    targets = settings.lora_target_modules
    if targets is None:
        (path,) = [name for name, part in module.named_modules() if part is language_model]
        linear = [
            name for name, part in language_model.named_modules() if isinstance(part, nn.Linear)
        ]
        ends = sorted({name.rpartition(".")[2] for name in linear})
        targets = rf"{re.escape(path)}\.(.*\.)?({'|'.join(map(re.escape, ends))})"
    config = _peft().LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with _undone_on_error(module):
        _attach(module, config)


def load_adapter(
    module: nn.Module, folder: str | Path, native_key: Callable[[str], str] = lambda key: key
) -> None:
    """Put in the adapter of a folder of `save_adapter` or of peft, in place of one that is there.

    `native_key` gives today's name of a key that an older version of transformers wrote. Raises
    ModelError: WEIGHTS_NOT_FOUND, UNSAFE_CHECKPOINT for a pickle, WEIGHTS_CORRUPT, BAD_CONFIG for
    what is no low-rank adapter or would change the model in other ways, too, KEY_MISMATCH and
    SHAPE_MISMATCH for the adapter of another model, NAN_WEIGHTS, MISSING_DEPENDENCY without peft.
    """
    folder = Path(folder).expanduser()
    stated = _read_config(folder)
    config = _lora_config(stated)
    with _undone_on_error(module):
        _take_out(module)
        _attach(module, config)
        missing = adapter_parameters(module)
        strange = []
        for key, value in iterate_tensors(folder / _WEIGHTS):
            name = key if key in missing else _PREFIX + native_key(key.removeprefix(_PREFIX))
            if (parameter := missing.pop(name, None)) is None:
                strange.append(key)
            else:
                _fill(key, parameter, value)
        if strange or missing:
            raise ModelError(
                ErrorCode.KEY_MISMATCH,
                f"the adapter in {folder} is not one of this model: {len(strange)} keys have no "
                f"place{_first(strange)}, {len(missing)} places have no key{_first([*missing])}",
                f"it was made for {stated.get('base_model_name_or_path') or 'another model'}",
            )


def save_adapter(module: Any, folder: str | Path, base: str) -> None:
    """Write the adapter alone, in safetensors, as peft does; `base` names the model it belongs to.

    Raises ModelError BAD_CONFIG without an adapter.
    """
    from safetensors.torch import save_file

    _need_adapter(module)
    folder = Path(folder)
    config = module.peft_config[_NAME].to_dict()
    config.pop("runtime_config", None)
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    plain = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: parameter.detach().cpu().contiguous()
        for key, parameter in adapter_parameters(module).items()
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (folder / _CONFIG).write_text(text, encoding="utf-8")


def merge_adapter(module: nn.Module) -> None:
    """Make the adapter part of the weights: equal answers, as quick as without an adapter.

    Raises ModelError BAD_CONFIG without an adapter and for quantised layers, which cannot hold the
    sum, and NAN_WEIGHTS where a sum is not finite.
    """
    _need_adapter(module)
    layers = [layer for _path, _owner, _name, layer in wrapped_layers(module)]
    if any(not layer.get_base_layer().weight.is_floating_point() for layer in layers):
        raise bad_config(
            "an adapter cannot be merged into quantised weights without loss",
            "save_adapter, load the model with quantization none, load_adapter, merge_adapter",
        )
    merged: list[Any] = []
    try:
        for layer in layers:
            layer.merge(safe_merge=True)
            merged.append(layer)
    except ValueError as error:
        for layer in merged:
            layer.unmerge()
        raise ModelError(ErrorCode.NAN_WEIGHTS, f"the adapter was not merged: {error}") from error
    _take_out(module)


def remove_adapter(module: nn.Module) -> None:
    """Take the adapter out: the model is what it was without it. Nothing learns after.

    Raises ModelError BAD_CONFIG without an adapter.
    """
    _need_adapter(module)
    _take_out(module)


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by the keys of its file; {} without an adapter."""
    found: dict[str, nn.Parameter] = {}
    for path, _owner, _name, layer in wrapped_layers(module):
        for key, parameter in layer.named_parameters():
            if not key.startswith("base_layer."):
                plain = ".".join(part for part in key.split(".") if part != _NAME)
                found[f"{_PREFIX}{path}.{plain}"] = parameter
    return found


def wrapped_layers(module: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """Every adapted layer: its path, the module that owns it, its name there, and itself."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [
        (f"{path}.{name}".lstrip("."), owner, name, layer)
        for path, owner in module.named_modules()
        for name, layer in owner.named_children()
        if isinstance(layer, BaseTunerLayer)
    ]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"adapters need the package peft: {error}",
            "install it: pip install peft",
        ) from error
    return peft


def _need_adapter(module: nn.Module) -> None:
    if not has_adapter(module):
        raise bad_config("the model has no adapter", "add_adapter or load_adapter first")


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder that holds weights, too, as safetensors."""
    if not (folder / _CONFIG).is_file():
        raise ModelError(
            ErrorCode.WEIGHTS_NOT_FOUND,
            f"{folder} holds no {_CONFIG}" if folder.is_dir() else f"there is no folder {folder}",
            f"an adapter folder holds {_CONFIG} and {_WEIGHTS}",
        )
    if not (folder / _WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise ModelError(
                ErrorCode.UNSAFE_CHECKPOINT,
                f"{_PICKLE} is a pickle, which may run code; it was not opened",
                f"save the adapter as {_WEIGHTS}",
            )
        raise ModelError(ErrorCode.WEIGHTS_NOT_FOUND, f"{folder} holds no {_WEIGHTS}")
    return read_json(folder / _CONFIG)


def _lora_config(stated: Mapping[str, Any]) -> Any:
    """peft's LoraConfig for an adapter_config.json that asks for a plain LoRA."""
    kind = stated.get("peft_type")
    if kind != "LORA":
        raise bad_config(f"{_CONFIG}: peft_type is {kind!r}, expected 'LORA'")
    if (init := stated.get("init_lora_weights")) not in _PLAIN_INITS:
        raise bad_config(
            f"{_CONFIG}: init_lora_weights {init!r} changes the base weights, too",
            "convert it to a plain LoRA when saving it (see peft's documentation)",
        )
    usual = _peft().LoraConfig().to_dict()
    strange = [
        key
        for key, value in stated.items()
        if value and key not in (*_TAKEN, *_IGNORED) and value != usual.get(key)
    ]
    if strange:
        raise bad_config(
            f"{_CONFIG} asks for what is not supported here: {', '.join(sorted(strange))}",
            "use a plain LoRA adapter",
        )
    try:
        return _peft().LoraConfig(**{name: stated[name] for name in _TAKEN if name in stated})
    except (KeyError, TypeError, ValueError) as error:
        raise bad_config(f"{_CONFIG}: {error}") from error


def _attach(module: nn.Module, config: Any) -> None:
    """Put in an adapter that changes nothing yet, and let nothing else learn.

    Its weights are float32 whatever the model computes in: steps of training are too small for half
    precision. Raises ModelError BAD_CONFIG.
    """
    try:
        _peft().inject_adapter_in_model(config, module, adapter_name=_NAME)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise bad_config(
            f"the model cannot take this adapter: {error}", "see lora_target_modules"
        ) from error
    named = () if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    paths = [f".{path}" for path, _owner, _name, _layer in wrapped_layers(module)]
    missing = [name for name in named if not any(path.endswith(f".{name}") for path in paths)]
    if missing:
        raise bad_config(
            f"the model has no layer that an adapter could have called {', '.join(missing)}",
            "see lora_target_modules",
        )
    for parameter in adapter_parameters(module).values():
        parameter.data = parameter.data.float()
    module.train(module.training)  # or the dropout of new layers is at work while answering


def _take_out(module: nn.Module) -> None:
    for _path, owner, name, layer in wrapped_layers(module):
        setattr(owner, name, layer.get_base_layer())
    for attribute in ("peft_config", "active_adapter"):
        module.__dict__.pop(attribute, None)


def _fill(key: str, parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise ModelError(
            ErrorCode.SHAPE_MISMATCH,
            f"{key} is {list(value.shape)}, this model has room for {list(parameter.shape)}",
            "use the adapter with the model that it was made for",
        )
    if not bool(torch.isfinite(value).all()):
        raise ModelError(
            ErrorCode.NAN_WEIGHTS, f"{key} holds NaN or infinity", "the adapter is damaged"
        )
    with torch.no_grad():
        parameter.copy_(value)


@contextmanager
def _undone_on_error(module: nn.Module) -> Iterator[None]:
    """Put the adapter that was there back, and what was to learn, when something raises."""
    before = wrapped_layers(module)
    learning = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    held: Any = getattr(module, "peft_config", None)
    try:
        yield
    except BaseException:
        _take_out(module)
        for _path, owner, name, layer in before:
            setattr(owner, name, layer)
        for parameter, learns in learning:
            parameter.requires_grad = learns
        if held is not None:
            module.peft_config = held
        raise


def _first(names: list[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
