"""Cameras that fall silent and come back."""

from __future__ import annotations

import pytest

from librobot_vlm_ros.runtime import CameraConfig
from librobot_vlm_ros.runtime.watchdog import CameraEvent, Watchdog


@pytest.fixture
def dog(clock):
    dog = Watchdog()
    dog.set_cameras([CameraConfig("front", timeout_s=1.0)], clock.ns)
    dog.start(clock.ns)
    return dog


def test_a_camera_is_stale_after_its_timeout_and_said_once(dog, clock):
    dog.heard("front", clock.ns)
    clock.advance(0.999)
    assert dog.check(clock.ns) == []
    clock.advance(0.001)
    assert dog.check(clock.ns) == [CameraEvent("front", stale=True, silent_s=1.0)]
    clock.advance(5.0)
    assert dog.check(clock.ns) == []
    assert dog.cameras["front"].stale
    assert dog.cameras["front"].silent_s(clock.ns) == 6.0


def test_a_camera_that_comes_back_is_said_with_its_silence(dog, clock):
    clock.advance(3.0)
    dog.check(clock.ns)
    assert dog.heard("front", clock.ns) == CameraEvent("front", stale=False, silent_s=3.0)
    assert dog.heard("front", clock.ns) is None
    assert not dog.cameras["front"].stale


def test_it_knows_when_to_look_next(dog, clock):
    assert dog.next_ns() == clock.ns + 1_000_000_000
    clock.advance(0.4)
    dog.heard("front", clock.ns)
    assert dog.next_ns() == clock.ns + 1_000_000_000
    clock.advance(1.0)
    dog.check(clock.ns)
    assert dog.next_ns() is None


def test_a_hundred_losses_are_a_hundred_events_each_way(dog, clock):
    events = []
    for _ in range(100):
        clock.advance(1.0)
        events += dog.check(clock.ns)
        back = dog.heard("front", clock.ns)
        assert back is not None
        events.append(back)
    assert [event.stale for event in events] == [True, False] * 100


def test_while_paused_nothing_is_stale_and_after_it_each_camera_has_its_full_time(dog, clock):
    clock.advance(2.0)
    dog.check(clock.ns)
    dog.pause()
    assert not dog.cameras["front"].stale
    clock.advance(100.0)
    assert dog.check(clock.ns) == []
    dog.start(clock.ns)
    assert dog.check(clock.ns) == []
    clock.advance(1.0)
    assert [event.camera for event in dog.check(clock.ns)] == ["front"]


def test_a_camera_added_later_has_its_full_time_from_then(dog, clock):
    clock.advance(0.9)
    dog.heard("front", clock.ns)
    dog.set_cameras([CameraConfig("front", 1.0), CameraConfig("wrist", 1.0)], clock.ns)
    clock.advance(0.5)
    assert dog.check(clock.ns) == []
    clock.advance(0.5)
    assert {event.camera for event in dog.check(clock.ns)} == {"front", "wrist"}


def test_without_a_timeout_a_camera_is_never_stale(clock):
    dog = Watchdog()
    dog.set_cameras([CameraConfig("front", timeout_s=0.0)], clock.ns)
    dog.start(clock.ns)
    clock.advance(10_000.0)
    assert dog.check(clock.ns) == []
    assert dog.next_ns() is None
