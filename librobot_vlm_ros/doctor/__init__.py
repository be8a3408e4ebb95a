"""What is missing on this machine for a model, and the fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from librobot_vlm_ros.models.backend import ModelInfo

__all__ = ["Finding", "examine", "found_by", "gib", "ok", "problem", "warning"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Literal["ok", "warning", "problem"]
    value: str
    fix: str = ""


def ok(name: str, value: str) -> Finding:
    """It is well."""
    return Finding(name, "ok", value)


def warning(name: str, value: str, fix: str = "") -> Finding:
    """It works, but not as well as it could."""
    return Finding(name, "warning", value, fix)


def problem(name: str, value: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(name, "problem", value, fix)


def gib(count: float) -> str:
    """Bytes as people read them."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def examine(
    info: ModelInfo, weights: str, device: str, dtype: str, *, probe: bool = True
) -> Iterator[Finding]:
    """Look at everything that the model needs; with `probe` also ask it about a picture."""
    from librobot_vlm_ros.doctor import system
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


def found_by(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that fails itself is a finding too, and ends nothing."""
    try:
        yield from check()
    except Exception as error:
        yield warning(name, f"could not be looked at: {type(error).__name__}: {error}")
