"""Plays a bag into topics: the recorded bytes, unchanged, at the recorded times or in lock-step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from librobot_vlm_ros.bags import BagMessage, BagReader
from librobot_vlm_ros.client.session import Session
from librobot_vlm_ros.core import BagError, EngineError, ErrorCode
from librobot_vlm_ros.replay.lock_step import NodeLink
from librobot_vlm_ros.replay.message_types import IMAGE_TYPES, header_stamp_ns
from librobot_vlm_ros.replay.publishers import CLOCK, PlayOptions, PlayReport, open_publishers

__all__ = ["Player"]

_LEAST_WAIT_S = 0.002


class Player:
    """Publishes the messages of an open bag. `link` given, it plays in lock-step with that node."""

    def __init__(
        self,
        session: Session,
        reader: BagReader,
        options: PlayOptions,
        *,
        link: NodeLink | None = None,
        on_publish: Callable[[BagMessage, float], None] | None = None,
    ) -> None:
        self.report = PlayReport()
        self._session = session
        self._reader = reader
        self._options = options
        self._link = link
        self.on_publish = on_publish
        self._publishers: dict[str, Any] = {}
        self._clock: _Clock | None = None
        self._due_s = 0.0
        self._last_ns = 0

    @property
    def total(self) -> int:
        """Messages of one round, without a cut by `start_s` and `duration_s`."""
        return sum(topic.count for topic in self._reader.topics if topic.name in self._publishers)

    def open(self) -> None:
        """Make the publishers and wait for subscribers; raises what `open_publishers` raises."""
        self._publishers = open_publishers(
            self._session, self._reader, self._options, self.report, self._link
        )
        if self._options.clock_hz:
            self._clock = _Clock(self._session, self._options.clock_hz)

    def play(self) -> PlayReport:
        """Play until the end, for ever with `loop`; what was played."""
        began_s = time.monotonic()
        try:
            while True:
                self._play_once()
                self.report.rounds += 1
                if not self._options.loop:
                    break
        finally:
            self.report.wall_s = time.monotonic() - began_s
        if self._link is None:  # in lock-step all that matters has been answered
            for publisher in self._publishers.values():
                _acknowledged(publisher, 2.0)
        return self.report

    def close(self) -> None:
        """Take the publishers away; needed only where the session goes on."""
        for publisher in self._publishers.values():
            self._session.node.destroy_publisher(publisher)
        self._publishers = {}

    # -- one round ---------------------------------------------------------------------------------

    def _play_once(self) -> None:
        first = True
        for message in self._messages():
            if first:
                self._due_s, self._last_ns, first = time.monotonic(), message.stamp_ns, False
            self._wait_for_turn(message.stamp_ns)
            self._publish(message)
        if first:
            raise BagError(
                ErrorCode.BAG_UNREADABLE,
                f"{self._reader.path} holds no message of the topics and the time asked for",
            )

    def _messages(self) -> Iterator[BagMessage]:
        options = self._options
        begin_ns = self._reader.start_ns + round(options.start_s * 1e9)
        end_ns = None
        if options.duration_s is not None:
            end_ns = begin_ns + round(options.duration_s * 1e9)
        return self._reader.messages(self._publishers, begin_ns, end_ns)

    def _wait_for_turn(self, stamp_ns: int) -> None:
        rate = self._options.rate
        if rate is None:
            self._session.spin_until(lambda: True, 0.0)
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
        while True:
            left_s = self._due_s - time.monotonic()
            if left_s <= 0:
                return
            until_s = self._due_s
            if self._clock is not None:
                until_s = min(until_s, self._clock.next_s)
            self._session.spin_until(lambda: False, until_s)
            if self._clock is not None and time.monotonic() >= self._clock.next_s:
                ahead_ns = round((self._due_s - time.monotonic()) * rate * 1e9)
                self._clock.publish(stamp_ns - max(0, ahead_ns))

    def _name(self, topic: str) -> str:
        return self._options.remap.get(topic, topic)

    def _publish(self, message: BagMessage) -> None:
        name = self._name(message.topic)
        link = self._link
        is_frame = link is not None and message.type in IMAGE_TYPES and name in link.cameras
        stamp_ns = header_stamp_ns(message.data) if is_frame else 0
        if link is not None and is_frame:
            link.sending(name, stamp_ns)
        sent_s = time.monotonic()
        self._publishers[message.topic].publish(message.data)
        self.report.published[name] += 1
        if self.on_publish is not None:
            self.on_publish(message, sent_s)
        if link is None:
            return
        if is_frame:
            self.report.frames += 1
            if not link.wait_for_answers(name, stamp_ns, self._options.answer_timeout_s):
                self.report.unanswered.append(stamp_ns)
        elif name == f"{link.name}/instruction":
            self._wait_for_instruction(message)

    def _wait_for_instruction(self, message: BagMessage) -> None:
        assert self._link is not None
        text = self._reader.deserialize(message).data
        if not self._link.wait_for_instruction(text, 5.0):
            raise EngineError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"{self._link.name} did not take the instruction {text!r} within 5 s",
                "Its log says why.",
            )


class _Clock:
    """Publishes the bag's time on `/clock`."""

    def __init__(self, session: Session, rate_hz: float) -> None:
        from rclpy.qos import QoSProfile
        from rosgraph_msgs.msg import Clock

        self._period_s = 1.0 / rate_hz
        self._kind = Clock
        self._publisher = session.node.create_publisher(Clock, CLOCK, QoSProfile(depth=10))
        self.next_s = 0.0

    def publish(self, bag_ns: int) -> None:
        """Tick."""
        message = self._kind()
        message.clock.sec, message.clock.nanosec = divmod(bag_ns, 10**9)
        self._publisher.publish(message)
        self.next_s = time.monotonic() + self._period_s


def _acknowledged(publisher: Any, timeout_s: float) -> None:
    """Give reliable subscribers the time to take what is on its way."""
    from rclpy.duration import Duration

    try:
        publisher.wait_for_all_acked(Duration(nanoseconds=round(timeout_s * 1e9)))
    except (AttributeError, RuntimeError):  # best effort, or a middleware without it
        return
