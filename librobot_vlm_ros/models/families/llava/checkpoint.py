"""Layouts of LLaVA-1.5 checkpoints: the official one and transformers' own.

The official shards hold the language model and the projector. The CLIP tower, which was not
trained, comes from the folder that config.json names as `mm_vision_tower`, or is the published one
from the hub; a folder ``vision_tower`` inside the checkpoint folder goes before both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.hub import find_weights, in_hub_cache, is_hub_id
from librobot_vlm_ros.models.checkpoints.loading import (
    DERIVED,
    LoadPlan,
    expect_rank,
    key_map,
    native_tensors,
    register_layout,
    renamed,
)
from librobot_vlm_ros.models.checkpoints.path_policy import refuse_foreign
from librobot_vlm_ros.models.checkpoints.shards import read_config, tensor_names, weight_files
from librobot_vlm_ros.models.configuration import (
    bad_config,
    bad_value,
    check_feature_layer,
    from_dict,
)
from librobot_vlm_ros.models.families.llava.configuration import (
    CLIP_LARGE_336,
    is_original,
    original_to_native,
)
from librobot_vlm_ros.models.registry import model_info

#: The tower of the published models, at the commit that they are known to work with.
_CLIP_ID = "openai/clip-vit-large-patch14-336"
#: CLIP's own default, which its config.json may leave out.
_CLIP_WIDTH = 768
_LONGEST_NAME = 1000
_CLIP_REVISION = "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"

_OFFICIAL = key_map(
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^lm_head\.", "lm_head."),
)
#: The half of a CLIP checkpoint that reads text.
_CLIP_TEXT = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$)")
_TOKEN_TABLES = ("embed_tokens.weight", "lm_head.weight")
_TOWER_KEY = "model.vision_tower."


def plan_for(config: Any) -> LoadPlan:
    """Keys as transformers names them, for its LlavaConfig. Raises ModelError BAD_CONFIG."""
    from transformers import LlavaForConditionalGeneration

    check_feature_layer(config)
    return LoadPlan(LlavaForConditionalGeneration, config, native_tensors)


def _plan_original(config: dict[str, Any], folder: Path) -> LoadPlan:
    _check_tower_name(config)
    tower = tower_folder(config, folder)
    native = original_to_native(config, _tower_config(config, folder, tower))
    words, rows = int(config["vocab_size"]), native.text_config.vocab_size

    def convert(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        if DERIVED.search(key) or (tower is not None and _CLIP_TEXT.search(key)):
            return
        name = renamed(key, _OFFICIAL)
        if name.endswith(_TOKEN_TABLES):
            expect_rank(key, value, 2)
            if value.shape[0] == words:
                value = torch.cat([value, value.new_zeros(rows - words, value.shape[1])])
        yield name, value

    folders = (folder,) if tower is None else (folder, tower)
    return dataclasses.replace(plan_for(native), convert=convert, folders=folders)


def _check_tower_name(config: Mapping[str, Any]) -> None:
    named = config.get("mm_vision_tower") or ""
    if not isinstance(named, str) or not named.isprintable() or len(named) > _LONGEST_NAME:
        raise bad_value("config.json: mm_vision_tower", str(named)[:99], "a folder or hub id")


def tower_folder(config: Mapping[str, Any], folder: Path) -> Path | None:
    """Where the weights of an official checkpoint's tower lie; None where the shards hold them.

    Of the hub only the published tower is taken, at its pinned commit: what to download is not for
    a config.json to say. Raises ModelError WEIGHTS_NOT_FOUND, BagError PATH_NOT_ALLOWED.
    """
    if any(key.startswith(_TOWER_KEY) for key in tensor_names(folder)):
        return None
    named = str(config.get("mm_vision_tower") or _CLIP_ID)
    found = next((place for place in _tower_places(named, folder) if place.is_dir()), None)
    if found is not None:
        refuse_foreign([found], folder)
        return found
    try:
        if named != _CLIP_ID:
            download = in_hub_cache(folder) and not is_hub_id(named)
            why = "a download cannot name a folder here" if download else "there is no such folder"
            raise ModelError(ErrorCode.WEIGHTS_NOT_FOUND, why)
        return find_weights(model_info("llava-v1.5-7b"), named, _CLIP_REVISION).folder
    except ModelError as error:
        raise ModelError(
            ErrorCode.WEIGHTS_NOT_FOUND,
            f"the vision tower {named!r} of this LLaVA is not there: {error.message}",
            f"put it into {folder / 'vision_tower'}; with a network: hf download "
            f"{named if is_hub_id(named) else _CLIP_ID} --local-dir {folder / 'vision_tower'}",
        ) from error


def _tower_places(named: str, folder: Path) -> list[Path]:
    """Folders that may be the tower of that name."""
    places = [folder / "vision_tower"]
    with suppress(OSError, RuntimeError, ValueError):  # a NUL, an unknown user
        root, inside = folder.resolve(), (folder / named).resolve()
        if root in inside.parents:
            places.append(inside)
        elif inside != root and not in_hub_cache(folder):
            # What somebody published must not choose which folders of this machine are read.
            places += [inside, Path(named).expanduser()]
    return places


def _tower_config(config: Mapping[str, Any], folder: Path, tower: Path | None) -> Mapping[str, Any]:
    """The tower's dimensions; None for `tower` means that its weights lie in the shards."""
    named = config.get("mm_vision_tower")
    if tower is not None:
        found: Mapping[str, Any] = read_config(tower)
    elif (beside := _config_of_tower(config, folder)) is not None:
        found = beside
    elif isinstance(config.get("vision_config"), Mapping):
        found = config["vision_config"]
    else:
        found = CLIP_LARGE_336 if named == _CLIP_ID else {}
    inner = found.get("vision_config")
    found = inner if isinstance(inner, Mapping) else found
    has = found.get("hidden_size") or _CLIP_WIDTH
    width = config.get("mm_hidden_size") or has
    if found and has == width:
        return found
    raise bad_config(
        f"the dimensions of the vision tower {named!r} are not known"
        if not found
        else f"config.json of a LLaVA: mm_hidden_size is {width!r}, that of the vision tower "
        f"{named!r} is {has!r}",
        "put the tower's config.json and weights into a folder vision_tower beside the shards",
    )


def _config_of_tower(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """config.json of the folder that belongs to a tower in the shards, where there is one."""
    for place in _tower_places(str(config.get("mm_vision_tower") or "vision_tower"), folder):
        if (place / "config.json").is_file():
            refuse_foreign([place], folder)
            return read_config(place)
    return None


def _tower_files(config: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Files of the tower that the official shards do not hold."""
    tower = tower_folder(config, folder)
    files = [] if tower is None else weight_files(tower)
    return {f"vision_tower/{path.name}": path for path in files}


register_layout("llava-1.5 (official)", is_original, _plan_original, _tower_files)
register_layout(
    "llava-1.5 (transformers)",
    lambda config: config.get("model_type") == "llava" and not is_original(config),
    lambda config, folder: plan_for(from_dict("LlavaConfig", config, "a LLaVA")),
)
