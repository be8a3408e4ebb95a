"""Which standing work runs next: every camera's due tasks, fair over cameras, in lock-step in
order.

Not thread-safe: the engine's lock guards it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Mapping

from librobot_vlm_ros.core import Frame
from librobot_vlm_ros.runtime.config import CameraConfig, DropReason, EngineConfig
from librobot_vlm_ros.runtime.mailbox import Mailbox
from librobot_vlm_ros.runtime.standing import RateGate, StandingTask, check_unique, unknown_camera


@dataclasses.dataclass(frozen=True)
class Work:
    """Standing tasks to run on one frame, as they were set at that moment."""

    camera: str
    frame: Frame
    tasks: tuple[StandingTask, ...]

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
        self.idle: tuple[tuple[str, str], ...] = ()
        self.unknown_frames = 0
        self.prepare_ns = 0  # what preparing a frame took last
        self._supported: frozenset[str] | None = None
        self._active: tuple[StandingTask, ...] = ()
        self._gates: dict[tuple[str, str, str], RateGate] = {}
        self._turn: dict[str, int] = {}  # camera -> number of its last turn; lowest goes first
        self._turns = 0
        self._in_order: deque[Work] = deque()

    # -- what there is to do ---------------------------------------------------------------

    def set_cameras(self, cameras: Iterable[CameraConfig]) -> None:
        """Declare the cameras; those that stay keep their frames and counts."""
        kept = self.mailboxes
        self.mailboxes = {
            camera.name: kept.get(camera.name) or self._mailbox(camera.name) for camera in cameras
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
        check_unique(wanted, self.mailboxes)
        self.tasks = wanted
        self._sort_out()

    def set_supported(self, supported: frozenset[str] | None) -> None:
        """Tasks of the model that is loaded now; None when there is none."""
        self._supported = supported
        self._sort_out()

    def reconfigure(self, config: EngineConfig) -> None:
        """Take over other limits."""
        self.config = config
        for mailbox in self.mailboxes.values():
            mailbox.resize(history_frames=config.history_frames, history_bytes=config.history_bytes)

    # -- frames come in --------------------------------------------------------------------

    def mailbox(self, camera: str) -> Mailbox:
        """Of that camera; "" means the only one. Raises `RequestError` UNKNOWN_CAMERA."""
        if not camera and len(self.mailboxes) == 1:
            return next(iter(self.mailboxes.values()))
        found = self.mailboxes.get(camera)
        if found is None:
            raise unknown_camera(camera, self.mailboxes)
        return found

    def offer(self, frame: Frame, now_ns: int) -> None:
        """A frame of a declared camera, while the engine runs."""
        mailbox = self.mailboxes[frame.camera]
        if not self.config.lock_step:
            mailbox.offer(frame, wanted=bool(self._due(mailbox, now_ns)))
            return
        mailbox.keep(frame)
        tasks = tuple(
            task
            for task in self._active
            if task.runs_on(frame.camera) and self._gate(frame.camera, task).passes(frame.stamp_ns)
        )
        if tasks:
            self._in_order.append(Work(frame.camera, frame, tasks))
        else:
            mailbox.drop(DropReason.NOT_DUE)

    @property
    def waiting(self) -> int:
        """Frames that wait in lock-step."""
        return len(self._in_order)

    @property
    def room(self) -> bool:
        """Whether lock-step takes another frame."""
        return not self.config.lock_step_queue or self.waiting < self.config.lock_step_queue

    def refuse(self, camera: str, reason: DropReason) -> None:
        """A frame that is not taken."""
        mailbox = self.mailboxes.get(camera)
        if mailbox is None:
            self.unknown_frames += 1
        else:
            mailbox.refuse(reason)

    # -- work goes out ---------------------------------------------------------------------

    def take(self, now_ns: int, frames: int = 1) -> list[Work]:
        """Work for one batch: the camera whose turn it is, and up to `frames` - 1 others whose due
        tasks are the same. Empty when nothing is due.
        """
        if self.config.lock_step:
            if not self._in_order:
                return []
            work = self._in_order.popleft()
            self.mailboxes[work.camera].processed += 1
            return [work]
        taken: list[Work] = []
        for work in self.ready(now_ns):
            if taken and work.names != taken[0].names:
                continue
            self._begin(work, now_ns)
            taken.append(work)
            if len(taken) >= frames:
                break
        return taken

    def ready(self, now_ns: int) -> list[Work]:
        """What could run now, the camera that waited longest for its turn first."""
        found = []
        for camera in sorted(self.mailboxes, key=lambda name: self._turn[name]):
            mailbox = self.mailboxes[camera]
            due = self._due(mailbox, now_ns)
            if due and not mailbox.expire(now_ns, self.config.max_frame_age_s):
                frame = mailbox.choice(now_ns, self.prepare_ns)
                assert frame is not None  # _due is empty without a frame
                found.append(Work(camera, frame, due))
        return found

    def coming(self, at_ns: int) -> list[Frame]:
        """The frames that `take` would give at that time if nothing else came, in order."""
        if self.config.lock_step:
            return [work.frame for work in self._in_order]
        return [
            mailbox.newest
            for mailbox in sorted(self.mailboxes.values(), key=lambda box: self._turn[box.camera])
            if mailbox.newest is not None and self._due(mailbox, at_ns)
        ]

    def anything(self, now_ns: int) -> bool:
        """Whether `take` would give work."""
        return bool(self._in_order) if self.config.lock_step else bool(self.ready(now_ns))

    def next_due_ns(self, now_ns: int) -> int | None:
        """When a frame that is here becomes due for a task (steady clock)."""
        if self.config.lock_step:
            return None
        times = [
            gate.next_ns
            for mailbox in self.mailboxes.values()
            if mailbox.newest is not None
            and not mailbox.expire(now_ns, self.config.max_frame_age_s)
            for task in self._active
            if task.runs_on(mailbox.camera)
            for gate in [self._gate(mailbox.camera, task)]
            if gate.next_ns is not None and gate.seen is not mailbox.newest
        ]
        return min(times, default=None)

    def hold(self) -> None:
        """The engine pauses: what waits is dropped, and the rates start anew afterwards."""
        for work in self._in_order:
            self.mailboxes[work.camera].drop(DropReason.NOT_ACTIVE)
        self._in_order.clear()
        for mailbox in self.mailboxes.values():
            mailbox.discard(DropReason.NOT_ACTIVE)
            if mailbox.newest is not None:
                # What arrived before the pause is not worked on after it.
                for task in self.tasks:
                    self._gate(mailbox.camera, task).seen = mailbox.newest

    def clear(self) -> None:
        """Forget all frames (the model goes away)."""
        self.hold()
        self._gates.clear()
        for mailbox in self.mailboxes.values():
            mailbox.clear()

    # -- inside ----------------------------------------------------------------------------

    def _mailbox(self, camera: str) -> Mailbox:
        return Mailbox(
            camera,
            history_frames=self.config.history_frames,
            history_bytes=self.config.history_bytes,
        )

    def _gate(self, camera: str, task: StandingTask) -> RateGate:
        key = (camera, task.name, task.camera)
        gate = self._gates.get(key)
        subject = (task.task, task.prompt, task.region, task.params, task.instruction_id)
        if gate is None:
            gate = self._gates[key] = RateGate(task.period_ns, subject)
        elif gate.subject != subject:  # a new instruction is acted on at once, not a period later
            gate.subject, gate.next_ns, gate.seen = subject, None, None
        if gate.period_ns != task.period_ns:
            gate.period_ns, gate.next_ns = task.period_ns, None
        return gate

    def _due(self, mailbox: Mailbox, now_ns: int) -> tuple[StandingTask, ...]:
        frame = mailbox.newest
        if frame is None:
            return ()
        return tuple(
            task
            for task in self._active
            if task.runs_on(mailbox.camera) and self._gate(mailbox.camera, task).due(frame, now_ns)
        )

    def _begin(self, work: Work, now_ns: int) -> None:
        self.mailboxes[work.camera].take(work.frame)
        for task in work.tasks:
            self._gate(work.camera, task).ran(work.frame, now_ns)
        self._turns += 1
        self._turn[work.camera] = self._turns

    def _sort_out(self) -> None:
        reasons = [(task, task.idle_reason(self._supported)) for task in self.tasks]
        self._active = tuple(task for task, reason in reasons if not reason)
        self.idle = tuple((task.name, reason) for task, reason in reasons if reason)
        named: Collection[tuple[str, str]] = {(task.name, task.camera) for task in self.tasks}
        self._gates = {key: gate for key, gate in self._gates.items() if key[1:] in named}


def drops(mailboxes: Mapping[str, Mailbox], unknown_frames: int) -> dict[str, int]:
    """All drops by reason, over all cameras; reasons that never happened are 0."""
    totals = {reason.value: 0 for reason in DropReason}
    for mailbox in mailboxes.values():
        for reason, count in mailbox.dropped.items():
            totals[reason.value] += count
    totals[DropReason.UNKNOWN_CAMERA.value] += unknown_frames
    return totals
