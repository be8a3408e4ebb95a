"""`librobot-vlm models`: what this installation knows."""

from __future__ import annotations

import argparse
import json

SUMMARY = "list the models, their size, tasks and where their weights come from"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    parser.epilog = "Neither torch nor weights are loaded for this."
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the registry."""
    from librobot_vlm_ros.models import list_vlms, model_info
    from librobot_vlm_ros.ros.weights_here import weights_present

    from .console import table

    infos = [model_info(name) for name in list_vlms()]
    if args.json:
        listed = [
            {
                "name": info.name,
                "family": info.family,
                "parameters": info.parameters,
                "memory_bytes": {
                    dtype: info.memory_bytes(dtype) for dtype in ("float32", "float16")
                },
                "tasks": list(info.tasks),
                "licence": info.licence,
                "weights": info.default_pretrained or info.shipped_folder or "",
                "revision": info.pinned_revision or "",
                "weights_present": weights_present(info),
                "aliases": list(info.aliases),
                "description": info.description,
            }
            for info in infos
        ]
        print(json.dumps(listed, indent=2))
        return 0
    rows = [
        (
            info.name,
            _count(info.parameters),
            _bytes(info.memory_bytes()),
            info.licence,
            info.default_pretrained
            or ("ships with the package" if info.shipped_folder else "none"),
            "yes" if weights_present(info) else "no",
        )
        for info in infos
    ]
    header = ("model", "parameters", "fp16 memory", "licence", "weights", "here")
    print(table(rows, header=header, right="lrrlll"))
    print()
    for info in infos:
        print(f"{info.name}: {', '.join(info.tasks)}")
    return 0


def _count(parameters: int) -> str:
    if not parameters:
        return "-"
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _bytes(count: int) -> str:
    if not count:
        return "-"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
