"""Requests of any length are refused without being read to their end: nothing else runs meanwhile.

Times are bounded widely; before, these took seconds to minutes.
"""

from __future__ import annotations

import array
import time

import numpy as np
import pytest

from librobot_vlm_ros.core import ErrorCode, Frame, InferenceRequest, RequestError
from librobot_vlm_ros.ros.parameters.parameter_syntax import parse_cameras, parse_tasks

LONG = 4_000_000
FRAME = Frame(np.zeros((4, 4, 3), np.uint8), "camera", 1)


@pytest.mark.parametrize("value", [3.14159, float("nan")])
@pytest.mark.parametrize("kind", [list, tuple, lambda numbers: array.array("f", numbers)])
def test_a_long_region(value, kind):
    region = kind([value] * LONG)
    began = time.monotonic()
    with pytest.raises(RequestError, match=f"region is {LONG} numbers") as caught:
        InferenceRequest("a", FRAME, "region_caption", region=region)
    assert caught.value.code == ErrorCode.BAD_REGION
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize(
    "entry",
    [
        "a" + " " * LONG + "!",
        "camera" + " " * LONG + ":caption",
        "caption@" + " " * LONG + "x",
        "a" * LONG,
        " " * LONG + "!",
    ],
)
@pytest.mark.parametrize("parse", [parse_tasks, lambda entries, _: parse_cameras(entries, "", "")])
def test_a_long_entry_of_tasks_or_cameras(entry, parse):
    began = time.monotonic()
    with pytest.raises(RequestError):
        parse([entry], ["camera"])
    assert time.monotonic() - began < 0.5


def test_what_four_numbers_are_is_still_said():
    with pytest.raises(RequestError, match=r"region is \(1, 2, 3\), expected 4"):
        InferenceRequest("a", FRAME, "region_caption", region=(1, 2, 3))
    with pytest.raises(RequestError, match="region is 5, expected 4"):
        InferenceRequest("a", FRAME, "region_caption", region=5)
