"""Plays a bag into topics: the recorded bytes, unchanged, at the recorded times or in lock-step."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from librobot_vlm_ros.bags import BagMessage, BagReader, BagTopic
from librobot_vlm_ros.client.session import Session
from librobot_vlm_ros.core import BagError, EngineError, ErrorCode
from librobot_vlm_ros.replay.lock_step import NodeLink
from librobot_vlm_ros.replay.message_types import (
    IMAGE_TYPES,
    header_stamp_ns,
    import_message,
    qos_profile,
)

_CLOCK = "/clock"
_LEAST_WAIT_S = 0.002
_SETTLE_S = 0.6
_INSTRUCTION_S = 5.0
_ACKNOWLEDGED_NS = 2 * 10**9


@dataclass(frozen=True)
class PlayOptions:
    """How to play."""

    rate: float | None = 1.0
    """Times the recorded speed; None is as fast as possible."""
    topics: tuple[str, ...] = ()
    """Names in the bag; none means all."""
    remap: Mapping[str, str] = field(default_factory=dict)
    """Names in the bag to names to publish on."""
    start_s: float = 0.0
    """Seconds into the bag to begin at."""
    duration_s: float | None = None
    """Seconds of the bag to play; None is to its end."""
    loop: bool = False
    clock_hz: float = 0.0
    """Ticks a second of `/clock` with the bag's time; 0 is none."""
    discovery_s: float = 3.0
    """Longest wait for subscribers before the first message."""
    answer_timeout_s: float = 30.0
    """Lock-step: longest wait for the results of a frame."""
    strict: bool = False
    """Refuse a bag with a topic that cannot be played, instead of leaving it out."""


@dataclass
class PlayReport:
    """What was played."""

    published: Counter[str] = field(default_factory=Counter)
    """Messages by the name they were published on."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Topics that were left out, and why."""
    without_subscriber: list[str] = field(default_factory=list)
    frames: int = 0
    """Images sent to cameras of the node (lock-step)."""
    unanswered: list[int] = field(default_factory=list)
    """Stamps of the frames whose results did not come in time (lock-step)."""
    wall_s: float = 0.0
    late_s: float = 0.0
    """Most that a message was behind its time."""


class Player:
    """Publishes the messages of an open bag. `link` given, it plays in lock-step with that node."""

    def __init__(
        self,
        session: Session,
        reader: BagReader,
        options: PlayOptions,
        *,
        link: NodeLink | None = None,
    ) -> None:
        self.report = PlayReport()
        self.on_publish: Callable[[BagMessage, float], None] = lambda message, sent_s: None
        """Told of each message and when it was sent, on `time.monotonic()`."""
        self._session = session
        self._reader = reader
        self._options = options
        self._link = link
        self._publishers: dict[str, Any] = {}
        """By name in the bag."""
        self._clock: _Clock | None = None
        self._due_s = 0.0
        self._last_ns: int | None = None
        """The message before, in this round."""

    @property
    def total(self) -> int:
        """Messages of one round, without a cut by `start_s` and `duration_s`."""
        return sum(topic.count for topic in self._reader.topics if topic.name in self._publishers)

    def open(self) -> None:
        """Make a publisher for each topic that can be played, and wait for subscribers. What is
        left out stands in `report`.

        Raises `BagError` TOPIC_NOT_IN_BAG for a topic that is asked for and not there, WRONG_TYPE
        when nothing of it (strict: not all of it) can be played; in lock-step `EngineError`
        TOPIC_MISSING or NOT_ACTIVE when the node does not listen.
        """
        self._make_publishers()
        self._leave_out_other_definitions()
        self._wait_for_subscribers()
        if self._options.clock_hz:
            self._clock = _Clock(self._session, self._options.clock_hz)

    def play(self) -> PlayReport:
        """Play until the end, for ever with `loop`; what was played."""
        began_s = time.monotonic()
        try:
            self._play_once()
            while self._options.loop:
                self._play_once()
        finally:
            self.report.wall_s = time.monotonic() - began_s
        if self._link is None:  # in lock-step all that matters has been answered
            from rclpy.duration import Duration

            for publisher in self._publishers.values():
                # Best effort, or a middleware without it: there is nothing to wait for.
                with contextlib.suppress(AttributeError, RuntimeError):
                    publisher.wait_for_all_acked(Duration(nanoseconds=_ACKNOWLEDGED_NS))
        return self.report

    def _name(self, topic: str) -> str:
        """What a topic of the bag is published as."""
        return self._options.remap.get(topic, topic)

    # -- the publishers

    def _make_publishers(self) -> None:
        options, skipped = self._options, self.report.skipped
        for name in (*options.topics, *options.remap):
            self._reader.require_topic(name)
        for topic in self._reader.topics:
            if options.topics and topic.name not in options.topics:
                continue
            if options.clock_hz and self._name(topic.name) == _CLOCK:
                skipped[topic.name] = "--clock publishes the bag's time itself"
                continue
            try:
                self._publishers[topic.name] = self._publisher(topic)
            except BagError as error:
                if options.strict or topic.name in options.topics:
                    raise
                skipped[topic.name] = error.message
        if not self._publishers:
            reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"nothing in {self._reader.path} can be played: {reasons or 'it has no topics'}",
            )

    def _publisher(self, topic: BagTopic) -> Any:
        kind = import_message(topic.type)
        profile = qos_profile(topic.qos, reliable=self._link is not None)
        try:
            return self._session.node.create_publisher(kind, self._name(topic.name), profile)
        except Exception as error:  # no type support, or no valid name
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"{topic.name} ({topic.type}) cannot be published as {self._name(topic.name)}: "
                f"{error}",
            ) from error

    def _leave_out_other_definitions(self) -> None:
        """Leave out topics whose type is defined differently here than when it was recorded: their
        bytes would be read as something else.
        """
        for name in list(self._publishers):
            type_name = self._reader.require_topic(name).type
            recorded = self._reader.type_hash(name)
            here = self._installed_hash(self._name(name), type_name)
            if not recorded or not here or recorded == here:
                continue
            reason = f"{type_name} was recorded with another definition than the one here"
            if self._options.strict or name in self._options.topics:
                raise BagError(ErrorCode.WRONG_TYPE, f"topic {name}: {reason}")
            self._session.node.destroy_publisher(self._publishers.pop(name))
            self.report.skipped[name] = reason

    def _installed_hash(self, topic: str, type_name: str) -> str:
        """`RIHS01_...` of the type as it is installed; "" where this ROS does not tell."""
        node = self._session.node
        for _ in range(50):
            for info in node.get_publishers_info_by_topic(topic):
                if info.node_name == node.get_name() and info.topic_type == type_name:
                    return str(getattr(info, "topic_type_hash", ""))
            self._session.spin_for(0.01)
        return ""

    def _wait_for_subscribers(self) -> None:
        until_s = time.monotonic() + self._options.discovery_s
        published = {self._name(name): one for name, one in self._publishers.items()}
        link, wanted = self._link, published
        if link is not None:  # only what the node listens to can matter to it
            wanted = {
                name: publisher
                for name, publisher in published.items()
                if name in link.cameras or name.startswith(f"{link.name}/")
            }
            if not any(name in link.cameras for name in wanted):
                images = [t.name for t in self._reader.topics if t.type in IMAGE_TYPES]
                raise EngineError(
                    ErrorCode.TOPIC_MISSING,
                    f"{link.name} listens to {', '.join(link.cameras)}, and no topic of the bag is "
                    "played there",
                    f"Image topics of the bag: {', '.join(images) or 'none'}. Use --remap.",
                )
        self._session.spin_until(
            lambda: not _silent(wanted) and (link is None or link.publishes_here()), until_s
        )
        self.report.without_subscriber = _silent(published)
        if link is not None and _silent(wanted):
            raise EngineError(
                ErrorCode.NOT_ACTIVE,
                f"{link.name} does not listen to {', '.join(_silent(wanted))} after "
                f"{self._options.discovery_s:g} s",
                f"Is it active? ros2 lifecycle get {link.name}",
            )
        # Both sides must know each other; a publisher only sees that it knows the subscriber.
        self._session.spin_for(_SETTLE_S)

    # -- one round

    def _play_once(self) -> None:
        options = self._options
        begin_ns = self._reader.start_ns + round(options.start_s * 1e9)
        end_ns = None
        if options.duration_s is not None:
            end_ns = begin_ns + round(options.duration_s * 1e9)
        self._last_ns = None
        for message in self._reader.messages(self._publishers, begin_ns, end_ns):
            self._wait_for_turn(message.stamp_ns)
            self._publish(message)
        if self._last_ns is None:
            raise BagError(
                ErrorCode.BAG_UNREADABLE,
                f"{self._reader.path} holds no message of the topics and the time asked for",
            )

    def _wait_for_turn(self, stamp_ns: int) -> None:
        rate = self._options.rate
        if self._last_ns is None:
            self._due_s, self._last_ns = time.monotonic(), stamp_ns
        if rate is None:
            self._session.spin_for(0.0)
        else:
            self._due_s += (stamp_ns - self._last_ns) / 1e9 / rate
            now_s = time.monotonic()
            late_s = now_s - self._due_s
            self.report.late_s = max(self.report.late_s, late_s)
            if self._link is not None and late_s > 0:
                self._due_s = now_s  # the node sets the pace: no burst to catch up
            elif -late_s > _LEAST_WAIT_S:
                self._pass_time(stamp_ns, rate)
        self._last_ns = stamp_ns
        if self._clock is not None:
            self._clock.publish(stamp_ns)

    def _pass_time(self, stamp_ns: int, rate: float) -> None:
        """Let callbacks run until the next message is due, with the clock ticking."""
        clock = self._clock
        while time.monotonic() < self._due_s:
            until_s = self._due_s if clock is None else min(self._due_s, clock.next_s)
            self._session.spin_until(lambda: False, until_s)
            if clock is not None and time.monotonic() >= clock.next_s:
                ahead_ns = round((self._due_s - time.monotonic()) * rate * 1e9)
                clock.publish(stamp_ns - max(0, ahead_ns))

    def _publish(self, message: BagMessage) -> None:
        name, link = self._name(message.topic), self._link
        is_frame = link is not None and message.type in IMAGE_TYPES and name in link.cameras
        stamp_ns = header_stamp_ns(message.data) if is_frame else 0
        if link is not None and is_frame:
            link.forget_answers(name, stamp_ns)
        sent_s = time.monotonic()
        self._publishers[message.topic].publish(message.data)
        self.report.published[name] += 1
        self.on_publish(message, sent_s)
        if link is None:
            return
        if is_frame:
            self.report.frames += 1
            if not link.wait_for_answers(name, stamp_ns, self._options.answer_timeout_s):
                self.report.unanswered.append(stamp_ns)
        elif name == f"{link.name}/instruction":
            text = self._reader.deserialize(message).data
            if not link.wait_for_instruction(text, _INSTRUCTION_S):
                raise EngineError(
                    ErrorCode.DEADLINE_EXCEEDED,
                    f"{link.name} did not take the instruction {text!r} within "
                    f"{_INSTRUCTION_S:g} s",
                    "Its log says why.",
                )


class _Clock:
    """Publishes the bag's time on `/clock`."""

    def __init__(self, session: Session, rate_hz: float) -> None:
        from rclpy.qos import QoSProfile
        from rosgraph_msgs.msg import Clock

        self._period_s = 1.0 / rate_hz
        self._kind = Clock
        self._publisher = session.node.create_publisher(Clock, _CLOCK, QoSProfile(depth=10))
        self.next_s = 0.0

    def publish(self, bag_ns: int) -> None:
        """Tick."""
        message = self._kind()
        message.clock.sec, message.clock.nanosec = divmod(bag_ns, 10**9)
        self._publisher.publish(message)
        self.next_s = time.monotonic() + self._period_s


def _silent(publishers: Mapping[str, Any]) -> list[str]:
    """Topics that nobody listens to."""
    return [name for name, one in publishers.items() if not one.get_subscription_count()]
