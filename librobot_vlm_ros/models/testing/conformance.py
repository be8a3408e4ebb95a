"""Whether each registered model is what it claims to be, checked at tiny size without downloads.

For every variant: its full-size configuration is built without memory and counted; a tiny
checkpoint in the official layout is written, loaded by the converter and compared with the
original arithmetic; our pixels are compared with the reference processor's; every task is run.
What differs by family stands in ``testing/<family>.py`` (`Hooks`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core import (
    TASKS,
    ErrorCode,
    Frame,
    GenerationParams,
    InferenceRequest,
    ModelError,
    VlmError,
)
from librobot_vlm_ros.models.backend import ModelInfo
from librobot_vlm_ros.models.registry import create_vlm, get_vlm, model_info

#: Largest difference of a logit that a conversion may make, in float32.
CONVERSION_TOLERANCE = 1e-4
#: Largest difference of a normalised pixel from the reference processor's.
PREPROCESS_TOLERANCE = 1e-5
#: Height and width of the pictures that are compared; none fits a model's grid.
_SIZES = ((97, 53), (53, 97), (480, 641), (721, 1279))


@dataclasses.dataclass(frozen=True)
class Conformance:
    """What was measured of one variant. None stands where there is nothing to measure."""

    name: str
    family: str
    #: Parameters of the full-size configuration, and those of the published checkpoint.
    parameters: int | None
    parameters_published: int
    conversion_max_abs_diff: float | None
    conversion_tolerance: float
    preprocess_max_abs_diff: float | None
    preprocess_tolerance: float
    #: The tasks that were answered.
    tasks: list[str]
    ok: bool
    #: Everything that went wrong, "" when nothing did.
    error: str


class Hooks(Protocol):
    """What ``testing/<family>.py`` holds, or gives by ``hooks(family)`` where it serves several."""

    def write_official(self, folder: Path) -> None:
        """Write a tiny checkpoint in the official layout, with its tokenizer."""

    def difference(self, folder: Path, module: Any) -> float:
        """Largest difference of a logit between `module` and the original arithmetic."""

    def pixels(self, vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
        """Normalised pixels of one image: ours, and the reference processor's, of one shape."""


def check_model(name: str) -> Conformance:
    """Check one registered model. Only an unknown name raises; what fails stands in the result."""
    info = model_info(name)
    problems: list[str] = []

    def measure(what: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # whatever a family's code raises is a finding, not our end
            text = str(error) if isinstance(error, VlmError) else f"{type(error).__name__}: {error}"
            problems.append(f"{what}: {text}")
            return None

    with tempfile.TemporaryDirectory(prefix="librobot-vlm-check-") as scratch:
        parameters, conversion, pixels = 0, None, None
        if "torch" not in info.requires:
            vlm = measure("loading", lambda: create_vlm(info.name))
        else:
            hooks = measure("conformance", lambda: hooks_of(info))
            parameters = measure("parameters", lambda: _parameters(info, hooks))
            folder = Path(scratch) / "official"
            if info.shipped_folder is not None:  # its own weights, in the layout they are used in
                vlm = measure("loading", lambda: create_vlm(info.name, device="cpu"))
            else:
                measure("writing", lambda: hooks.write_official(folder))
                conversion = measure("conversion", lambda: _conversion(hooks, folder))
                vlm = measure(
                    "loading",
                    lambda: create_vlm(
                        info.name, pretrained=str(folder), device="cpu", dtype="float32"
                    ),
                )
        tasks = _run_tasks(vlm, info, problems) if vlm is not None else []
        if "torch" in info.requires and vlm is not None and hooks is not None:
            pixels = measure("preprocessing", lambda: _pixels(hooks, vlm))
    if parameters is not None and parameters != info.parameters:
        problems.append(f"parameters: {parameters} built, {info.parameters} published")
    for what, value, limit in (
        ("conversion", conversion, CONVERSION_TOLERANCE),
        ("preprocessing", pixels, PREPROCESS_TOLERANCE),
    ):
        if value is not None and not value <= limit:  # NaN is not within any limit
            problems.append(f"{what}: differs by {value:.3g}, allowed are {limit:g}")
    return Conformance(
        name=info.name,
        family=info.family,
        parameters=parameters,
        parameters_published=info.parameters,
        conversion_max_abs_diff=conversion,
        conversion_tolerance=CONVERSION_TOLERANCE,
        preprocess_max_abs_diff=pixels,
        preprocess_tolerance=PREPROCESS_TOLERANCE,
        tasks=tasks,
        ok=not problems,
        error="; ".join(problems),
    )


def hooks_of(info: ModelInfo) -> Any:
    """The hooks of the model's family. Raises ModelError MISSING_DEPENDENCY where there are none.

    Those of the package's own families stand in ``testing/<folder of the family>.py``, those of a
    module elsewhere, ``package.module``, in ``package.conformance_module``.
    """
    package, _, module = info.full_module.rpartition(".")
    ours = info.module.startswith("families.")
    folder = package.rpartition(".")[2]
    name = f"{__package__}.{folder}" if ours else f"{package}.conformance_{module}"
    if importlib.util.find_spec(name) is None:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"there is no module {name} to check {info.name!r} with",
            "write it: see librobot_vlm_ros.models.testing.conformance.Hooks",
        )
    get_vlm(info.name)
    found = importlib.import_module(name)
    return found.hooks(info.family) if hasattr(found, "hooks") else found


def our_pixels(vlm: Any, image: npt.NDArray[np.uint8], **settings: Any) -> Any:
    """Normalised views [N, 3, H, W] that the model makes of an image [H, W, 3], so set."""
    import torch

    from librobot_vlm_ros.models.inputs.preprocess import normalise

    vlm.processor.images = dataclasses.replace(vlm.images, **settings)
    prepared = vlm.pixels(image)
    views = prepared if prepared.ndim == 4 else [prepared]  # several tiles, or one image
    return normalise(views, vlm.images, torch.device("cpu"), torch.float32)


def _parameters(info: ModelInfo, hooks: Any) -> int:
    """Parameters of the full-size configuration, tied ones counted once, no memory used."""
    import torch

    from librobot_vlm_ros.models.checkpoints.hub import find_weights
    from librobot_vlm_ros.models.checkpoints.loading import find_layout
    from librobot_vlm_ros.models.checkpoints.shards import read_config

    added: Callable[[Any], int] = getattr(hooks, "added_parameters", lambda module: 0)
    if info.shipped_folder is not None:
        folder = find_weights(info, None).folder
        config = read_config(folder)
        plan, added = find_layout(config).plan(config, folder), lambda module: 0
    else:
        family = importlib.import_module(f"{info.full_module.rpartition('.')[0]}.checkpoint")
        config = get_vlm(info.name).config_class(variant=info.name)
        plan = family.plan_for(config.to_transformers())
    with torch.device("meta"):
        module = plan.model_class(plan.config)
    module.tie_weights()
    return sum(int(parameter.numel()) for parameter in module.parameters()) - added(module)


def _conversion(hooks: Any, folder: Path) -> float:
    from librobot_vlm_ros.models.checkpoints.loading import load_module

    return float(hooks.difference(folder, load_module(folder, "float32", "cpu")))


def _picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Noise over a slope: every frequency, and values at both ends."""
    random = np.random.default_rng(height * width)
    noise = random.integers(0, 256, (height, width, 3))
    slope = np.linspace(0, 255, width)[None, :, None]
    return np.rint((noise + slope) / 2).astype(np.uint8)


def _pixels(hooks: Any, vlm: Any) -> float:
    largest = 0.0
    for height, width in _SIZES:
        ours, theirs = hooks.pixels(vlm, _picture(height, width))
        if ours.shape != theirs.shape:
            raise ModelError(
                ErrorCode.SHAPE_MISMATCH,
                f"{width}x{height}: ours are {list(ours.shape)}, the reference's "
                f"{list(theirs.shape)}",
            )
        largest = max(largest, float((ours - theirs).abs().max()))
    return largest


def _run_tasks(vlm: Any, info: ModelInfo, problems: list[str]) -> list[str]:
    """Run each task of the catalogue on one odd picture; the names of those that were answered."""
    frame = Frame(_picture(61, 83), camera="check", stamp_ns=1)
    answered = []
    for task in info.tasks:
        spec = TASKS[task]
        request = InferenceRequest(
            task,
            frame,
            task,
            prompt="red cube" if spec.needs_text else "",
            region=(8.0, 8.0, 48.0, 40.0) if spec.needs_region else None,
            params=GenerationParams(max_new_tokens=8),
        )
        try:
            (entry,) = vlm.run([request])
        except Exception as error:
            entry = error
        if isinstance(entry, Exception):
            problems.append(f"task {task}: {entry}")
        elif spec.output == "embedding" and entry.embedding is None:
            problems.append(f"task {task}: no embedding came back")
        else:
            answered.append(task)
    return answered
