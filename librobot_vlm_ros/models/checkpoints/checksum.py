"""The sha256 of a checkpoint's weights, and the check against those that are allowed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.progress import LoggedProgress
from librobot_vlm_ros.models.checkpoints.shards import read_config, weight_files
from librobot_vlm_ros.models.families.llava.checkpoint import tower_folder
from librobot_vlm_ros.models.families.llava.configuration import is_original
from librobot_vlm_ros.models.families.paligemma.masks import find_mask_decoder

__all__ = ["check_sha256", "weights_sha256"]

_CHUNK = 8 << 20
_TOWER = "vision_tower"


def weights_sha256(folder: str | Path, should_cancel: Callable[[], bool] | None = None) -> str:
    """64 hex digits that stand for every byte of a folder's weights, and of what is loaded with
    them: a LLaVA's vision tower, wherever it lies, and a PaliGemma's decoder of masks beside them.

    One file (``model.safetensors``): its own sha256, as ``sha256sum`` and the hub's pages give it.
    Shards: the sha256 of their lines ``name:sha256``, sorted by name, each ended by a newline;
    files of a tower are named ``vision_tower/name``.
    Raises ModelError WEIGHTS_NOT_FOUND, LOAD_CANCELLED.
    """
    root = Path(folder).expanduser()
    named = {path.name: path for path in weight_files(root)}
    tower, masks = _tower_of(root), find_mask_decoder(root)
    if tower is not None:
        named |= {f"{_TOWER}/{path.name}": path for path in weight_files(tower)}
    if masks is not None:
        named[masks.name] = masks
    total = sum(path.stat().st_size for path in named.values())
    progress = LoggedProgress(f"sha256 of {root.name}")
    done = 0
    digests: dict[str, str] = {}
    for name, path in sorted(named.items()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                if should_cancel is not None and should_cancel():
                    raise ModelError(ErrorCode.LOAD_CANCELLED, "loading the model was cancelled")
                digest.update(chunk)
                done += len(chunk)
                progress.at(done, total)
        digests[name] = digest.hexdigest()
    progress.finish()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name}:{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _tower_of(root: Path) -> Path | None:
    """The folder that a LLaVA's tower is loaded from; None where the shards hold it."""
    config = read_config(root) if (root / "config.json").is_file() else {}
    if is_original(config):
        return tower_folder(config, root)
    return root / _TOWER if (root / _TOWER).is_dir() else None


def check_sha256(
    folder: Path, allowed: Sequence[str], should_cancel: Callable[[], bool] | None = None
) -> None:
    """Nothing when `allowed` is empty or holds the folder's sha256.

    Raises ModelError CHECKSUM_MISMATCH, and as `weights_sha256` does.
    """
    if not allowed:
        return
    found = weights_sha256(folder, should_cancel)
    if found not in allowed:
        shown = ", ".join(allowed[:3]) + (", ..." if len(allowed) > 3 else "")
        raise ModelError(
            ErrorCode.CHECKSUM_MISMATCH,
            f"the weights in {folder} have the sha256 {found}, allowed is {shown}",
            "The files were changed or damaged, or they are those of another model or revision: "
            "get them again from where you trust them, or correct weights_sha256.",
        )
