"""`librobot-vlm models`: list the models of this installation, or check them at tiny size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.console import Console, log_on_stderr
from librobot_vlm_ros.doctor.finding import gib

if TYPE_CHECKING:
    from librobot_vlm_ros.models.backend import ModelInfo
    from librobot_vlm_ros.models.testing.conformance import Conformance

SUMMARY = "list the models with size, tasks, memory, licence and weights; --check tries each"

EPILOG = """\
Memory is that of the weights alone; pictures and answers come on top. The list loads neither torch
nor weights.

--check tries each model, or those named, at tiny size without any download: the full-size
configuration is counted, a tiny checkpoint in the official layout is loaded and compared with the
original arithmetic, our pixels are compared with the reference processor's, every task is run.
Exit code 1 when one of them is not as it should be.

Examples:
  librobot-vlm models
  librobot-vlm models --check florence-2-base paligemma-3b
  librobot-vlm models --check --json
  librobot-vlm models --sha256 /models/florence
"""
_DTYPES = ("float32", "float16", "bfloat16", "int8", "nf4")
_COLUMNS = ("float32", "float16", "int8", "nf4")  # bfloat16 takes what float16 does


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments and help."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="only these models (default: all)")
    add(
        "--sha256",
        type=Path,
        metavar="FOLDER",
        help="print the sha256 of the weights in a folder, for the parameter weights_sha256",
    )
    add("--check", action="store_true", help="try the models at tiny size")
    add("--json", action="store_true", help="print one JSON document")


def main(args: argparse.Namespace) -> int:
    """Print the registry, or what the check found; 1 when a model is not as it should be."""
    from librobot_vlm_ros.models import get_vlm, list_vlms, model_info

    if args.sha256 is not None:
        get_vlm("florence-2-base")  # names a package that is missing
        from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256

        with log_on_stderr():
            print(weights_sha256(args.sha256))
        return 0
    named = [model_info(name) for name in args.names or list_vlms()]
    infos = list(dict.fromkeys(named))  # a name and its alias are one model
    if args.check:
        return _check(infos, args.json)
    return _list(infos, args.json, [name.strip().lower() for name in args.names])


def _list(infos: list[ModelInfo], as_json: bool, asked: list[str]) -> int:
    from librobot_vlm_ros.models.checkpoints.hub import weights_present

    if as_json:
        print(json.dumps([_as_dict(info, weights_present(info)) for info in infos], indent=2))
        return 0
    rows = [
        (
            info.name,
            _count(info.parameters),
            *(gib(size) if (size := info.memory_bytes(dtype)) else "-" for dtype in _COLUMNS),
            info.licence,
            _source(info),
            "yes" if weights_present(info) else "no",
        )
        for info in infos
    ]
    header = ("model", "parameters", *_COLUMNS, "licence", "weights from", "here")
    Console().table(rows, header=header, right="lrrrrrlll")
    print("\nMemory of the weights by dtype; bfloat16 as float16. Tasks:")
    for info in infos:
        print(f"{info.name}: {', '.join(info.tasks)}")
    # Hub ids are names too, but they say themselves what they are.
    short = {
        alias: info
        for info in infos
        for alias in info.aliases
        if alias in asked or (not asked and "/" not in alias)
    }
    if short:
        print("\nOther names:")
    for alias, info in short.items():
        print(f"{alias} is {info.name}: {info.description}")
    return 0


def _as_dict(info: ModelInfo, here: bool) -> dict[str, Any]:
    return {
        "name": info.name,
        "family": info.family,
        "parameters": info.parameters,
        "memory_bytes": {dtype: info.memory_bytes(dtype) for dtype in _DTYPES},
        "tasks": list(info.tasks),
        "licence": info.licence,
        "weights": info.default_pretrained or info.shipped_folder or "",
        "revision": info.pinned_revision or "",
        "weights_present": here,
        "aliases": list(info.aliases),
        "description": info.description,
    }


def _check(infos: list[ModelInfo], as_json: bool) -> int:
    from librobot_vlm_ros.models.testing.conformance import check_model

    found: list[Conformance] = []
    for info in infos:
        print(f"checking {info.name}", file=sys.stderr)
        # What a library prints must not stand inside the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            found.append(check_model(info.name))
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        rows = [
            (
                one.name,
                "-" if one.parameters is None else f"{one.parameters:,}",
                _difference(one.conversion_max_abs_diff),
                _difference(one.preprocess_max_abs_diff),
                str(len(one.tasks)),
                "ok" if one.ok else "NOT OK",
            )
            for one in found
        ]
        header = ("model", "parameters", "conversion", "pixels", "tasks", "")
        Console().table(rows, header=header, right="lrrrrl")
        print(
            f"\nLargest differences. Allowed: conversion {found[0].conversion_tolerance:g}, "
            f"pixels {found[0].preprocess_tolerance:g}; - where there is nothing to compare."
        )
    bad = [one for one in found if not one.ok]
    for one in bad:
        print(f"{one.name}: {one.error}", file=sys.stderr)
    return 1 if bad else 0


def _source(info: ModelInfo) -> str:
    if info.default_pretrained:
        return info.default_pretrained
    return "ships with the package" if info.shipped_folder else "none"


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _count(parameters: int) -> str:
    if not parameters:
        return "-"
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
