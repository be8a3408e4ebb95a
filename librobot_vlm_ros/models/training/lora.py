"""LoRA adapters in a transformers model: attach, write, read, remove, merge; peft's folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.shards import iterate_tensors, read_json

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "adapter_parameters",
    "attach",
    "base_name",
    "linear_layers",
    "load_peft",
    "lora_config",
    "merge",
    "read_adapter",
    "read_config",
    "take_out",
    "wrapped_layers",
    "write_adapter",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
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
#: Fields that say how it came about, or nothing by themselves.
_IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
#: Ways to begin that leave the base weights as they are.
_PLAIN_BEGINNINGS = (None, True, False, "eva", "gaussian", "orthogonal")


def read_config(folder: Path) -> Any:
    """peft's LoraConfig of an adapter folder.

    Raises ModelError WEIGHTS_NOT_FOUND, UNSAFE_CHECKPOINT where the weights are a pickle,
    BAD_CONFIG for what is no low-rank adapter or would change the model in other ways, too.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            ErrorCode.WEIGHTS_NOT_FOUND,
            f"{folder} holds no {CONFIG}" if folder.is_dir() else f"there is no folder {folder}",
            f"an adapter folder holds {CONFIG} and {WEIGHTS}",
        )
    if not (folder / WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise ModelError(
                ErrorCode.UNSAFE_CHECKPOINT,
                f"{_PICKLE} is a pickle, which may run code; it was not opened",
                f"save the adapter as {WEIGHTS}",
            )
        raise ModelError(ErrorCode.WEIGHTS_NOT_FOUND, f"{folder} holds no {WEIGHTS}")
    given = read_json(folder / CONFIG)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise ModelError(ErrorCode.BAD_CONFIG, f"{CONFIG}: peft_type is {kind!r}, expected 'LORA'")
    if (beginning := given.get("init_lora_weights")) not in _PLAIN_BEGINNINGS:
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"{CONFIG}: init_lora_weights {beginning!r} changes the base weights, too",
            "convert it to a plain LoRA when saving it (see peft's documentation)",
        )
    if strange := _not_understood(given):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"{CONFIG} asks for what is not supported here: {', '.join(strange)}",
            "use a plain LoRA adapter",
        )
    try:
        return load_peft().LoraConfig(**{name: given[name] for name in _TAKEN if name in given})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(ErrorCode.BAD_CONFIG, f"{CONFIG}: {error}") from error


def _not_understood(given: Mapping[str, Any]) -> list[str]:
    """Fields that would change the model in other ways."""
    known = {*_TAKEN, *_IGNORED}
    neutral = (None, False, "none", [], {})
    return sorted(key for key, value in given.items() if key not in known and value not in neutral)


def base_name(folder: Path) -> str:
    """The model that an adapter says it was made for."""
    return str(read_json(folder / CONFIG).get("base_model_name_or_path") or "another model")


def load_peft() -> Any:
    """The package peft. Raises ModelError MISSING_DEPENDENCY."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"adapters need the package peft: {error}",
            "install it: pip install peft",
        ) from error
    return peft


_NAME = "default"
_PREFIX = "base_model.model."


def lora_config(
    module: nn.Module,
    language_model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | str | None,
) -> Any:
    """peft's LoraConfig; without `targets` for every linear layer inside `language_model`."""
    if targets is None:
        (path,) = [name for name, part in module.named_modules() if part is language_model]
        ends = sorted({name.rpartition(".")[2] for name in linear_layers(language_model)})
        targets = rf"{re.escape(path)}\.(.*\.)?({'|'.join(map(re.escape, ends))})"
    chosen = targets if isinstance(targets, str) else list(targets)
    return load_peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a model by their paths, quantised ones too."""
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def attach(module: nn.Module, config: Any) -> None:
    """Put an adapter into `module` that changes nothing yet; from here on only the adapter learns.

    Its weights are float32 whatever the model computes in: steps of training are too small for half
    precision. Raises ModelError BAD_CONFIG, and leaves the model as it was.
    """
    peft = load_peft()
    with _undone_on_error(module):
        try:
            peft.inject_adapter_in_model(config, module, adapter_name=_NAME)
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"the model cannot take this adapter: {error}",
                "see lora_target_modules",
            ) from error
        adapted = [path for path, _owner, _name, _layer in wrapped_layers(module)]
        targets = config.target_modules
        missing = (
            ()
            if isinstance(targets, str)
            else sorted(
                name for name in targets or () if not any(_ends(path, name) for path in adapted)
            )
        )
        if missing:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"the model has no layer that an adapter could have called {', '.join(missing)}",
                "see lora_target_modules",
            )
        for parameter in adapter_parameters(module).values():
            parameter.data = parameter.data.float()
        module.train(module.training)  # or the dropout of new layers is at work while answering


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


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by the keys of its file."""
    found: dict[str, nn.Parameter] = {}
    for path, _owner, _name, layer in wrapped_layers(module):
        for key, parameter in layer.named_parameters():
            if not key.startswith("base_layer."):
                plain = ".".join(part for part in key.split(".") if part != _NAME)
                found[f"{_PREFIX}{path}.{plain}"] = parameter
    return found


def take_out(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Take the adapter out again; gives (owner, name, layer) of each adapted layer."""
    taken = [(owner, name, layer) for _path, owner, name, layer in wrapped_layers(module)]
    for owner, name, layer in taken:
        setattr(owner, name, layer.get_base_layer())
    for attribute in ("peft_config", "active_adapter"):
        module.__dict__.pop(attribute, None)
    return taken


def merge(module: nn.Module) -> None:
    """Add the adapter to the weights of its layers, and take it out.

    Raises ModelError BAD_CONFIG for quantised layers, which cannot hold the sum, and NAN_WEIGHTS
    where a sum is not finite; the adapter is then still in place.
    """
    layers = [layer for _path, _owner, _name, layer in wrapped_layers(module)]
    if any(not layer.get_base_layer().weight.is_floating_point() for layer in layers):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            "an adapter cannot be merged into quantised weights without loss",
            "save_adapter, load the model with quantization none, load_adapter, merge_adapter",
        )
    done: list[Any] = []
    try:
        for layer in layers:
            layer.merge(safe_merge=True)
            done.append(layer)
    except ValueError as error:
        for layer in done:
            layer.unmerge()
        raise ModelError(ErrorCode.NAN_WEIGHTS, f"the adapter was not merged: {error}") from error
    take_out(module)


def write_adapter(folder: Path, module: Any, base: str) -> None:
    """Write the adapter as peft does; `base` names the model that it belongs to."""
    from safetensors.torch import save_file

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
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def read_adapter(
    folder: Path, module: nn.Module, native: Callable[[str], str] = lambda key: key
) -> None:
    """Put the adapter of a folder into `module`, in place of one that is there.

    `native` gives today's name of a key that an older version of transformers wrote. Raises
    ModelError: WEIGHTS_NOT_FOUND, UNSAFE_CHECKPOINT for a pickle, WEIGHTS_CORRUPT, BAD_CONFIG,
    KEY_MISMATCH and SHAPE_MISMATCH for the adapter of another model, NAN_WEIGHTS. The model is then
    as it was.
    """
    config = read_config(folder)
    with _undone_on_error(module):
        take_out(module)
        attach(module, config)
        places = adapter_parameters(module)
        strange = []
        for key, value in iterate_tensors(folder / WEIGHTS):
            today = key if key in places else _PREFIX + native(key.removeprefix(_PREFIX))
            place = places.pop(today, None)
            if place is None:
                strange.append(key)
                continue
            _fill(key, place, value)
        if strange or places:
            raise ModelError(
                ErrorCode.KEY_MISMATCH,
                f"the adapter in {folder} is not one of this model: {len(strange)} keys have no "
                f"place{_first(strange)}, {len(places)} places have no key{_first([*places])}",
                f"it was made for {base_name(folder)}",
            )


def _fill(key: str, place: nn.Parameter, value: Tensor) -> None:
    if place.shape != value.shape:
        raise ModelError(
            ErrorCode.SHAPE_MISMATCH,
            f"{key} is {list(value.shape)}, this model has room for {list(place.shape)}",
            "use the adapter with the model that it was made for",
        )
    if not bool(torch.isfinite(value).all()):
        raise ModelError(
            ErrorCode.NAN_WEIGHTS, f"{key} holds NaN or infinity", "the adapter is damaged"
        )
    with torch.no_grad():
        place.copy_(value)


@contextmanager
def _undone_on_error(module: nn.Module) -> Iterator[None]:
    """Put the adapter that was there back, and what was to learn, when something raises."""
    before = [(owner, name, layer) for _path, owner, name, layer in wrapped_layers(module)]
    learning = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    held = getattr(module, "peft_config", None)
    try:
        yield
    except BaseException:
        take_out(module)
        for owner, name, layer in before:
            setattr(owner, name, layer)
        for parameter, learns in learning:
            parameter.requires_grad = learns
        if held is not None:
            module.peft_config = held  # type: ignore[assignment]
        raise


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _first(names: list[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
