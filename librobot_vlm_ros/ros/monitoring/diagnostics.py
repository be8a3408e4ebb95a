"""What `/diagnostics` says: the model, the engine and each camera, every second."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from librobot_vlm_ros.core import VlmError
from librobot_vlm_ros.ros.inputs.camera import Camera
from librobot_vlm_ros.runtime import CameraStats, EngineStats

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)
_RECENT_ERROR_S = 10.0
_NOT_OF_ENGINE = (
    *("state", "model", "revision", "device", "dtype", "memory_bytes", "free_bytes"),
    *("last_error_age_s", "idle_tasks", "cameras"),
)


class DiagnosticsPublisher:
    """`/diagnostics`, as `diagnostic_aggregator` expects it."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)

    def publish(self, statuses: Sequence[DiagnosticStatus]) -> None:
        """Publish all statuses under the node's name."""
        name = self._node.get_fully_qualified_name().lstrip("/")
        for status in statuses:
            status.name = f"{name}: {status.name}"
            status.hardware_id = name
        message = DiagnosticArray(status=list(statuses))
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)


def model_status(
    state: str,
    wanted: str,
    problems: Iterable[VlmError],
    stats: EngineStats | None,
    warning: str = "",
) -> DiagnosticStatus:
    """Whether the node is in a state to answer, and with which model.

    `problems` keep it from that; `warning` is of what does not, but needs somebody's attention.
    """
    values: dict[str, object] = {"lifecycle_state": state}
    if stats is not None:
        values |= {
            "engine": stats.state.value,
            "model": stats.model,
            "revision": stats.revision,
            "device": stats.device,
            "dtype": stats.dtype,
            "memory_bytes": stats.memory_bytes,
            "free_memory_bytes": "" if stats.free_bytes is None else stats.free_bytes,
        }
    trouble = "; ".join(map(str, problems))
    if trouble:
        return _status("model", ERROR, trouble, values)
    if warning:
        return _status("model", WARN, warning, values)
    if stats is None:
        return _status("model", STALE, f"{state}: configure loads '{wanted}'", values)
    if state != "active":
        return _status("model", WARN, f"{state}: activate starts '{stats.model}'", values)
    return _status("model", OK, f"'{stats.model}' runs on {stats.device} in {stats.dtype}", values)


def engine_status(stats: EngineStats, waiting: Collection[str]) -> DiagnosticStatus:
    """Frames, drops, ages, speed, queue and the last error of the whole node.

    `waiting` names the standing tasks that wait for an instruction, which is no fault.
    """
    values = _figures(stats, _NOT_OF_ENGINE)
    values |= {f"idle_{name}": why for name, why in stats.idle_tasks}
    if stats.last_error and stats.last_error_age_s < _RECENT_ERROR_S:
        return _status("engine", ERROR, stats.last_error, values)
    idle = [f"{name} ({why})" for name, why in stats.idle_tasks if name not in waiting]
    if idle:
        text = f"standing tasks that do not run: {', '.join(idle)}"
        return _status("engine", WARN, text, values)
    text = f"waiting for an instruction: {', '.join(waiting)}" if waiting else ""
    return _status("engine", OK, text, values)


def camera_status(camera: Camera, stats: CameraStats | None) -> DiagnosticStatus:
    """Whether one camera's frames come, and what becomes of them."""
    faults, link = camera.faults, camera.link
    values: dict[str, object] = {
        "topic": link.topic,
        "publishers": link.publishers,
        "qos": link.profile,
        "bad_images": faults.bad_images,
        "last_bad_image": "" if faults.last_error is None else str(faults.last_error),
    }
    name = f"camera {camera.setting.name}"
    if stats is not None:
        values |= _figures(stats, {"stale"})
    problem = camera.missing()
    if problem is not None:
        return _status(name, ERROR, str(problem), values)
    if stats is not None and stats.stale:
        return _status(name, ERROR, f"no frame for {stats.silent_s:.1f} s", values)
    if faults.last_was_bad:
        return _status(name, ERROR, str(faults.last_error), values)
    return _status(name, OK, "" if stats is None else f"{stats.rate_hz:.1f} frames/s", values)


def _status(name: str, level: bytes, text: str, values: Mapping[str, object]) -> DiagnosticStatus:
    status = DiagnosticStatus(name=name, level=level, message=text or "OK")
    status.values = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
    return status


def _figures(stats: EngineStats | CameraStats, without: Collection[str]) -> dict[str, object]:
    """The fields by name; counts by reason or code have an entry each."""
    figures: dict[str, object] = {}
    for name in (field.name for field in dataclasses.fields(stats) if field.name not in without):
        value = getattr(stats, name)
        if isinstance(value, Mapping):
            figures |= {f"{name}_{key.lower()}": count for key, count in value.items()}
        else:
            figures[name] = value
    return figures


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)
