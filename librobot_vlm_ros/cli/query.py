"""`librobot-vlm query`: one question to the running node."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.cli.answers import (
    describe_embedding,
    number_or_none,
    print_answer,
    regions_as_dicts,
)
from librobot_vlm_ros.cli.arguments import (
    add_node_argument,
    add_region_argument,
    count,
    positive,
    stamp,
)

if TYPE_CHECKING:
    from librobot_vlm_ros.core import Region

SUMMARY = "ask the running node about the newest camera frame, or about a picture"

EPILOG = """\
Tasks have the same names for every model: caption, detect, ground, answer, ocr, ... (Florence-2's
own, such as <OD>, are understood too). `librobot-vlm models` says which model can do which.

Examples:
  librobot-vlm query caption
  librobot-vlm query ground "the red cube"
  librobot-vlm query detect --image kitchen.jpg --json
"""
_FIND_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add = parser.add_argument
    add("task", help="what to do: caption, detect, ground, answer, ...")
    add("prompt", nargs="?", default="", help="text, for tasks that need one")
    add("--image", type=Path, help="ask about this picture, not a camera's frame")
    add("--camera", default="", help="which camera (default: the only one)")
    add(
        "--stamp",
        type=stamp,
        metavar="S",
        help="the frame of exactly this stamp in seconds, as 1700000000.250000000, among the "
        "latest (default: the newest)",
    )
    add_region_argument(parser)
    add("--max-new-tokens", type=count, default=0, metavar="N", help="length limit")
    add_node_argument(parser)
    add("--timeout", type=positive, default=30.0, metavar="S", help="default 30")
    add("--json", action="store_true", help="print the answer as JSON")


def main(args: argparse.Namespace) -> int:
    """Ask and print; 1 when the node answers with an error."""
    from librobot_vlm_ros.client.session import Session
    from librobot_vlm_ros.core import make_error
    from librobot_vlm_ros.srv import Query

    request = Query.Request(
        task=args.task,
        prompt=args.prompt,
        camera=args.camera,
        region=args.region or [],
        max_new_tokens=args.max_new_tokens,
        timeout_s=args.timeout,
    )
    if args.stamp is not None:
        request.stamp.sec, request.stamp.nanosec = args.stamp
    if args.image is not None:
        request.use_image, request.image = True, _image_message(args.image)
    with Session("librobot_vlm_query") as session:
        client = session.node.create_client(Query, f"{args.node}/query")
        # The node keeps the deadline; that there is no node is known sooner.
        answer = session.call(client, request, args.timeout + 2.0, find_s=_FIND_S)
    if args.json:
        print(json.dumps(_as_dict(answer), indent=2))
    if not answer.success:
        # The node's text begins with the code already; it is shown once.
        text = answer.error_msg or str(make_error(answer.error_code, "the node gave no reason"))
        print(f"librobot-vlm query: {text}", file=sys.stderr)
        return 1
    if not args.json:
        _print(answer)
    return 0


def _image_message(path: Path) -> Any:
    import array

    from sensor_msgs.msg import Image

    from librobot_vlm_ros.core.images.picture_files import read_picture

    pixels = read_picture(path)
    height, width = pixels.shape[:2]
    image = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    image.header.frame_id = path.name
    image.data = array.array("B", pixels.tobytes())  # a list would take a hundred times as long
    return image


def _as_dict(answer: Any) -> dict[str, Any]:
    info = answer.info
    stamp = answer.header.stamp
    return {
        "success": answer.success,
        "error_code": answer.error_code,
        "error_msg": answer.error_msg,
        "text": answer.text,
        "score": number_or_none(answer.score),
        "regions": regions_as_dicts(_regions(answer)),
        "embedding_shape": list(answer.embedding.shape),
        "stamp_ns": stamp.sec * 10**9 + stamp.nanosec,
        "frame_id": answer.header.frame_id,
        "model": info.model,
        "task": info.task,
        "prompt": info.prompt,
        "preprocess_s": info.preprocess_s,
        "inference_s": info.inference_s,
        "age_s": info.age_s,
    }


def _print(answer: Any) -> None:
    found, info = answer.embedding, answer.info
    print_answer(
        answer.text,
        _regions(answer),
        describe_embedding(found.dtype, found.shape) if found.shape else "",
        f"{info.model}, {info.task}, {info.preprocess_s + info.inference_s:.3f} s",
    )


def _regions(answer: Any) -> list[Region]:
    from librobot_vlm_ros.core import Region

    return [
        Region(
            *(item.label, item.score, item.x_min, item.y_min, item.x_max, item.y_max),
            polygon=tuple((point.x, point.y) for point in item.polygon),
        )
        for item in answer.grounding.regions
    ]
