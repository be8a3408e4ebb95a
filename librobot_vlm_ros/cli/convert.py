"""`librobot-vlm convert`: official checkpoints in transformers' native layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from librobot_vlm_ros.console import log_on_stderr

SUMMARY = "write a checkpoint anew in transformers' native layout, and prove it equal"

EPILOG = """\
SOURCE is a folder (official or native layout), a hub id (owner/name or owner/name@revision), or a
registered model. OUT holds safetensors, tokenizer and image settings; the node loads it by
weights:=OUT, and so does transformers' own from_pretrained. It is written as OUT.partial, loaded
back, compared tensor by tensor, and only then renamed. The whole model must fit into memory.

Examples:
  librobot-vlm convert ./Florence-2-base ./florence-native
  librobot-vlm convert liuhaotian/llava-v1.5-7b /models/llava --dtype bfloat16
  librobot-vlm convert qwen2-vl-2b /models/mine --adapter ./my-lora --overwrite
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, hub id or registered model")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add("--model", default="", help="the registered model it is, if not obvious")
    add("--dtype", default="", help="float32, float16, bfloat16 (default: as it is stored)")
    add("--adapter", type=Path, metavar="FOLDER", help="merge this LoRA of peft into the weights")
    add("--overwrite", action="store_true", help="replace OUT if it is there")
    add("--json", action="store_true", help="print what was written as JSON")


def main(args: argparse.Namespace) -> int:
    """Convert, and print what was written."""
    from librobot_vlm_ros.models import get_vlm
    from librobot_vlm_ros.models.checkpoints.conversion import convert_folder

    get_vlm("florence-2-base")  # names a package that is missing
    with log_on_stderr():
        done = convert_folder(
            args.source,
            args.out,
            model=args.model,
            dtype=args.dtype,
            adapter=args.adapter,
            overwrite=args.overwrite,
        )
    if args.json:
        print(json.dumps({**dataclasses.asdict(done), "folder": str(done.folder)}, indent=2))
        return 0
    print(
        f"{done.folder}: {done.model} from {done.layout}, {done.parameters:,} parameters in "
        f"{done.dtype}, {done.bytes / 1e6:,.1f} MB\n"
        f"read back: {done.tensors} tensors, all equal\nsha256 {done.sha256}"
    )
    return 0
