"""`librobot-vlm bench`: measured against transformers' processor and generate."""

from __future__ import annotations

import argparse

from librobot_vlm_ros.bench.__main__ import EPILOG as EPILOG
from librobot_vlm_ros.bench.__main__ import configure as configure
from librobot_vlm_ros.bench.__main__ import run

SUMMARY = "measure this package against transformers' own processor and generate"


def main(args: argparse.Namespace) -> int:
    """Run the bench; its exit code."""
    return run(args)
