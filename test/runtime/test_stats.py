"""Sliding windows and percentiles."""

from __future__ import annotations

import math

import pytest

from librobot_vlm_ros.core import EngineError, ErrorCode, ModelAnswer
from librobot_vlm_ros.runtime.stats import MAX_SAMPLES, WINDOW_S, Meter, Window, percentile


def test_percentiles_are_values_that_occurred():
    values = list(range(1, 101))
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile(values, 100) == 100
    assert percentile([3.0, 1.0], 99) == 3.0
    assert math.isnan(percentile([], 50))


def test_a_window_forgets_what_is_older_than_its_span(clock):
    window = Window()
    window.add(clock.ns, 1.0)
    clock.advance(0.6 * WINDOW_S)
    window.add(clock.ns, 2.0)
    clock.advance(0.6 * WINDOW_S)
    assert window.values(clock.ns) == [2.0]


def test_a_window_is_bounded_in_number(clock):
    window = Window()
    for number in range(MAX_SAMPLES + 10):
        window.add(clock.ns, float(number))
    assert len(window.values(clock.ns)) == MAX_SAMPLES


def test_a_window_tells_the_rate(clock):
    window = Window()
    assert math.isnan(window.rate_hz(clock.ns))
    for _ in range(31):
        window.add(clock.ns, 1.0)
        clock.advance(1 / 30)
    assert window.rate_hz(clock.ns) == pytest.approx(30.0, rel=1e-3)


def test_tokens_per_second_are_those_of_the_time_in_the_model(clock):
    meter = Meter()
    meter.run_began(1, clock.ns)
    meter.run_ended(0.5, 10, clock.ns)
    clock.advance(5.0)
    meter.run_ended(0.5, 20, clock.ns)
    assert meter.tokens_per_s(clock.ns) == 30.0


def test_cancelling_is_counted_but_is_no_last_error(clock):
    meter = Meter()
    meter.delivered("", EngineError(ErrorCode.CANCELLED, "wish"), 0.0, clock.ns)
    assert meter.errors == {"CANCELLED": 1}
    assert meter.last_error is None
    meter.delivered("", EngineError(ErrorCode.BUSY, "full"), 0.0, clock.ns)
    assert meter.last_error is not None


def test_ages_are_kept_per_camera_and_forgotten_with_it(clock):
    meter = Meter()
    meter.delivered("front", ModelAnswer(), 0.1, clock.ns)
    meter.delivered("wrist", ModelAnswer(), 0.2, clock.ns)
    meter.delivered("", ModelAnswer(), 9.0, clock.ns)
    ages = {camera: window.values(clock.ns) for camera, window in meter.ages.items()}
    assert ages == {"front": [0.1], "wrist": [0.2]}
    meter.keep_cameras(["front"])
    assert set(meter.ages) == {"front"}
