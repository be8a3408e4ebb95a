"""What is missing on this machine for a model, and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from librobot_vlm_ros.doctor.finding import Finding
    from librobot_vlm_ros.models.backend import ModelInfo

__all__ = ["examine"]


def examine(
    info: ModelInfo, weights: str, device: str, dtype: str, *, probe: bool = True
) -> Iterator[Finding]:
    """Look at everything that the model needs; with `probe` also ask it about a picture."""
    from librobot_vlm_ros.doctor import system
    from librobot_vlm_ros.doctor.finding import found_by
    from librobot_vlm_ros.doctor.model import ModelDoctor

    model = ModelDoctor(info, weights, device, dtype)
    yield from found_by("python", system.check_python)
    yield from found_by("torch", model.check_libraries)
    yield from found_by("packages", system.check_packages)
    yield from found_by("cv_bridge", system.check_cv_bridge)
    yield from found_by("ros", system.check_ros)
    yield from found_by("shared memory", system.check_transport)
    yield from found_by("memory", model.check_memory)
    yield from found_by("weights", model.check_weights)
    if probe:
        yield from found_by("NaN probe", model.check_answers)
