"""`librobot-vlm doctor`: what is missing on this machine for the chosen model, and the fix."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from librobot_vlm_ros.cli.arguments import add_model_arguments
from librobot_vlm_ros.console import Console

if TYPE_CHECKING:
    from librobot_vlm_ros.doctor.finding import Finding

SUMMARY = "look at Python, torch, GPU, ROS, shared memory, weights; say what to mend"

EPILOG = """\
Each line is ok, a warning (works, but not as well as it could) or a problem (does not work), the
last two with the fix. Exit code 1 when there is a problem. Nothing is downloaded or changed, ROS
need not be there. The NaN probe asks the chosen model about a picture in each dtype that fits,
where its weights are on this machine; else a tiny one of its family with random weights.

Examples:
  librobot-vlm doctor
  librobot-vlm doctor --model qwen2-vl-2b --device cuda --json
  librobot-vlm doctor --model florence-2-base --weights /models/florence --no-probe
"""
_MARKS = {
    "ok": ("ok", "bold green"),
    "warning": ("warning", "bold yellow"),
    "problem": ("PROBLEM", "bold red"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add_model_arguments(parser, quantization=False)
    parser.add_argument("--no-probe", action="store_true", help="leave out the NaN probe")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(args: argparse.Namespace) -> int:
    """Look at everything; 1 when there is a problem."""
    from librobot_vlm_ros.doctor import examine
    from librobot_vlm_ros.models import model_info

    info = model_info(args.model)  # a wrong name is the caller's error, not the machine's
    console = Console()
    found: list[Finding] = []
    for finding in examine(info, args.weights, args.device, args.dtype, probe=not args.no_probe):
        found.append(finding)
        if not args.json:
            _show(console, finding)
    problems = [finding for finding in found if finding.status == "problem"]
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in found]
        document = {"ok": not problems, "model": info.name, "checks": rows}
        print(json.dumps(document, indent=2))
    else:
        warnings = sum(finding.status == "warning" for finding in found)
        words = f"{_counted(len(problems), 'problem')}, {_counted(warnings, 'warning')}"
        print(f"\n{words}", file=sys.stderr)
    return 1 if problems else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _show(console: Console, finding: Finding) -> None:
    word, style = _MARKS[finding.status]
    mark = console.paint(f"{word:<7}", style)
    console.line(f"{mark} {finding.name}: {finding.value}")
    if finding.fix:
        console.line(f"        -> {finding.fix}")
