"""How one parameter is declared: default, bounds, description and when a change takes effect.

Free of rclpy, so that the documentation's table, the launch file's test and the command line read
the same declaration that the node does. What the node has is declared in `settings.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from librobot_vlm_ros.core import RequestError, bad_parameter, shortened

Value = bool | int | float | str | tuple[str, ...]
_KEY = "ros_parameter"


def ros_value(value: object) -> object:
    """A value as rclpy and launch_ros take it: to them an empty list is one of no type. Blank
    entries are left out again by `Parameter.converted`.
    """
    return list(value) or [""] if isinstance(value, tuple) else value


class When(str, Enum):
    """When a parameter may change."""

    LIVE = "any time"
    CONFIGURE = "while unconfigured"
    START = "at start only"


@dataclass(frozen=True)
class Parameter:
    """One ROS parameter. Its type is that of its default; a tuple of strings is `string_array`."""

    name: str
    default: Value
    description: str
    when: When
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    """Regular expression that the whole string must match."""
    expected: str = ""
    """What `pattern` asks for, in words."""
    reason: str = ""
    """Why nothing else is taken, where that is not plain; told with the error."""
    examples: tuple[str, ...] = ()
    """Values as one types them behind `name:=`, for those that the default does not explain."""

    @property
    def type_name(self) -> str:
        """The type as ROS tools name it."""
        if isinstance(self.default, bool):
            return "bool"
        names = {int: "integer", float: "double", str: "string", tuple: "string_array"}
        return names[type(self.default)]

    @property
    def bounds(self) -> str:
        """The bounds in words, "" where there are none."""
        if self.choices:
            return ", ".join(self.choices)
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return self.expected

    def checked(self, value: object) -> Value:
        """`value` as this parameter holds it. Raises `RequestError` (BAD_PARAMETER)."""
        found: Value = self.converted(value)
        right = type(found) is type(self.default)
        if isinstance(found, tuple):
            right = right and all(isinstance(entry, str) for entry in found)
        if not right:
            raise self._error(found, f"expected {_ARTICLE[self.type_name]}")
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            low = -math.inf if self.low is None else self.low
            high = math.inf if self.high is None else self.high
            if not (math.isfinite(found) and low <= found <= high):  # NaN is in no interval
                raise self._error(found, f"expected {self.bounds or 'a finite number'}")
        if self.choices and found not in self.choices:
            raise self._error(found, f"expected one of {', '.join(self.choices)}")
        if self.pattern and re.fullmatch(self.pattern, str(found)) is None:
            why = f" ({self.reason})" if self.reason else ""
            raise self._error(found, f"expected {self.expected}{why}")
        return found

    def converted(self, value: Any) -> Any:
        """`value` with the differences of notation removed, otherwise as it is, right or wrong.

        An integer is taken where a double is expected (`rate:=2`), and an empty list of any element
        type where a list of strings is; blank entries of a list are left out.
        """
        if self.type_name == "double" and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.type_name == "string_array" and isinstance(value, (list, tuple)):
            entries = [entry.strip() if isinstance(entry, str) else entry for entry in value]
            return tuple(entry for entry in entries if entry != "")
        return value

    def parsed(self, text: str) -> Value:
        """A value from a command line, checked. Raises `RequestError` (BAD_PARAMETER).

        A list is written `[a, b]` (YAML, for entries with commas in them) or plainly `a, b`.
        """
        value: object = text
        try:
            if self.type_name == "bool":
                value = {"true": True, "false": False}.get(text.strip().lower(), text)
            elif self.type_name == "integer":
                value = int(text)
            elif self.type_name == "double":
                value = float(text)
            elif self.type_name == "string_array":
                value = _list(text)
        except ValueError:
            pass  # `checked` says what was expected
        return self.checked(value)

    def _error(self, value: object, expected: str) -> RequestError:
        shown = f"'{shortened(value)}'" if isinstance(value, str) else shortened(value)
        return bad_parameter(
            f"parameter {self.name} is {shown}, {expected}", f"Example: {self.name}:={self.example}"
        )

    @property
    def example(self) -> str:
        """The default as one writes it on a command line."""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return "[" + ", ".join(f"'{entry}'" for entry in self.default) + "]"
        return str(self.default) or "''"


_ARTICLE = {
    "bool": "true or false",
    "integer": "an integer",
    "double": "a number",
    "string": "a string",
    "string_array": "a list of strings",
}


def _list(text: str) -> list[object]:
    """`[a, b]` as YAML reads it, or what stands between commas."""
    if not text.lstrip().startswith("["):
        return list(text.split(","))
    import yaml  # comes with rclpy

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return value if isinstance(value, list) else [value]


def parameter(default: Value, description: str, when: When, **bounds: Any) -> Any:
    """Declares one parameter as a field of a frozen dataclass; its name is the parameter's."""
    spec = {"default": default, "description": description, "when": when, **bounds}
    return dataclasses.field(default=default, metadata={_KEY: spec})


def declared(settings_class: type) -> Mapping[str, Parameter]:
    """Every parameter of the dataclass by name, in order of declaration."""
    return {
        field.name: Parameter(name=field.name, **field.metadata[_KEY])
        for field in dataclasses.fields(settings_class)
        if _KEY in field.metadata
    }


def parameter_table(parameters: Mapping[str, Parameter]) -> str:
    """The parameters as a Markdown table, that of docs/parameters.md (a test compares them)."""
    rows = ["| parameter | type | default | bounds | change | meaning |", "| --- " * 6 + "|"]
    for item in parameters.values():
        bounds = item.bounds.replace("|", "\\|")
        rows.append(
            f"| `{item.name}` | {item.type_name} | `{item.example}` | {bounds} "
            f"| {item.when.value} | {item.description} |"
        )
    return "\n".join(rows) + "\n"
