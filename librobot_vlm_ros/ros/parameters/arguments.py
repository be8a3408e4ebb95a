"""`name:=value` arguments, the same for `ros2 launch` and `librobot-vlm run`, made from the
declared parameters.

An argument that is not given is not passed on, so that a parameter file keeps its say.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import BagError, ErrorCode, RequestError, bad_parameter, shortened
from librobot_vlm_ros.ros.parameters.declaration import Parameter, Value, When
from librobot_vlm_ros.ros.parameters.settings import PARAMETERS, Settings

LAUNCH_PARAMETERS = (
    "model",
    "weights",
    "model_config",
    "device",
    "dtype",
    "quantization",
    "image_topic",
    "image_transport",
    "cameras",
    "tasks",
    "instruction",
    "annotated",
    "lock_step",
    "autostart",
)
"""Parameters that `vlm.launch.py` takes as arguments; all others come in a `params_file`."""

_SIM_TIME = Parameter("use_sim_time", False, "Take the time from /clock.", When.START)
_LONGEST_NEAR = 64
_LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")


ENCLAVE_VARIABLE = "ROS_SECURITY_ENCLAVE_OVERRIDE"
"""Where it is set, rcl goes by it and not by `--enclave`."""


@dataclass(frozen=True)
class Argument:
    """One argument of the launch file and of `librobot-vlm run`."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


EXTRA_ARGUMENTS = (
    Argument(
        "namespace", "", "Namespace of the node, such as /front: its topics become /front/vlm/..."
    ),
    Argument(
        "params_file",
        "",
        "YAML file of parameters for the node; arguments that are given here win over it.",
    ),
    Argument(
        "transport",
        "images",
        "images: shared memory large enough for images and an allocator that keeps it; "
        "default: leave both as they are.",
        ("images", "default"),
    ),
    Argument(
        "enclave",
        "",
        f"SROS2 enclave of the node, such as /vlm; left out, what {ENCLAVE_VARIABLE} says.",
    ),
    Argument("use_sim_time", "false", _SIM_TIME.description, ("true", "false")),
    Argument("log_level", "info", "What the node logs.", _LOG_LEVELS),
)


def arguments(names: Iterable[str] = tuple(PARAMETERS)) -> tuple[Argument, ...]:
    """Arguments for these parameters, then the others; here `autostart` is on by default."""
    made = []
    for name in names:
        item = PARAMETERS[name]
        choices = ("true", "false") if item.type_name == "bool" else item.choices
        default = "true" if name == "autostart" else _shown(item)
        made.append(Argument(name, default, _explained(item), choices))
    return (*made, *EXTRA_ARGUMENTS)


def _explained(item: Parameter) -> str:
    """The description with bounds and examples; choices are shown by whoever shows the argument."""
    text = item.description.replace("`", "")
    if item.bounds and not item.choices:
        text += f" Expected: {item.bounds}."
    if item.examples:
        examples = " or ".join(f"{item.name}:={shlex.quote(value)}" for value in item.examples)
        text += f" Example: {examples}"
    return text


def _shown(item: Parameter) -> str:
    """The default as it is easiest to read and can be typed again."""
    if isinstance(item.default, tuple):
        return ", ".join(item.default)
    return item.example if item.default != "" else ""


def split_arguments(words: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """`name:=value` words as a dictionary. Raises `RequestError` (BAD_PARAMETER)."""
    known = tuple(names)
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition(":=")
        if not separator:
            raise bad_parameter(
                f"argument '{shortened(word)}' is not of the form name:=value",
                "Example: model:=florence-2-base image_topic:=/camera/image_raw",
            )
        if name not in known:
            raise unknown_argument(name, known)
        found[name] = value
    return found


def near_arguments(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `name` may be a misspelling of."""
    if len(name) > _LONGEST_NEAR:  # comparing takes long, and nobody misspells so
        return []
    return difflib.get_close_matches(name, tuple(known), n=3)


def unknown_argument(name: str, known: Iterable[str], what: str = "argument") -> RequestError:
    """The error for an argument (or `what`) that does not exist, with those that come near."""
    names = tuple(known)
    near = near_arguments(name, names)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names)}."
    return bad_parameter(f"there is no {what} '{shortened(name)}'", hint)


def parse_values(texts: Mapping[str, str]) -> dict[str, Value]:
    """Parameter values from their texts, all of them checked together. Raises `RequestError`.

    A list is written `[a, b]` or `a, b`; a boolean `true` or `false`.
    """
    for name, text in texts.items():
        # Python keeps bytes that the locale cannot read as lone surrogates.
        if text.encode(errors="ignore").decode() != text:
            raise bad_parameter(
                f"argument {name} cannot be read as text in this locale: '{shortened(text)}'",
                "Use a UTF-8 locale: LC_ALL=C.UTF-8.",
            )
    values: dict[str, Any] = {
        name: PARAMETERS[name].parsed(text) for name, text in texts.items() if name in PARAMETERS
    }
    Settings(**values)
    if "use_sim_time" in texts:
        values["use_sim_time"] = _SIM_TIME.parsed(texts["use_sim_time"])
    return values


def ros_arguments(texts: Mapping[str, str]) -> list[str]:
    """What the node's process is given besides the parameter values: `--ros-args ...`.

    `autostart` is on unless the parameter file says otherwise. Raises `VlmError`.
    """
    words = ["--ros-args", "-p", "autostart:=true"]
    if texts.get("params_file"):
        words += ["--params-file", str(existing_file(texts["params_file"]))]
    namespace = "".join(f"/{part}" for part in texts.get("namespace", "").split("/") if part)
    if namespace:
        words += ["-r", f"__ns:={namespace}"]
    for item in EXTRA_ARGUMENTS:
        text = texts.get(item.name, item.default)
        if item.choices and text not in item.choices:
            raise bad_parameter(
                f"{item.name} is '{shortened(text)}', expected one of {', '.join(item.choices)}"
            )
    if texts.get("enclave"):
        words += ["--enclave", texts["enclave"]]
    if "log_level" in texts:
        words += ["--log-level", f"{logger_name(namespace)}:={texts['log_level']}"]
    return words


def logger_name(namespace: str) -> str:
    """Name of the node's logger, to set its level and leave those of rcl and DDS alone."""
    return ".".join([*filter(None, namespace.split("/")), "vlm"])


def given_arguments(
    texts: Mapping[str, str], said: Iterable[str], known: Iterable[Argument]
) -> dict[str, str]:
    """Those that somebody asked for: said on the command line, or other than the default.

    What nobody asked for is left to the parameter file and to the node's own defaults.
    """
    names = set(said)
    return {
        item.name: texts[item.name]
        for item in known
        if item.name in names or texts[item.name] != item.default
    }


def existing_file(name: str) -> Path:
    """The file of that name. Raises `BagError` (FILE_NOT_FOUND)."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise BagError(
            ErrorCode.FILE_NOT_FOUND,
            f"params_file '{shortened(name)}' is no file",
            "Give the path of a YAML parameter file.",
        )
    return path
