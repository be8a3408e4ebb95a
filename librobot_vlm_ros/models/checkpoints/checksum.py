"""The sha256 of a checkpoint's weights, and the check against the allowed ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.loading import find_layout
from librobot_vlm_ros.models.checkpoints.progress import LoggedProgress
from librobot_vlm_ros.models.checkpoints.shards import read_config, weight_files

_CHUNK = 8 << 20


def weights_sha256(folder: str | Path, should_cancel: Callable[[], bool] | None = None) -> str:
    """64 hex digits that stand for every byte of a folder's weights, and of what is loaded with
    them: a LLaVA's vision tower, wherever it lies, and a PaliGemma's decoder of masks beside them.

    One file (``model.safetensors``): its own sha256, as ``sha256sum`` and the hub's pages give it.
    Shards: the sha256 of their lines ``name:sha256``, sorted by name, each ended by a newline;
    files of a tower are named ``vision_tower/name``.
    Raises ModelError WEIGHTS_NOT_FOUND, BAD_CONFIG, LOAD_CANCELLED.
    """
    root = Path(folder).expanduser()
    named = {path.name: path for path in weight_files(root)}
    if (root / "config.json").is_file():
        config, layout = read_config(root), None
        with contextlib.suppress(ModelError):  # of no known layout: it will not be loaded
            layout = find_layout(config)
        named |= layout.companions(config, root) if layout is not None else {}
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
