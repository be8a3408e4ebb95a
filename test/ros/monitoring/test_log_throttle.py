"""A log that cannot be filled: a complaint is written now and then, and counted meanwhile."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy")

from librobot_vlm_ros.ros.monitoring.log_throttle import ThrottledLog


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.error = self.warning = self.info = self.lines.append


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_complaint_is_written_once_a_period_with_the_count_of_the_others(log: Log) -> None:
    now = [0.0]
    throttled = ThrottledLog(log, period_s=5.0, clock=lambda: now[0])
    for now[0] in (0.0, 1.0, 4.9, 5.0, 9.0, 20.0):
        throttled.error("key", f"at {now[0]:g}")
    assert log.lines == ["at 0", "at 5 (2 more like this)", "at 20 (1 more like this)"]


def test_keys_have_nothing_to_do_with_each_other(log: Log) -> None:
    throttled = ThrottledLog(log, clock=lambda: 0.0)
    throttled.error("a", "one")
    throttled.warning("b", "two")
    throttled.warning("b", "three")
    assert log.lines == ["one", "two"]


def test_of_news_a_burst_is_written_and_a_flood_counted(log: Log) -> None:
    now = [0.0]
    throttled = ThrottledLog(log, period_s=5.0, clock=lambda: now[0])
    for number in range(1000):
        throttled.info("news", f"{number}", burst=3)
    now[0] = 5.0
    for number in range(2):
        throttled.info("news", f"later {number}", burst=3)
    assert log.lines == ["0", "1", "2", "later 0 (997 more like this)", "later 1"]
