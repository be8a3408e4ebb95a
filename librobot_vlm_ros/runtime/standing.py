"""Standing tasks: what is asked of every frame, how often, and which of them can run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable

from librobot_vlm_ros.core import (
    Box,
    ErrorCode,
    GenerationParams,
    RequestError,
    get_task,
)
from librobot_vlm_ros.runtime.config import to_ns

# A frame that comes this fraction of a period early still counts as on time when rates are counted
# on stamps: cameras jitter, and a 10 Hz task on a 10 Hz camera must not lose every other frame.
STAMP_SLACK = 0.1


@dataclasses.dataclass(frozen=True)
class StandingTask:
    """A task run on frames as they come.

    `task` may be an alias and holds the common name afterwards. Raises `RequestError` UNKNOWN_TASK
    and BAD_PARAMETER. A task that needs a text or region it does not have is legal and stays idle
    (an instruction may still come).
    """

    task: str
    prompt: str = ""
    rate_hz: float = 0.0
    """At most so often on each camera [1/s]; 0 = every frame that the model has time for."""
    camera: str = ""
    """Name of one camera; "" = each of them."""
    params: GenerationParams = dataclasses.field(default_factory=GenerationParams)
    region: Box | None = None
    """(x_min, y_min, x_max, y_max) in source pixels, for tasks that need one."""
    instruction_id: int = 0
    name: str = ""
    """Distinguishes two tasks of the same kind; defaults to the task's name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", get_task(self.task).name)
        if not self.name:
            object.__setattr__(self, "name", self.task)
        if not math.isfinite(self.rate_hz) or not 0.0 <= self.rate_hz <= 1000.0:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"rate of standing task {self.name!r} is {self.rate_hz} Hz, expected 0 to 1000",
                "Use 0 for every frame.",
            )

    @property
    def period_ns(self) -> int:
        """Least time between two runs on one camera [ns]; 0 = every frame."""
        return to_ns(1.0 / self.rate_hz) if self.rate_hz > 0 else 0

    def runs_on(self, camera: str) -> bool:
        """Whether this task looks at that camera."""
        return not self.camera or self.camera == camera

    def idle_reason(self, supported: Collection[str] | None) -> str:
        """Why it cannot run, "" when it can. `supported`: the model's tasks, None = not known."""
        spec = get_task(self.task)
        if spec.needs_text and not self.prompt.strip():
            return "needs a prompt or an instruction and has none"
        if spec.needs_region and self.region is None:
            return "needs a region and has none"
        if supported is not None and self.task not in supported:
            return f"the model cannot do it; it can do: {', '.join(sorted(supported))}"
        return ""


@dataclasses.dataclass
class RateGate:
    """When one task may run next on one camera; a grid, so that jitter does not add up."""

    period_ns: int
    subject: object = None
    """What the task asks, to notice that it changed."""
    next_ns: int | None = None
    seen: object = None
    """The frame it ran on last: a task never runs twice on one."""

    def due(self, frame: object, now_ns: int) -> bool:
        """May it run on this frame now? (steady clock)"""
        return frame is not self.seen and (self.next_ns is None or now_ns >= self.next_ns)

    def ran(self, frame: object, now_ns: int) -> None:
        """It runs now. After a gap the grid starts anew: no burst to catch up."""
        self.seen = frame
        if self.next_ns is None or now_ns - self.next_ns > self.period_ns:
            self.next_ns = now_ns + self.period_ns
        else:
            self.next_ns += self.period_ns

    def passes(self, stamp_ns: int) -> bool:
        """The same on frame stamps, for lock-step; stamps that jump back start the grid anew."""
        slack = int(self.period_ns * STAMP_SLACK)
        due_ns = self.next_ns
        if due_ns is None or stamp_ns < due_ns - 2 * self.period_ns:
            self.next_ns = stamp_ns + self.period_ns
            return True
        if stamp_ns < due_ns - slack:
            return False
        behind = stamp_ns - due_ns > self.period_ns
        self.next_ns = (stamp_ns if behind else due_ns) + self.period_ns
        return True


def check_unique(tasks: Iterable[StandingTask], cameras: Collection[str]) -> None:
    """Raises `RequestError`: BAD_PARAMETER for two of one name, UNKNOWN_CAMERA."""
    taken: set[tuple[str, str]] = set()
    for task in tasks:
        if task.camera and task.camera not in cameras:
            raise unknown_camera(task.camera, cameras)
        key = (task.name, task.camera)
        if key in taken:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"two standing tasks are called {task.name!r}",
                "Give each a name of its own.",
            )
        taken.add(key)


def unknown_camera(camera: str, cameras: Collection[str]) -> RequestError:
    """The error for a camera that was not declared."""
    known = ", ".join(sorted(cameras)) or "none"
    return RequestError(
        ErrorCode.UNKNOWN_CAMERA,
        f"no camera is called {camera!r}; declared are: {known}",
        "Use one of those, or add it to the parameter `cameras`.",
    )
