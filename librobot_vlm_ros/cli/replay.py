"""`librobot-vlm replay`: a recorded bag back into topics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from librobot_vlm_ros.cli.arguments import add_node_argument, positive, remapping, seconds
from librobot_vlm_ros.console import Console

if TYPE_CHECKING:
    from librobot_vlm_ros.replay.player import PlayOptions, PlayReport

SUMMARY = "play a db3 or MCAP bag into topics, at its own timing or in step with the node"

EPILOG = """\
The recorded bytes are published as they are: headers, stamps and types unchanged, with the quality
of service that was recorded. Topics whose type is not installed here are named and left out.

Lock-step sends a frame, waits for the running node's results of it, and sends the next: no frame is
dropped and two replays give identical results. Start the node for it with lock_step:=true and with
tasks without a rate:

  librobot-vlm run model:=florence-2-base lock_step:=true tasks:='[caption, detect]'
  librobot-vlm replay my_bag --lock-step

Examples:
  librobot-vlm replay --loop                                    the shipped bag, for ever
  librobot-vlm replay my_bag                                    as it was recorded
  librobot-vlm replay my_bag --rate 2 --loop --clock            twice as fast, for ever, with /clock
  librobot-vlm replay my_bag --topics /front/image_raw --remap /front/image_raw:=/camera/image_raw
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add = parser.add_argument
    add(
        "bag",
        type=Path,
        nargs="?",
        help="bag folder, or a .mcap or .db3 file (default: the tabletop bag that ships)",
    )
    add = parser.add_argument_group("timing").add_argument
    add(
        "--rate",
        type=positive,
        metavar="R",
        help="times the recorded speed (default 1; in lock-step as fast as the node answers, "
        "and with this at most so fast)",
    )
    add("--lock-step", action="store_true", help="wait for the node's results of each frame")
    add("--start", type=seconds, default=0.0, metavar="S", help="begin S seconds in")
    add("--duration", type=positive, metavar="S", help="play only S seconds")
    add("--loop", action="store_true", help="begin again at the end, until Ctrl-C")
    add(
        "--clock",
        type=positive,
        nargs="?",
        const=40.0,
        default=0.0,
        metavar="HZ",
        help="publish the bag's time on /clock, HZ times a second (default 40), for nodes with "
        "use_sim_time",
    )
    add = parser.add_argument_group("topics").add_argument
    add("--topics", nargs="+", default=(), metavar="T", help="play only these")
    add("--remap", nargs="+", type=remapping, default=(), metavar="A:=B", help="publish A as B")
    add("--strict", action="store_true", help="refuse the bag if any topic cannot be played")
    add(
        "--salvage",
        action="store_true",
        help="play what is whole of a bag that is cut off or damaged",
    )
    waiting = parser.add_argument_group("waiting")
    add = waiting.add_argument
    add(
        "--wait",
        type=seconds,
        default=3.0,
        metavar="S",
        help="longest wait for subscribers before the first message (default 3)",
    )
    add_node_argument(waiting, "lock-step: the node")
    add(
        "--timeout",
        type=positive,
        default=30.0,
        metavar="S",
        help="lock-step: longest wait for the results of one frame (default 30)",
    )


def main(args: argparse.Namespace) -> int:
    """Play; 1 when frames stayed without results in lock-step."""
    from librobot_vlm_ros.bags import BagReader, shipped_bag
    from librobot_vlm_ros.client.session import Session
    from librobot_vlm_ros.replay.lock_step import NodeLink
    from librobot_vlm_ros.replay.player import Player

    console = Console()
    options = _options(args)
    path = args.bag or shipped_bag()
    with (
        BagReader(path, salvage=args.salvage) as reader,
        Session("librobot_vlm_replay") as session,
    ):
        if reader.lost:
            console.warn(f"{path} is not whole, lost is {reader.lost}")
        link = None
        if args.lock_step:
            link = NodeLink(session, args.node)
            link.connect()
            if not link.lock_step:
                console.warn(f"{link.name} runs without lock_step:=true and may drop frames")
        player = Player(session, reader, options, link=link)
        player.open()
        for name, reason in player.report.skipped.items():
            console.warn(f"{name} is left out: {reason}")
        if player.report.without_subscriber:
            console.warn(f"nobody listens to {', '.join(player.report.without_subscriber)}")
        console.stage(f"playing {path} ({player.total} messages, {reader.duration_s:.1f} s)")
        with console.progress(player.total, "messages") as progress:
            player.on_publish = lambda message, _sent_s: progress.step(
                message.topic, to=progress.done % player.total + 1
            )
            try:
                report = player.play()
            except KeyboardInterrupt:
                if not options.loop:
                    raise
                report = player.report  # the way a loop ends
            progress.finish()
    return _summary(console, report, lock_step=link is not None)


def _options(args: argparse.Namespace) -> PlayOptions:
    from librobot_vlm_ros.replay.player import PlayOptions

    return PlayOptions(
        rate=args.rate if args.rate or args.lock_step else 1.0,
        topics=tuple(args.topics),
        remap=dict(args.remap),
        start_s=args.start,
        duration_s=args.duration,
        loop=args.loop,
        clock_hz=args.clock,
        discovery_s=args.wait,
        answer_timeout_s=args.timeout,
        strict=args.strict,
    )


def _summary(console: Console, report: PlayReport, *, lock_step: bool) -> int:
    rows = [(name, str(count)) for name, count in sorted(report.published.items())]
    console.table(rows, header=("topic", "messages"), right="lr")
    console.line(
        f"{report.wall_s:.2f} s, at most {max(0.0, report.late_s):.3f} s behind its timing"
    )
    if not lock_step:
        return 0
    answered = report.frames - len(report.unanswered)
    console.line(f"{answered} of {report.frames} frames answered")
    for stamp_ns in report.unanswered[:10]:
        print(
            f"librobot-vlm replay: DEADLINE_EXCEEDED(502): the frame of stamp {stamp_ns} had no "
            "complete results in time. The node's log says what became of it.",
            file=sys.stderr,
        )
    return 1 if report.unanswered else 0
