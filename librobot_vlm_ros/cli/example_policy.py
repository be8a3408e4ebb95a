"""`librobot-vlm example-policy`: a small policy on the node's results, to run and to copy."""

from __future__ import annotations

import argparse
from pathlib import Path

from librobot_vlm_ros.cli.arguments import add_node_argument

_SOURCE = Path(__file__).parents[1] / "client" / "policy_node.py"
SUMMARY = "run a small policy on the node's results (pointing target); its source is to be copied"

EPILOG = """\
It listens to the node's caption, grounding and embedding and publishes /pointing_policy/target
(geometry_msgs/PointStamped, pixels of the source image). The node needs the standing tasks
ground, and for the rest caption and embed:

  librobot-vlm run model:=florence-2-base image_topic:=/camera/image_raw \\
    tasks:='[caption@1, ground, embed@2]' instruction:='the red cup'
  librobot-vlm example-policy
  librobot-vlm example-policy --source > my_policy.py
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add_node_argument(parser)
    parser.add_argument("--source", action="store_true", help="print the source and end")


def main(args: argparse.Namespace) -> int:
    """Spin the policy until a signal comes."""
    if args.source:
        print(_SOURCE.read_text(encoding="utf-8"), end="")
        return 0
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from librobot_vlm_ros.client.policy_node import PointingPolicy

    # Signals raise in this thread, as for every command.
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    policy = PointingPolicy(args.node)
    executor = SingleThreadedExecutor()
    executor.add_node(policy)
    policy.get_logger().info(f"pointing at what {args.node} grounds")
    try:
        while True:
            executor.spin_once(0.2)
    finally:
        executor.shutdown(0)
        policy.destroy_node()
        rclpy.try_shutdown()
