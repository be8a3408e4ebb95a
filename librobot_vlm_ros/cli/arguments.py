"""Arguments that several commands have, and types that refuse what makes no sense."""

from __future__ import annotations

import argparse
import re
from typing import Any

_MOST = 1e9
_MOST_OF_A_NAME = 200  # characters; of DDS's 255 for a topic, which is longer


def add_model_arguments(parser: Any, *, quantization: bool = True) -> None:
    """--model, --weights, --device, --dtype and --quantization, to a parser or a group of one."""
    parser.add_argument("--model", default="florence-2-base", help="default florence-2-base")
    parser.add_argument("--weights", default="", help="folder or hub id (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16")
    if quantization:
        parser.add_argument("--quantization", default="none", help="none, int8, nf4")


def add_node_argument(parser: Any, what: str = "the node") -> None:
    """--node, absolute."""
    parser.add_argument("--node", type=node_name, default="/vlm", help=f"{what} (default /vlm)")


def add_region_argument(parser: Any) -> None:
    """--region, None where it is not given."""
    parser.add_argument(
        "--region",
        type=float,
        nargs=4,
        metavar=("X_MIN", "Y_MIN", "X_MAX", "Y_MAX"),
        help="box in pixels, for tasks about a region",
    )


def seconds(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= _MOST:  # NaN is in no interval
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = seconds(text)
    if value == 0.0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1")
    return value


def node_name(text: str) -> str:
    """A node's name with its namespace, absolute, of the characters that ROS takes in topics."""
    name = f"/{text.strip('/')}"
    if len(name) > _MOST_OF_A_NAME or not re.fullmatch(r"(/[A-Za-z_][A-Za-z0-9_]*)+", name):
        raise argparse.ArgumentTypeError(
            f"{text[:_MOST_OF_A_NAME]!r} is no name of a node: expected letters, digits and _, "
            "each part beginning with no digit, as /robot/vlm"
        )
    return name


def stamp(text: str) -> tuple[int, int]:
    """Seconds with up to nine decimals as (seconds, nanoseconds), exact."""
    found = re.fullmatch(r"(\d{1,10})(?:\.(\d{1,9}))?", text)
    if found is None or int(found[1]) >= 2**31:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no stamp: expected seconds, as 1700000000.25"
        )
    return int(found[1]), int((found[2] or "").ljust(9, "0"))


def remapping(text: str) -> tuple[str, str]:
    """`/from:=/to` as a pair of absolute topic names."""
    source, sign, target = text.partition(":=")
    if not sign or not source or not target:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form /from:=/to")
    return _absolute(source), _absolute(target)


def _absolute(topic: str) -> str:
    return topic if topic.startswith("/") else f"/{topic}"
