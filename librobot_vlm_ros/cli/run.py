"""`librobot-vlm run`: the node without launch_ros, with the arguments of the launch file."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from librobot_vlm_ros.ros.parameters.arguments import Argument

SUMMARY = "start the node: run model:=florence-2-base image_topic:=/camera/image_raw"

EPILOG = """\
examples:
  librobot-vlm run model:=florence-2-base image_topic:=/camera/image_raw
  librobot-vlm run model:=florence-2-tabletop tasks:='[caption@1, detect@5]'
  librobot-vlm run cameras:='front=/front/image_raw, wrist=/wrist/image_raw:compressed'
every parameter of the node is an argument: librobot-vlm run --show-args
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the `name:=value` words and `--show-args`."""
    parser.description = "Starts the node `vlm`, configures and activates it. Ctrl-C ends it."
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="as for ros2 launch")
    parser.add_argument(
        "-s", "--show-args", action="store_true", help="say what each argument means and end"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the node until a signal comes."""
    from librobot_vlm_ros.ros.parameters.arguments import (
        ENCLAVE_VARIABLE,
        arguments,
        parse_values,
        ros_arguments,
        split_arguments,
    )

    known = arguments()
    if args.show_args:
        print(describe(known))
        return 0
    texts = split_arguments(args.arguments, [item.name for item in known])
    values = parse_values(texts)
    words = ros_arguments(texts)
    from librobot_vlm_ros.ros.dds import TRANSPORT_VARIABLE
    from librobot_vlm_ros.ros.main import main as run_node

    if "transport" in texts:
        os.environ[TRANSPORT_VARIABLE] = texts["transport"]
    if texts.get("enclave"):
        os.environ[ENCLAVE_VARIABLE] = texts["enclave"]

    return run_node(["vlm_node", *words], values)


def describe(known: Sequence[Argument]) -> str:
    """The arguments with their meanings, as `ros2 launch --show-args` prints them."""
    lines = ["Arguments (pass arguments as '<name>:=<value>'):"]
    for item in known:
        choices = f" Valid choices are: {', '.join(item.choices)}" if item.choices else ""
        text = textwrap.fill(item.description + choices, 92, initial_indent="        ",
                             subsequent_indent="        ")  # fmt: skip
        lines += ["", f"    '{item.name}':", text, f"        (default: '{item.default}')"]
    return "\n".join(lines)
