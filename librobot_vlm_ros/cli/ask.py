"""`librobot-vlm ask`: one task on one picture, without a node; the answer also drawn."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.cli.answers import (
    describe_embedding,
    number_or_none,
    print_answer,
    regions_as_dicts,
)
from librobot_vlm_ros.cli.arguments import add_model_arguments, add_region_argument, count
from librobot_vlm_ros.console import log_on_stderr

if TYPE_CHECKING:
    from librobot_vlm_ros.core import Frame, InferenceRequest, ModelAnswer

SUMMARY = "ask a model about a picture: the answer in the terminal, and drawn beside the picture"

EPILOG = """\
The answer stands in IMAGE.answer.png too: boxes, polygons, labels, scores, text. No ROS is needed.
Pictures are turned as their EXIF says; boxes are pixels of the upright picture.

Examples:
  librobot-vlm ask table.jpg --model florence-2-tabletop --task detect
  librobot-vlm ask kitchen.jpg --task ground "the red mug" --out answer.png
  librobot-vlm ask shelf.png --model qwen2-vl-2b --task answer "What is on the upper shelf?"
  librobot-vlm ask kitchen.jpg --task region_caption --region 10 20 200 240 --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP, BMP, TIFF, ...")
    add("text", nargs="?", default="", help="text, for tasks that need one")
    add("--task", default="caption", help="default caption; `models` lists them")
    add_model_arguments(parser)
    add("--out", type=Path, metavar="FILE", help="where to draw (default IMAGE.answer.png)")
    add_region_argument(parser)
    add("--max-new-tokens", type=count, default=0, metavar="N", help="length limit")
    add("--json", action="store_true", help="print the answer as JSON")


def main(args: argparse.Namespace) -> int:
    """Ask, print and draw. Everything that can be wrong is found before the model is loaded."""
    from librobot_vlm_ros.core import Frame, GenerationParams, VlmError, get_task, make_request
    from librobot_vlm_ros.core.images.picture_files import read_picture
    from librobot_vlm_ros.models import create_backend, model_info

    info = model_info(args.model)
    _check_task(info, get_task(args.task).name)
    frame = Frame(read_picture(args.image), camera="", stamp_ns=0, frame_id=args.image.name)
    out = _out_path(args.image, args.out)
    request = make_request(
        request_id="ask",
        frame=frame,
        task=args.task,
        prompt=args.text,
        region=args.region,
        params=GenerationParams(max_new_tokens=args.max_new_tokens or None),
    )
    with log_on_stderr():
        vlm = create_backend(
            info.name,
            pretrained=args.weights,
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
        )
        (entry,) = vlm.run([request])
    if isinstance(entry, VlmError):
        raise entry
    _draw(out, frame, request, entry)
    if args.json:
        print(json.dumps(_as_dict(vlm, frame, request, entry, out), indent=2))
    else:
        _print(vlm, request, entry, out)
    return 0


def _check_task(info: Any, task: str) -> None:
    from librobot_vlm_ros.core import ErrorCode, RequestError
    from librobot_vlm_ros.models import models_with_task

    if task not in info.tasks:
        able = ", ".join(models_with_task(task)) or "none of the registered ones"
        raise RequestError(
            ErrorCode.TASK_NOT_SUPPORTED,
            f"{info.name} cannot {task!r}, it can: {', '.join(info.tasks)}",
            f"Models that can: {able}.",
        )


def _out_path(image: Path, asked: Path | None) -> Path:
    """Where the drawing goes. Raises `RequestError` for a path that cannot be written."""
    from PIL import Image

    from librobot_vlm_ros.core import ErrorCode, RequestError
    from librobot_vlm_ros.core.images.picture_files import FORMATS

    out = asked or image.with_name(f"{image.name}.answer.png")
    Image.init()
    wrong = ""
    if Image.registered_extensions().get(out.suffix.lower()) not in FORMATS:
        wrong = "expected the name of a picture, such as answer.png"
    elif not out.parent.is_dir():
        wrong = f"there is no folder {out.parent}"
    elif not os.access(out.parent, os.W_OK):
        wrong = f"this user may not write into {out.parent}"
    elif out.is_dir() or os.path.realpath(out) == os.path.realpath(image):
        wrong = "that would replace the picture or a folder"
    if wrong:
        raise RequestError(ErrorCode.BAD_PARAMETER, f"--out is {out}: {wrong}")
    return out


def _draw(out: Path, frame: Frame, request: InferenceRequest, answer: ModelAnswer) -> None:
    """Draw the answer, under another name first, so that `out` is never half a picture."""
    from PIL import Image

    from librobot_vlm_ros.core.drawing import draw

    words = answer.text if request.spec.output == "text" else ""
    if request.spec.output == "regions" and not answer.regions:
        words = "nothing found"
    asked = f"{request.task}: {request.prompt}" if request.prompt else request.task
    caption = f"{asked}: {words}" if words else asked
    regions = answer.regions
    if request.region is not None and not regions:
        from librobot_vlm_ros.core import Region

        regions = (Region("region", float("nan"), *request.region),)
    picture = Image.fromarray(draw(frame.pixels, regions, caption, smooth=2, strip=True))
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    try:
        picture.save(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _as_dict(
    vlm: Any, frame: Frame, request: InferenceRequest, answer: ModelAnswer, out: Path
) -> dict[str, Any]:
    found = answer.embedding
    return {
        "text": answer.text,
        "score": number_or_none(answer.score),
        "regions": regions_as_dicts(answer.regions),
        "malformed": answer.malformed,
        "embedding": None if found is None else found.array.tolist(),
        "image_width": frame.width,
        "image_height": frame.height,
        "model": vlm.name,
        "revision": vlm.revision,
        "device": vlm.device,
        "dtype": vlm.dtype,
        "task": request.task,
        "prompt": request.prompt,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "preprocess_s": answer.preprocess_s,
        "inference_s": answer.inference_s,
        "picture": str(out),
    }


def _print(vlm: Any, request: InferenceRequest, answer: ModelAnswer, out: Path) -> None:
    found = answer.embedding
    print_answer(
        answer.text if request.spec.output == "text" else "",
        answer.regions,
        "" if found is None else describe_embedding(str(found.array.dtype), found.array.shape),
        f"{vlm.name} on {vlm.device} in {vlm.dtype}, {request.task}, "
        f"{answer.preprocess_s + answer.inference_s:.3f} s; drawn: {out}",
    )
