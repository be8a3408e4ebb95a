"""`librobot-vlm demo`: the node, a model and a bag, from start to report, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from librobot_vlm_ros.cli.arguments import positive

SUMMARY = "run the node on the bag that ships, ask it questions, and write a report"

EPILOG = """\
The node runs as a process of its own in a ROS domain of its own; nothing leaves this machine, and
the node is ended whatever happens. In the folder OUT it leaves:

  report.html    frames, boxes, captions, questions and latency on one page
  overview.png   a few annotated frames       frames/      all of them
  output_bag/    the bag's topics and the node's results (MCAP)
  summary.json   the figures                  node.log     what the node wrote

Exit code 0 means that every frame was answered, every result carried the stamp of its frame, and
every question got an answer.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/demo"), help="folder to write (default build/demo)")
    add("--model", default="florence-2-tabletop", help="default florence-2-tabletop, which ships")
    add("--bag", type=Path, help="another bag than the one that ships")
    add(
        "--image-topic",
        default="/camera/image_raw",
        metavar="T",
        help="topic of its frames, raw or .../compressed (default /camera/image_raw)",
    )
    add("--rate", type=positive, default=1.0, metavar="R", help="at most R times the bag's speed")


def main(args: argparse.Namespace) -> int:
    """Run it; 1 when something of it failed."""
    from librobot_vlm_ros.demo.run import run_demo

    return run_demo(args.model, args.bag, args.image_topic, args.rate, args.out)
