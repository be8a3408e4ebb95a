"""Subscriptions that take the quality of service of the publishers they find, and say what keeps
them silent.

A subscription asks for best effort and volatile, which fits every publisher, and for more
(reliable, transient local) once every publisher offers it. Publishers may come, go and change;
`check` is called on a timer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    LivelinessPolicy,
    QoSProfile,
    ReliabilityPolicy,
)

from librobot_vlm_ros.ros.rcl_errors import coded_rcl_error

_UNKNOWN_NODE = "_NODE_NAME_UNKNOWN_"  # what the middleware calls a node it has not heard of


@dataclass(frozen=True)
class Link:
    """How a subscription stands to the publishers of its topic."""

    topic: str
    publishers: int
    """Publishers of the right type."""
    problem: str = ""
    """What keeps messages from coming, "" when nothing does."""
    fix: str = ""
    """What to do about the problem."""
    profile: str = ""
    """The quality of service in use, in words."""


def matching_profile(
    offered: Sequence[QoSProfile],
    *,
    depth: int,
    reliability: str = "auto",
    when_alone: str = "best_effort",
) -> QoSProfile:
    """The most that every one of the `offered` profiles can serve.

    `reliability` "best_effort" or "reliable" is asked for as it is; `when_alone` is what is asked
    for while nobody publishes. Deadline, lifespan and liveliness are asked of nobody, so that they
    can never be in the way.
    """
    reliable = when_alone == "reliable"
    if offered:
        reliable = all(item.reliability == ReliabilityPolicy.RELIABLE for item in offered)
    if reliability != "auto":
        reliable = reliability == "reliable"
    latched = bool(offered) and all(
        item.durability == DurabilityPolicy.TRANSIENT_LOCAL for item in offered
    )
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        liveliness=LivelinessPolicy.AUTOMATIC,
    )


class MatchedSubscription:
    """One topic, subscribed to as its publishers allow.

    With `raw` the callback gets each message's serialized bytes. `other_types` holds the fix for
    each type that the topic may turn out to carry; `twin` is (topic, fix) of another topic with the
    same contents, named where this one has no publisher.
    """

    def __init__(
        self,
        node: Any,
        message_type: Any,
        topic: str,
        callback: Callable[[Any], None],
        *,
        depth: int,
        reliability: str = "auto",
        when_alone: str = "best_effort",
        other_types: dict[str, str] | None = None,
        twin: tuple[str, str] | None = None,
        raw: bool = False,
    ) -> None:
        self._node = node
        self._message_type = message_type
        self._callback = callback
        self._options: dict[str, Any] = {
            "depth": depth,
            "reliability": reliability,
            "when_alone": when_alone,
        }
        self._other_types = other_types or {}
        self._twin = twin
        self._raw = raw
        self._name = str(node.resolve_topic_name(topic))
        self.type_name = message_type.__module__.split(".")[0] + "/msg/" + message_type.__name__
        self._subscription: Any = None
        self._lock = threading.Lock()  # `close` comes from the transition thread
        self._open = True
        self._profile: QoSProfile | None = None
        self.link = Link(self._name, 0)
        self.check()

    def check(self) -> bool:
        """Look at the publishers, subscribe anew where needed; true on a change of `link`."""
        found, right = self._publishers()
        profile = matching_profile([item.qos_profile for item in right], **self._options)
        with self._lock:
            # With everybody gone, what was asked for last stays: most come back as they were.
            fits = self._subscription is not None and (not right or _same(profile, self._profile))
            if self._open and not fits:
                self._subscribe(profile)
        link = self._describe(found, right)
        changed = link != self.link
        self.link = link
        return changed

    def look(self) -> Link:
        """How the subscription stands now. Changes nothing; from any thread."""
        return self._describe(*self._publishers())

    def _publishers(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """All publishers of the topic, and those of the right type."""
        found = self._node.get_publishers_info_by_topic(self._name)
        return found, [item for item in found if item.topic_type == self.type_name]

    def close(self) -> None:
        """Stop listening, for good."""
        with self._lock:
            self._open = False
            self._unsubscribe()

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def _subscribe(self, profile: QoSProfile) -> None:
        self._unsubscribe()
        self._profile = profile
        try:
            self._subscription = self._node.create_subscription(
                self._message_type,
                self._name,
                self._callback,
                profile,
                raw=self._raw,
                # `check` says it with the fix; rclpy's default says only that there is a mismatch.
                event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            )
        except Exception as error:
            known = coded_rcl_error(error, self._name)
            if known is None:
                raise
            raise known from error

    def _describe(self, found: Sequence[Any], right: Sequence[Any]) -> Link:
        assert self._profile is not None
        words = _words(self._profile)
        if not found:
            return Link(self._name, 0, f"nobody publishes {self._name}", self._elsewhere(), words)
        if not right:
            other = found[0].topic_type
            fix = self._other_types.get(other, "Connect a topic of the expected type.")
            problem = f"{self._name} carries {other}, expected {self.type_name}"
            return Link(self._name, 0, problem, fix, words)
        refused = [item for item in right if not _fits(item.qos_profile, self._profile)]
        if refused:
            problem = (
                f"quality of service does not match: {_named(refused[0])} publishes {self._name} "
                f"as {_words(refused[0].qos_profile)}, this node asks for {words}"
            )
            fix = "Set qos_reliability:=auto, or publish it as reliable."
            return Link(self._name, len(right), problem, fix, words)
        return Link(self._name, len(right), "", "", words)

    def _elsewhere(self) -> str:
        """Where to look instead: the topic's twin, or topics of the right type."""
        if self._twin is not None:
            twin, fix = self._twin
            twin = str(self._node.resolve_topic_name(twin))
            if self._node.count_publishers(twin) > 0:
                return f"{twin} is there: {fix}"
        own = self._node.get_fully_qualified_name() + "/"
        topics = sorted(
            name
            for name, types in self._node.get_topic_names_and_types()
            if self.type_name in types
            and not name.startswith(own)
            and self._node.count_publishers(name) > 0
        )
        if not topics:
            return (
                f"No topic carries {self.type_name} now: start the publisher, "
                "or check ROS_DOMAIN_ID."
            )
        more = f" and {len(topics) - 5} more" if len(topics) > 5 else ""
        return f"Topics of that type: {', '.join(topics[:5])}{more}."


def _named(publisher: Any) -> str:
    """The publisher's node. A topic can be discovered some time before the node that it is of."""
    name = str(publisher.node_name)
    return "a publisher whose name is not known yet" if name in ("", _UNKNOWN_NODE) else name


def _same(one: QoSProfile, other: QoSProfile | None) -> bool:
    return (
        other is not None
        and one.reliability == other.reliability
        and one.durability == other.durability
    )


def _fits(offered: QoSProfile, asked: QoSProfile) -> bool:
    reliable, latched = ReliabilityPolicy.RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL
    lossy = asked.reliability == reliable and offered.reliability != reliable
    forgetful = asked.durability == latched and offered.durability != latched
    return not (lossy or forgetful)


def _words(profile: QoSProfile) -> str:
    reliability = "reliable" if profile.reliability == ReliabilityPolicy.RELIABLE else "best effort"
    latched = profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    return f"{reliability}, {'transient local' if latched else 'volatile'}"
