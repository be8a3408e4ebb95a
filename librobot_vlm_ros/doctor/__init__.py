"""What is missing on this machine for a model, and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": system.check_python,
        "torch": model.check_libraries,
        "packages": system.check_packages,
        "cv_bridge": system.check_cv_bridge,
        "ros": system.check_ros,
        "shared memory": system.check_transport,
        "memory": model.check_memory,
        "weights": model.check_weights,
    }
    if probe:
        checks["NaN probe"] = model.check_answers
    for name, check in checks.items():
        yield from found_by(name, check)
