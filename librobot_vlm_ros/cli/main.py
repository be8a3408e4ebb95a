"""Entry point of `librobot-vlm`: finds the subcommand, turns errors into codes and exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from librobot_vlm_ros import __version__

from . import signals

__all__ = ["COMMANDS", "main"]

#: Subcommands in the order of the help; each is a module of this folder (`_` for `-`) with
#: `SUMMARY`, `configure(parser)` and `main(args) -> exit code`.
COMMANDS = (
    "run",
    "demo",
    "replay",
    "annotate",
    "query",
    "ask",
    "models",
    "convert",
    "doctor",
    "bench",
    "example-policy",
)

_DESCRIPTION = """\
Vision-language perception for ROS 2: cameras and instructions in, captions, grounded regions and
embeddings out.
"""
_EPILOG = """\
`librobot-vlm COMMAND --help` explains a command. First steps:

  librobot-vlm demo                          see it work, with the model and the bag that ship
  librobot-vlm run model:=florence-2-base image_topic:=/camera/image_raw
  librobot-vlm query detect                  ask the running node about the newest frame
  librobot-vlm ask photo.jpg --task detect   ask about a picture, without a node
  librobot-vlm doctor                        what is missing on this machine, and how to get it

Errors are printed as NAME(code): what was wrong, what was expected, what to do. Codes are stable
and listed in msg/ErrorCode.msg.

Exit codes: 0 done, 1 failed (the error says why), 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, modules = _parser(words)
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 2
    module = modules[args.command]
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without Unicode must not end a run
        sys.stdout.reconfigure(errors="replace")
    let_signals_go = signals.catch()
    try:
        code = int(module.main(args))
        sys.stdout.flush()  # here, where a reader that has gone is still expected
        return code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except signals.Terminated:
        return 143
    except BrokenPipeError:  # `librobot-vlm models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(args.command, error)
    finally:
        let_signals_go()


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="librobot-vlm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"librobot-vlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    wanted = next((word for word in words if not word.startswith("-")), None)
    modules: dict[str, Any] = {}
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
        child = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == wanted:
            module.configure(child)
        modules[name] = module
    return parser, modules


def _report(command: str, error: Exception) -> int:
    """Print a coded error; with its traceback when it is a defect of ours."""
    from librobot_vlm_ros.core import ErrorCode, as_vlm_error

    coded = as_vlm_error(error)
    if coded.code == ErrorCode.INTERNAL:
        traceback.print_exception(type(error), error, error.__traceback__)
    print(f"librobot-vlm {command}: {coded}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
