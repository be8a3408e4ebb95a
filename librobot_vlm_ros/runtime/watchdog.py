"""Notices cameras that fall silent, on the steady clock, whatever the stamps say.

Not thread-safe: the engine's lock guards it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from librobot_vlm_ros.runtime.config import CameraConfig, to_ns, to_s


@dataclasses.dataclass(frozen=True)
class CameraEvent:
    """A camera fell silent (`stale`) or came back. silent_s: how long nothing had come [s]."""

    camera: str
    stale: bool
    silent_s: float


@dataclasses.dataclass
class _Watched:
    timeout_ns: int
    heard_ns: int | None = None
    """Last sign of life; None before the first."""
    since_ns: int | None = None
    """Silence is counted from here; None while not watching."""
    stale: bool = False


class Watchdog:
    """Says which cameras became stale; told of every frame, good or bad."""

    def __init__(self) -> None:
        self._cameras: dict[str, _Watched] = {}
        self._watching = False

    def set_cameras(self, cameras: Iterable[CameraConfig], now_ns: int) -> None:
        """Watch these; one that stays keeps its state, a new one's silence counts from now on."""
        kept = self._cameras
        self._cameras = {}
        for camera in cameras:
            watched = kept.get(camera.name) or _Watched(
                0, since_ns=now_ns if self._watching else None
            )
            watched.timeout_ns = to_ns(camera.timeout_s)
            if not watched.timeout_ns:
                watched.stale = False
            self._cameras[camera.name] = watched

    def start(self, now_ns: int) -> None:
        """Begin to watch: each camera has its full timeout from now."""
        self._watching = True
        for watched in self._cameras.values():
            watched.since_ns = now_ns
            watched.stale = False

    def pause(self) -> None:
        """Stop watching; nothing is stale meanwhile."""
        self._watching = False
        for watched in self._cameras.values():
            watched.since_ns = None
            watched.stale = False

    def heard(self, camera: str, now_ns: int) -> CameraEvent | None:
        """A frame came; the event when the camera had been stale."""
        watched = self._cameras.get(camera)
        if watched is None:
            return None
        silent_s = self._silent_s(watched, now_ns)
        watched.heard_ns = now_ns
        if watched.since_ns is not None:
            watched.since_ns = now_ns
        if not watched.stale:
            return None
        watched.stale = False
        return CameraEvent(camera, stale=False, silent_s=silent_s)

    def check(self, now_ns: int) -> list[CameraEvent]:
        """Cameras that became stale since the last check; each is told once."""
        events = []
        for name, watched in self._cameras.items():
            due_ns = self._due_ns(watched)
            if due_ns is not None and now_ns >= due_ns:
                watched.stale = True
                silent_s = self._silent_s(watched, now_ns)
                events.append(CameraEvent(name, stale=True, silent_s=silent_s))
        return events

    def next_ns(self) -> int | None:
        """When `check` could find something next; None = never as things stand."""
        times = [self._due_ns(watched) for watched in self._cameras.values()]
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    def is_stale(self, camera: str) -> bool:
        """Whether it is silent beyond its timeout."""
        return self._cameras[camera].stale

    def silent_s(self, camera: str, now_ns: int) -> float:
        """Seconds since its last frame, or since watching began; 0 when neither."""
        return self._silent_s(self._cameras[camera], now_ns)

    def _silent_s(self, watched: _Watched, now_ns: int) -> float:
        start_ns = watched.heard_ns if watched.heard_ns is not None else watched.since_ns
        return max(0.0, to_s(now_ns - start_ns)) if start_ns is not None else 0.0

    def _due_ns(self, watched: _Watched) -> int | None:
        if not watched.timeout_ns or watched.stale or watched.since_ns is None:
            return None
        return watched.since_ns + watched.timeout_ns
