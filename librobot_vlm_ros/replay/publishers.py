"""The publishers of a replay: one a topic, with the quality of service that was recorded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from librobot_vlm_ros.bags import BagReader, BagTopic
from librobot_vlm_ros.client.session import Session
from librobot_vlm_ros.core import BagError, EngineError, ErrorCode
from librobot_vlm_ros.replay.lock_step import NodeLink
from librobot_vlm_ros.replay.message_types import IMAGE_TYPES, import_message, qos_profile

__all__ = ["CLOCK", "PlayOptions", "PlayReport", "open_publishers"]

CLOCK = "/clock"
_SETTLE_S = 0.6


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
    rounds: int = 0
    wall_s: float = 0.0
    late_s: float = 0.0
    """Most that a message was behind its time."""


def open_publishers(
    session: Session,
    reader: BagReader,
    options: PlayOptions,
    report: PlayReport,
    link: NodeLink | None,
) -> dict[str, Any]:
    """A publisher for each topic that can be played, by its name in the bag; subscribers are
    waited for. What is left out stands in `report`.

    Raises `BagError` TOPIC_NOT_IN_BAG for a topic that is asked for and not there, WRONG_TYPE when
    nothing of it (strict: not all of it) can be played; in lock-step `EngineError` TOPIC_MISSING or
    NOT_ACTIVE when the node does not listen.
    """
    opening = _Opening(session, reader, options, report, link)
    opening.make()
    opening.check_definitions()
    opening.wait_for_subscribers()
    return opening.publishers


class _Opening:
    def __init__(
        self,
        session: Session,
        reader: BagReader,
        options: PlayOptions,
        report: PlayReport,
        link: NodeLink | None,
    ) -> None:
        self.publishers: dict[str, Any] = {}
        self.report = report
        self._session = session
        self._reader = reader
        self._options = options
        self._link = link

    def make(self) -> None:
        options = self._options
        for name in (*options.topics, *options.remap):
            self._reader.require_topic(name)
        for topic in self._reader.topics:
            if options.topics and topic.name not in options.topics:
                continue
            if options.clock_hz and self._name(topic.name) == CLOCK:
                self.report.skipped[topic.name] = "--clock publishes the bag's time itself"
                continue
            try:
                self.publishers[topic.name] = self._publisher(topic)
            except BagError as error:
                if options.strict or topic.name in options.topics:
                    raise
                self.report.skipped[topic.name] = error.message
        if not self.publishers:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.report.skipped.items())
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"nothing in {self._reader.path} can be played: {reasons or 'it has no topics'}",
            )

    def _name(self, topic: str) -> str:
        return self._options.remap.get(topic, topic)

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

    def check_definitions(self) -> None:
        """Leave out topics whose type is defined differently here than when it was recorded: their
        bytes would be read as something else.
        """
        for name in list(self.publishers):
            topic = self._reader.require_topic(name)
            recorded = self._reader.type_hash(name)
            here = _hash_here(self._session, self._name(name), topic.type)
            if not recorded or not here or recorded == here:
                continue
            reason = f"{topic.type} was recorded with another definition than the one here"
            if self._options.strict or name in self._options.topics:
                raise BagError(ErrorCode.WRONG_TYPE, f"topic {name}: {reason}")
            self._session.node.destroy_publisher(self.publishers.pop(name))
            self.report.skipped[name] = reason

    def wait_for_subscribers(self) -> None:
        until_s = time.monotonic() + self._options.discovery_s
        wanted = dict(self.publishers)
        link = self._link
        if link is not None:  # only what the node listens to can matter to it
            wanted = {
                name: publisher
                for name, publisher in wanted.items()
                if self._name(name) in link.cameras or self._name(name).startswith(f"{link.name}/")
            }
            if not any(self._name(name) in link.cameras for name in wanted):
                images = [t.name for t in self._reader.topics if t.type in IMAGE_TYPES]
                raise EngineError(
                    ErrorCode.TOPIC_MISSING,
                    f"{link.name} listens to {', '.join(link.cameras)}, and no topic of the bag is "
                    "played there",
                    f"Image topics of the bag: {', '.join(images) or 'none'}. Use --remap.",
                )
        self._session.spin_until(
            lambda: (
                all(item.get_subscription_count() for item in wanted.values())
                and (link is None or link.listeners_matched())
            ),
            until_s,
        )
        self.report.without_subscriber = [
            self._name(name)
            for name, publisher in self.publishers.items()
            if not publisher.get_subscription_count()
        ]
        silent = [self._name(name) for name, p in wanted.items() if not p.get_subscription_count()]
        if link is not None and silent:
            raise EngineError(
                ErrorCode.NOT_ACTIVE,
                f"{link.name} does not listen to {', '.join(silent)} after "
                f"{self._options.discovery_s:g} s",
                f"Is it active? ros2 lifecycle get {link.name}",
            )
        # Both sides must know each other; a publisher only sees that it knows the subscriber.
        self._session.spin_until(lambda: False, time.monotonic() + _SETTLE_S)


def _hash_here(session: Session, topic: str, type_name: str) -> str:
    """`RIHS01_...` of the type as it is installed; "" where this ROS does not tell."""
    for _ in range(50):
        for info in session.node.get_publishers_info_by_topic(topic):
            if info.node_name == session.node.get_name() and info.topic_type == type_name:
                return str(getattr(info, "topic_type_hash", ""))
        session.spin_until(lambda: False, time.monotonic() + 0.01)
    return ""
