"""`librobot-vlm annotate`: bags in, one bag with the originals and the model's results out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from librobot_vlm_ros.cli.arguments import (
    add_model_arguments,
    add_node_argument,
    at_least_one,
    count,
    positive,
)
from librobot_vlm_ros.console import Console

if TYPE_CHECKING:
    from librobot_vlm_ros.annotate.job import Options

_MOST_WORKERS = 64
#: Arguments that are parameters of the node.
_PARAMETERS = (
    *("model", "weights", "model_config", "device", "dtype", "quantization", "instruction"),
    *("max_batch", "max_new_tokens", "num_beams", "min_score", "allow_depth"),
)

SUMMARY = "run a model over recorded bags: originals and results into a new bag"

EPILOG = """\
Every frame of the image topics, raw or compressed, is given to the model, batched and without ROS
in between. The new bag holds the original topics and, at each frame's time, the messages that the
live node would publish: /vlm/caption, /vlm/grounding, /vlm/embedding under the frame's own header.

Tasks are written as for the node: [camera:]task[@rate in Hz][=prompt], no rate meaning every frame.
Those that need text and have none follow the instruction topic of the bag.

Whatever ends a run, what was done is kept in OUT_BAG.partial. The same command goes on where it
stopped; no frame is lost or doubled. OUT_BAG appears when it is complete.

Examples:
  librobot-vlm annotate my_bag out --tasks caption detect --model florence-2-tabletop
  librobot-vlm annotate a.mcap b.mcap out --tasks 'ground=red cube' --rate 2 --workers 2
  librobot-vlm annotate my_bag out --tasks front:detect --topics front=/front/image_raw/compressed
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    parser.usage = "librobot-vlm annotate IN_BAG [IN_BAG ...] OUT_BAG --tasks TASK [TASK ...]"
    add = parser.add_argument
    add("bags", type=Path, nargs="+", metavar="BAG", help="bags to read, and last the one to write")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="what to ask")
    frames = parser.add_argument_group("frames")
    add = frames.add_argument
    add(
        "--topics",
        nargs="+",
        default=(),
        metavar="T",
        help="image topics, as /topic or camera=/topic (default: all; of a raw topic and its "
        "compressed twin the raw one)",
    )
    fewer = frames.add_mutually_exclusive_group()
    fewer.add_argument(
        "--every", type=at_least_one, default=1, metavar="N", help="each N-th frame of a camera"
    )
    fewer.add_argument(
        "--rate",
        dest="rate_hz",
        type=positive,
        default=0.0,
        metavar="HZ",
        help="at most HZ frames of a camera per second of its stamps",
    )
    add("--instruction", default="", help="what tasks look for from the beginning")
    add(
        "--instruction-topic",
        metavar="T",
        help="std_msgs/String in the bag that changes it (default: NODE/instruction or "
        "/instruction, where the bag has one; '' for none)",
    )
    add(
        "--salvage",
        action="store_true",
        help="read what is whole of a bag that is cut off or damaged",
    )
    model = parser.add_argument_group("model")
    add_model_arguments(model)
    add = model.add_argument
    add("--model-config", default="", metavar="JSON", help="the model's settings")
    add(
        "--batch",
        dest="max_batch",
        type=at_least_one,
        default=8,
        metavar="N",
        help="frames at once (default 8)",
    )
    add("--max-new-tokens", type=count, default=0, metavar="N", help="length limit")
    add("--num-beams", type=count, default=0, metavar="N", help="of the decoding")
    add("--min-score", type=float, default=0.0, metavar="P", help="leave out regions below P")
    add("--allow-depth", action="store_true", help="take depth images as grey ones")
    add(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="processes, each with the model (default 1, at most 64; never more than there are "
        "segments of frames to do)",
    )
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--storage", choices=("mcap", "db3"), help="of the new bag (default: as the first bag's)")
    add_node_argument(output, "names the result topics")
    add("--overwrite", action="store_true", help="begin anew and replace OUT_BAG if there is one")
    add(
        "--resume",
        action="store_true",
        help="go on with an unfinished run (also the default); fine when it is finished",
    )
    add("--json", action="store_true", help="print the summary as JSON")


def _workers(text: str) -> int:
    value = at_least_one(text)
    if value > _MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_WORKERS} processes")
    return value


def main(args: argparse.Namespace) -> int:
    """Annotate; 1 when no frame got an answer."""
    if len(args.bags) < 2:
        argparse.ArgumentParser(prog="librobot-vlm annotate").error(
            "expected at least one bag to read and last the one to write"
        )
    from librobot_vlm_ros.annotate.run import annotate

    console = Console(sys.stderr if args.json else None)
    summary = annotate(_options(args), console)
    if summary is None:
        out = str(args.bags[-1])
        console.line(f"{out} is finished already")
        if args.json:
            print(json.dumps({"out": out, "finished_before": True}))
        return 0
    rows = [(name, str(number)) for name, number in sorted(summary.topics.items())]
    console.table(rows, header=("topic", "messages"), right="lr")
    console.line(
        f"{summary.frames} frames ({summary.bad_frames} bad), {summary.results} results, "
        f"{summary.seconds:.1f} s: {summary.out}"
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(summary), indent=2))
    return 1 if summary.frames and summary.results == summary.failed_results else 0


def _options(args: argparse.Namespace) -> Options:
    from librobot_vlm_ros.annotate.job import Options

    return Options(
        bags=tuple(args.bags[:-1]),
        out=args.bags[-1],
        parameters={
            **{name: getattr(args, name) for name in _PARAMETERS},
            "tasks": tuple(args.tasks),
        },
        topics=tuple(args.topics),
        instruction_topic=args.instruction_topic,
        node=args.node,
        every=args.every,
        rate_hz=args.rate_hz,
        salvage=args.salvage,
        storage=args.storage,
        workers=args.workers,
        overwrite=args.overwrite,
        resume=args.resume,
    )
