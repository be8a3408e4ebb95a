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
class WatchedCamera:
    """How long one camera has been silent."""

    timeout_ns: int
    """0 = it may be silent for ever."""
    heard_ns: int | None = None
    """Last sign of life; None before the first."""
    since_ns: int | None = None
    """The timeout counts from here; None while not watching."""
    stale: bool = False

    def silent_s(self, now_ns: int) -> float:
        """Seconds since its last frame, or since watching began; 0 when neither."""
        start_ns = self.heard_ns if self.heard_ns is not None else self.since_ns
        return max(0.0, to_s(now_ns - start_ns)) if start_ns is not None else 0.0

    @property
    def due_ns(self) -> int | None:
        """When it becomes stale if nothing comes; None = never as things stand."""
        if not self.timeout_ns or self.stale or self.since_ns is None:
            return None
        return self.since_ns + self.timeout_ns


class Watchdog:
    """Says which cameras became stale; told of every frame, good or bad."""

    def __init__(self) -> None:
        self.cameras: dict[str, WatchedCamera] = {}
        self._watching = False

    def set_cameras(self, cameras: Iterable[CameraConfig], now_ns: int) -> None:
        """Watch these; one that stays keeps its state, a new one's silence counts from now on."""
        kept = self.cameras
        self.cameras = {}
        for camera in cameras:
            new = WatchedCamera(0, since_ns=now_ns if self._watching else None)
            watched = kept.get(camera.name, new)
            watched.timeout_ns = to_ns(camera.timeout_s)
            watched.stale = watched.stale and watched.timeout_ns > 0
            self.cameras[camera.name] = watched

    def start(self, now_ns: int) -> None:
        """Begin to watch: each camera has its full timeout from now."""
        self._watching = True
        for watched in self.cameras.values():
            watched.since_ns, watched.stale = now_ns, False

    def pause(self) -> None:
        """Stop watching; nothing is stale meanwhile."""
        self._watching = False
        for watched in self.cameras.values():
            watched.since_ns, watched.stale = None, False

    def heard(self, camera: str, now_ns: int) -> CameraEvent | None:
        """A frame came; the event when the camera had been stale."""
        watched = self.cameras[camera]
        silent_s = watched.silent_s(now_ns)
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
        for name, watched in self.cameras.items():
            if watched.due_ns is not None and now_ns >= watched.due_ns:
                watched.stale = True
                events.append(CameraEvent(name, stale=True, silent_s=watched.silent_s(now_ns)))
        return events

    def next_ns(self) -> int | None:
        """When `check` could find something next; None = never as things stand."""
        times = [watched.due_ns for watched in self.cameras.values()]
        return min((time_ns for time_ns in times if time_ns is not None), default=None)
