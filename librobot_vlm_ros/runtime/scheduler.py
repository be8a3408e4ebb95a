"""Standing tasks, and which of them runs next on which camera's frame.

A camera's due tasks run together on its newest frame, cameras take turns; in lock-step every frame
runs in order. Not thread-safe: the engine's lock guards it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Collection, Iterable

from librobot_vlm_ros.core import (
    ErrorCode,
    Frame,
    GenerationParams,
    RequestError,
    bad_parameter,
    get_task,
)
from librobot_vlm_ros.runtime.config import CameraConfig, DropReason, EngineConfig, to_ns
from librobot_vlm_ros.runtime.mailbox import Mailbox

# A frame that comes this fraction of a period early still counts as on time when rates are counted
# on stamps: cameras jitter, and a 10 Hz task on a 10 Hz camera must not lose every other frame.
STAMP_SLACK = 0.1


@dataclasses.dataclass(frozen=True)
class StandingTask:
    """A task run on frames as they come.

    `task` may be an alias and holds the common name afterwards. Raises `RequestError` UNKNOWN_TASK
    and BAD_PARAMETER. A task that needs a text it does not have is legal and stays idle (an
    instruction may still come), and so is one that needs a region.
    """

    task: str
    prompt: str = ""
    rate_hz: float = 0.0
    """At most so often on each camera [1/s]; 0 = every frame that the model has time for."""
    camera: str = ""
    """Name of one camera; "" = each of them."""
    params: GenerationParams = dataclasses.field(default_factory=GenerationParams)
    instruction_id: int = 0
    name: str = ""
    """Distinguishes two tasks of the same kind; defaults to the task's name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", get_task(self.task).name)
        if not self.name:
            object.__setattr__(self, "name", self.task)
        if not math.isfinite(self.rate_hz) or not 0.0 <= self.rate_hz <= 1000.0:
            raise bad_parameter(
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
        if spec.needs_region:
            return "needs a region and has none"
        if supported is not None and self.task not in supported:
            return f"the model cannot do it; it can do: {', '.join(sorted(supported))}"
        return ""


@dataclasses.dataclass
class RateGate:
    """When one task may run next on one camera; a grid, so that jitter does not add up."""

    period_ns: int
    asked: object = None
    """What the task asks, to notice that it changed."""
    next_ns: int | None = None
    last_frame: object = None
    """The frame it ran on last: a task never runs twice on one."""

    def due(self, frame: object, now_ns: int) -> bool:
        """May it run on this frame now? (steady clock)"""
        return frame is not self.last_frame and (self.next_ns is None or now_ns >= self.next_ns)

    def ran(self, frame: object, now_ns: int) -> None:
        """It runs now. After a gap the grid starts anew: no burst to catch up."""
        self.last_frame = frame
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


@dataclasses.dataclass(frozen=True)
class Work:
    """Standing tasks to run on one frame, as they were set at that moment."""

    frame: Frame
    tasks: tuple[StandingTask, ...]

    @property
    def camera(self) -> str:
        """Name of the frame's camera."""
        return self.frame.camera

    @property
    def names(self) -> tuple[str, ...]:
        """Common names of the tasks: frames with the same ones can share a batch."""
        return tuple(task.task for task in self.tasks)


class Scheduler:
    """Cameras, their mailboxes and the standing tasks."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.mailboxes: dict[str, Mailbox] = {}
        self.tasks: tuple[StandingTask, ...] = ()
        self.idle: tuple[tuple[str, str], ...] = ()  # names of tasks that cannot run, and why
        self.unknown_frames = 0
        self.prepare_ns = 0  # what preparing a frame took last
        self._supported: frozenset[str] | None = None
        self._active: tuple[StandingTask, ...] = ()
        self._gates: dict[tuple[str, str, str], RateGate] = {}
        self._turn: dict[str, int] = {}  # camera -> number of its last turn; lowest goes first
        self._turns = 0
        self._in_order: deque[Work] = deque()  # what waits in lock-step

    # -- what there is to do ---------------------------------------------------------------

    def set_cameras(self, cameras: Iterable[CameraConfig]) -> None:
        """Declare the cameras; those that stay keep their frames and counts."""
        kept = self.mailboxes
        self.mailboxes = {
            camera.name: kept.get(camera.name) or Mailbox(camera.name, self.config.history_frames)
            for camera in cameras
        }
        self._turn = {name: self._turn.get(name, 0) for name in self.mailboxes}
        self._gates = {key: gate for key, gate in self._gates.items() if key[0] in self.mailboxes}
        self._in_order = deque(work for work in self._in_order if work.camera in self.mailboxes)

    def set_tasks(self, tasks: Iterable[StandingTask]) -> None:
        """Replace the standing tasks; one that stays (name, camera, rate) keeps its rhythm.

        Raises `RequestError`: UNKNOWN_CAMERA, BAD_PARAMETER for two of one name; nothing changes
        then.
        """
        wanted = tuple(tasks)
        taken: set[tuple[str, str]] = set()
        for task in wanted:
            if task.camera:
                self.mailbox(task.camera)
            if (task.name, task.camera) in taken:
                raise bad_parameter(
                    f"two standing tasks are called {task.name!r}", "Give each a name of its own."
                )
            taken.add((task.name, task.camera))
        self.tasks = wanted
        self._gates = {key: gate for key, gate in self._gates.items() if key[1:] in taken}
        self._tell_idle_from_active()

    def set_supported(self, supported: frozenset[str] | None) -> None:
        """Tasks of the model that is loaded now; None when there is none."""
        self._supported = supported
        self._tell_idle_from_active()

    def mailbox(self, camera: str) -> Mailbox:
        """Of that camera. Raises `RequestError` UNKNOWN_CAMERA."""
        found = self.mailboxes.get(camera)
        if found is None:
            known = ", ".join(sorted(self.mailboxes)) or "none"
            raise RequestError(
                ErrorCode.UNKNOWN_CAMERA,
                f"no camera is called {camera!r}; declared are: {known}",
                "Use one of those, or add it to the parameter `cameras`.",
            )
        return found

    # -- frames come in --------------------------------------------------------------------

    def offer(self, frame: Frame, now_ns: int) -> None:
        """A frame of a declared camera, while the engine runs."""
        mailbox = self.mailboxes[frame.camera]
        if not self.config.lock_step:
            mailbox.offer(frame, wanted=bool(self._due_tasks(mailbox, now_ns)))
            return
        mailbox.record(frame)
        gates = self._gates_of(frame.camera)
        tasks = tuple(task for task, gate in gates if gate.passes(frame.stamp_ns))
        if tasks:
            self._in_order.append(Work(frame, tasks))
        else:
            mailbox.dropped[DropReason.NOT_DUE] += 1

    def refuse(self, camera: str, reason: DropReason) -> None:
        """A frame that is not accepted."""
        mailbox = self.mailboxes.get(camera)
        if mailbox is None:
            self.unknown_frames += 1
        else:
            mailbox.refuse(reason)

    # -- work goes out ---------------------------------------------------------------------

    def next_work(self, now_ns: int, frames: int = 1) -> list[Work]:
        """Work for one batch, which counts as begun: the camera whose turn it is, and up to
        `frames` - 1 others whose due tasks are the same. Empty when nothing is due.
        """
        if self.config.lock_step:
            if not self._in_order:
                return []
            work = self._in_order.popleft()
            self.mailboxes[work.camera].processed += 1
            return [work]
        begun: list[Work] = []
        for work in self.due_work(now_ns):
            if begun and work.names != begun[0].names:
                continue
            self.mailboxes[work.camera].use(work.frame)
            for task in work.tasks:
                self._gate(work.camera, task).ran(work.frame, now_ns)
            self._turns += 1
            self._turn[work.camera] = self._turns
            begun.append(work)
            if len(begun) >= frames:
                break
        return begun

    def due_work(self, now_ns: int) -> list[Work]:
        """What could run now, the camera that waited longest for its turn first."""
        found = []
        for mailbox in self._by_turn():
            due = self._due_tasks(mailbox, now_ns)
            if due and not mailbox.expire(now_ns, self.config.max_frame_age_s):
                frame = mailbox.best(now_ns, self.prepare_ns)
                assert frame is not None  # nothing is due without a frame
                found.append(Work(frame, due))
        return found

    def upcoming_frames(self, at_ns: int) -> list[Frame]:
        """The frames that `next_work` would give at that time if nothing else came, in order."""
        if self.config.lock_step:
            return [work.frame for work in self._in_order]
        return [
            mailbox.newest
            for mailbox in self._by_turn()
            if mailbox.newest is not None and self._due_tasks(mailbox, at_ns)
        ]

    def has_work(self, now_ns: int) -> bool:
        """Whether `next_work` would give any."""
        return bool(self._in_order) if self.config.lock_step else bool(self.due_work(now_ns))

    def next_due_ns(self, now_ns: int) -> int | None:
        """When a frame that is here becomes due for a task (steady clock)."""
        if self.config.lock_step:
            return None
        times = []
        for mailbox in self.mailboxes.values():
            if mailbox.newest is None or mailbox.expire(now_ns, self.config.max_frame_age_s):
                continue
            for _, gate in self._gates_of(mailbox.camera):
                if gate.next_ns is not None and gate.last_frame is not mailbox.newest:
                    times.append(gate.next_ns)
        return min(times, default=None)

    def pause(self) -> None:
        """What waits is dropped; frames from before the pause are not worked on after it."""
        for work in self._in_order:
            self.mailboxes[work.camera].dropped[DropReason.NOT_ACTIVE] += 1
        self._in_order.clear()
        for mailbox in self.mailboxes.values():
            mailbox.discard(DropReason.NOT_ACTIVE)
            if mailbox.newest is not None:
                for task in self.tasks:
                    self._gate(mailbox.camera, task).last_frame = mailbox.newest

    def drops(self) -> dict[str, int]:
        """All drops by reason, over all cameras; reasons that never happened are 0."""
        totals = {reason.value: 0 for reason in DropReason}
        for mailbox in self.mailboxes.values():
            for reason, count in mailbox.dropped.items():
                totals[reason.value] += count
        totals[DropReason.UNKNOWN_CAMERA.value] += self.unknown_frames
        return totals

    # -- inside ----------------------------------------------------------------------------

    def _by_turn(self) -> list[Mailbox]:
        return sorted(self.mailboxes.values(), key=lambda mailbox: self._turn[mailbox.camera])

    def _gates_of(self, camera: str) -> list[tuple[StandingTask, RateGate]]:
        """The tasks that can run on a camera."""
        return [(task, self._gate(camera, task)) for task in self._active if task.runs_on(camera)]

    def _gate(self, camera: str, task: StandingTask) -> RateGate:
        key = (camera, task.name, task.camera)
        asked = (task.task, task.prompt, task.params, task.instruction_id)
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = RateGate(task.period_ns, asked)
        elif gate.asked != asked:  # a new instruction is acted on at once, not a period later
            gate.asked, gate.next_ns, gate.last_frame = asked, None, None
        if gate.period_ns != task.period_ns:
            gate.period_ns, gate.next_ns = task.period_ns, None
        return gate

    def _due_tasks(self, mailbox: Mailbox, now_ns: int) -> tuple[StandingTask, ...]:
        frame = mailbox.newest
        if frame is None:
            return ()
        gates = self._gates_of(mailbox.camera)
        return tuple(task for task, gate in gates if gate.due(frame, now_ns))

    def _tell_idle_from_active(self) -> None:
        reasons = [(task, task.idle_reason(self._supported)) for task in self.tasks]
        self._active = tuple(task for task, reason in reasons if not reason)
        self.idle = tuple((task.name, reason) for task, reason in reasons if reason)
