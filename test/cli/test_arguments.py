"""Arguments that make no sense are refused before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from librobot_vlm_ros.cli.arguments import (
    at_least_one,
    count,
    node_name,
    positive,
    remapping,
    seconds,
    stamp,
)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (seconds, "0", 0.0),
        (seconds, "2.5", 2.5),
        (positive, "1e-3", 0.001),
        (count, "0", 0),
        (count, "12", 12),
        (stamp, "1700000002.333333331", (1700000002, 333333331)),
        (stamp, "12.5", (12, 500000000)),
        (stamp, "7", (7, 0)),
        (at_least_one, "1", 1),
        (node_name, "/vlm", "/vlm"),
        (node_name, "robot_2/_vlm/", "/robot_2/_vlm"),
        (remapping, "/a:=/b", ("/a", "/b")),
        (remapping, "a:=b/c", ("/a", "/b/c")),
    ],
)
def test_good_ones(kind: Callable[[str], object], text: str, value: object) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *[(seconds, text) for text in ("-1", "nan", "inf", "ten", "", "1e30")],
        *[(positive, text) for text in ("0", "-0.0", "nan")],
        *[(count, text) for text in ("-1", "1.5", "", "9" * 30)],
        (at_least_one, "0"),
        *[
            (node_name, text)
            for text in ("", "/", "bad name!", "a//b", "2a", "a/2", "ä", "a" * 300)
        ],
        *[(stamp, text) for text in ("", "-1", "1.", "1.2345678901", "now", "2147483648")],
        *[(remapping, text) for text in ("/a", ":=/b", "/a:=", "/a=/b")],
    ],
)
def test_bad_ones(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)
