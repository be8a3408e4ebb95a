"""The command: which rows, where they go, and how it ends."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

EPILOG = """\
Both sides get the same inputs in turns; what counts is the ratio. The folder OUT gets summary.json,
a table and a plot. Exit code 1 when a row failed or tokens differ in full precision.

Examples:
  librobot-vlm bench
  librobot-vlm bench --only tabletop --pairs 3 --out build/quick
  librobot-vlm bench --device cuda
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options, shared with `librobot-vlm bench`."""
    parser.epilog = EPILOG
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/bench"),
        help="folder to write (default build/bench)",
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs a row (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.add_argument("--only", default="", help="rows whose group has one of these words in it")
    parser.add_argument(
        "--within", type=float, default=460.0, help="seconds after which no group is begun"
    )


def _groups(cuda: bool) -> dict[str, Callable[..., None]]:
    from librobot_vlm_ros.bench import decoding, frames, memory, structured

    groups: dict[str, Callable[..., None]] = {}
    if cuda:
        groups["full-size-florence"] = decoding.florence_base
        groups["full-size-qwen"] = decoding.qwen_2b
        groups["full-size-7b"] = decoding.seven_b
    return {
        **groups,
        "deep-decoder": decoding.deep_decoder,
        "tabletop": frames.tabletop,
        "florence": decoding.florence,
        "families": decoding.families,
        "structured": structured.structured,
        "one-frame": frames.one_frame,
        "preprocessing": frames.preprocessing,
        "loading": memory.loading,
        "growth": memory.growth,
        "start": memory.starting,
    }


def run(args: argparse.Namespace) -> int:
    """Measure, write, print; 1 where something failed or tokens differ in full precision."""
    import torch
    from transformers.utils import logging as transformers_logging

    from librobot_vlm_ros.bench import report
    from librobot_vlm_ros.bench.measure import Bench

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.device, args.pairs)
    started = time.monotonic()
    for name, measure in _groups(bench.cuda).items():
        if args.only and not any(word in name for word in args.only.split(",")):
            continue
        if time.monotonic() - started > args.within:
            bench.failures.append(f"{name}: not begun, the time was up")
            continue
        try:
            measure(bench)
        except Exception as error:  # one group must not take the others with it
            bench.failures.append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name} failed: {error}", file=sys.stderr)
    report.write(args.out, bench.rows, args.device, bench.failures)
    print()
    print(report.table(bench.rows))
    for failure in bench.failures:
        print(f"failed: {failure}")
    spent = time.monotonic() - started
    print(f"{spent:.0f} s; {args.out}/summary.json, table.txt and plot.svg")
    differ = any(row.identical_tokens is False for row in bench.rows) and not bench.cuda
    return 1 if bench.failures or differ or not bench.rows else 0


def main() -> int:
    """`python -m librobot_vlm_ros.bench`."""
    parser = argparse.ArgumentParser(prog="python -m librobot_vlm_ros.bench", description=__doc__)
    configure(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
