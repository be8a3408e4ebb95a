"""Entry point of `librobot-vlm`: finds the subcommand, turns errors into codes and exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import Any

from librobot_vlm_ros import __version__
from librobot_vlm_ros.client import signals
from librobot_vlm_ros.ros.third_party import let_libraries_warn

#: Subcommands in the order of the help; each is a module of this folder (`_` for `-`) with
#: `SUMMARY`, `EPILOG`, `configure(parser)` and `main(args) -> exit code`.
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

_LAUNCH_WORD = re.compile(r"\b([a-z][a-z0-9_]*):=(\S+)")
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
    let_libraries_warn()
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode must not end a run
            stream.reconfigure(errors="replace")
    if sys.stderr is None:  # closed: nobody wants to read what is printed there
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    if sys.stdout is None:
        return _report(command, _closed(), ())
    restore_signals = signals.install()
    flags: Collection[str] = ()
    try:
        parser, children, modules = _parser(words)
        if command not in children:
            parser.parse_args(words)  # ends with --help, --version and wrong usage
            parser.print_help()
            return 2
        flags = children[command]._option_string_actions
        # Not by `parser`: options may stand between the words, and usage is that of the command.
        args = children[command].parse_intermixed_args(words[1:])
        code = int(modules[command].main(args))
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
        return _report(command, error, flags)
    finally:
        restore_signals()


def _parser(
    words: Sequence[str],
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser], dict[str, Any]]:
    """The whole parser, that of each command, and the commands' modules."""
    parser = argparse.ArgumentParser(
        prog="librobot-vlm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"librobot-vlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    children: dict[str, argparse.ArgumentParser] = {}
    modules: dict[str, Any] = {}
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
        child = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if [name] == list(words[:1]):
            module.configure(child)
        children[name], modules[name] = child, module
    return parser, children, modules


def _report(command: str, error: Exception, flags: Collection[str]) -> int:
    """Print a coded error; with its traceback when it is a defect of ours."""
    from librobot_vlm_ros.core import ErrorCode, as_vlm_error
    from librobot_vlm_ros.ros.rcl_errors import coded_rcl_error

    coded = coded_rcl_error(error) or as_vlm_error(error)
    if coded.code == ErrorCode.INTERNAL:
        traceback.print_exception(type(error), error, error.__traceback__)
    if coded.code == ErrorCode.MISSING_DEPENDENCY and _is_of_ros(error):
        coded = type(coded)(
            coded.code,
            f"{command} needs ROS 2 and this package's messages, and they cannot be imported here "
            f"({str(error).splitlines()[0]})",
            "Source the ROS 2 installation and the workspace: source install/setup.bash. "
            "ask, models, convert and doctor work without.",
        )
    coded = type(coded)(coded.code, coded.message, in_flags(coded.hint, flags))
    print(f"librobot-vlm {command}: {coded}", file=sys.stderr)
    return 1


def in_flags(hint: str, flags: Collection[str]) -> str:
    """A hint with `name:=value`, as launch files and `run` take it, in the flags that the command
    has: `--name value`. Names without a flag stay.
    """

    def written(found: re.Match[str]) -> str:
        flag = f"--{found[1].replace('_', '-')}"
        return f"{flag} {found[2]}" if flag in flags else found[0]

    return _LAUNCH_WORD.sub(written, hint)


def _closed() -> Exception:
    """The error for a closed standard output, raised before any work: nobody could read the answer,
    and the next file that is opened would get its number and with it what libraries print.
    """
    from librobot_vlm_ros.core import ErrorCode, RequestError

    return RequestError(
        ErrorCode.BAD_PARAMETER,
        "standard output is closed, expected a place for the answer",
        "Leave it open, or print to nowhere: >/dev/null.",
    )


def _is_of_ros(error: Exception) -> bool:
    """Whether an import failed because no ROS is sourced, or not all of it is there."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__
    if cause is None:
        return False
    package, _, rest = (cause.name or "").partition(".")
    ours = package == "librobot_vlm_ros" and rest in ("msg", "srv", "action")
    foreign = package in ("rclpy", "rpyutils") or package.endswith(("_msgs", "_interfaces"))
    return ours or foreign or "rclpy" in str(cause) or "rosidl" in str(cause)
