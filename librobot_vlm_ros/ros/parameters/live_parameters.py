"""The declared parameters on a real node: declared with bounds and descriptions, validated before
applied.

A wrong value at start (launch argument, parameter file) does not end the node: it is logged with
its code, and configuring fails until the parameter is set right.

rclpy 7.1.6 leaves a client's request unanswered that holds a value of no known type, takes the name
"" for a declared one, and names nothing in its refusal of an undeclared one.
`guard_parameter_services` refuses each of them as any other wrong value is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.parameter import Parameter as RosParameter

from librobot_vlm_ros.core import (
    VlmError,
    as_vlm_error,
    bad_parameter,
    escape_for_log,
    shortened,
)
from librobot_vlm_ros.models.checkpoints.path_policy import confined, open_to_clients, paths_in
from librobot_vlm_ros.ros.parameters.arguments import unknown_argument
from librobot_vlm_ros.ros.parameters.declaration import Parameter, Value, When, ros_value
from librobot_vlm_ros.ros.parameters.settings import PARAMETERS, Settings

_MOST_AT_ONCE = 256
_TYPES = frozenset(kind.value for kind in RosParameter.Type)
_NOT_OURS = ("use_sim_time", "start_type_description_service", "qos_overrides.")


class _Calling(threading.local):
    """What the thread that sets parameters is about."""

    forced = False
    """By `force`: configure-time parameters may change now."""
    quiet = False
    """By `set`: who calls it logs a refusal."""
    error: VlmError | None = None
    """The last refusal."""


class LiveParameters:
    """Declares all of `PARAMETERS` on `node` and keeps the `Settings` that they make.

    Args:
        is_unconfigured: whether parameters that take effect at configuring may change now.
        on_change: called after a change with the settings before and after, on the thread that made
        the change.
    """

    def __init__(
        self,
        node: Any,
        *,
        is_unconfigured: Callable[[], bool],
        on_change: Callable[[Settings, Settings], None],
    ) -> None:
        self._node = node
        self._is_unconfigured = is_unconfigured
        self._on_change = on_change
        self._calling = _Calling()
        self._lock = threading.Lock()
        self.errors: dict[str, VlmError] = {}
        self.settings = Settings()
        self._declare()
        self._weights_at_start = self.settings.weights
        node.add_pre_set_parameters_callback(self._tidy)
        node.add_on_set_parameters_callback(self._check)
        node.add_post_set_parameters_callback(self._apply)

    def force(self, values: Mapping[str, Value]) -> None:
        """Set parameters that follow from what the node did (a switch of models), in any state."""
        self._calling.forced = True
        try:
            self._node.set_parameters([_ros(PARAMETERS[n], value) for n, value in values.items()])
        finally:
            self._calling.forced = False

    def set(self, name: str, value: object) -> VlmError | None:
        """Set one parameter as a client would; gives the error of a refusal, and logs none."""
        self._calling.quiet, self._calling.error = True, None
        try:
            (result,) = self._node.set_parameters([RosParameter(name, value=value)])
        except Exception as error:  # a value that is of no parameter type
            return as_vlm_error(error)
        finally:
            self._calling.quiet = False
        if result.successful:
            return None
        return self._calling.error or bad_parameter(result.reason)

    def _declare(self) -> None:
        overrides = getattr(self._node, "_parameter_overrides", {})  # what was given at start
        for name, item in PARAMETERS.items():
            value = item.default
            if name in overrides:
                try:
                    self.settings = self.settings.changed(**{name: overrides[name].value})
                    value = getattr(self.settings, name)
                except VlmError as error:
                    self.errors[name] = error
                    self._node.get_logger().error(f"at start: {error}")
            # rclpy would end the process on an override of another type: it was dealt with above.
            self._node.declare_parameter(
                name, _ros(item, value).value, _descriptor(item), ignore_override=True
            )
        for name in overrides:
            if name not in PARAMETERS and not name.startswith(_NOT_OURS):
                self._node.get_logger().warning(
                    f"there is no parameter '{escape_for_log(name)}': it has no effect. "
                    f"Parameters are: {', '.join(PARAMETERS)}."
                )

    def _tidy(self, changes: list[RosParameter]) -> list[RosParameter]:
        """Give 2 for 2.0 and untyped empty lists (`ros2 param set`) their declared type."""
        tidy = []
        for change in changes:
            item = PARAMETERS.get(change.name)
            if item is not None:
                # A value that is still wrong is refused with the reason by `_check`.
                with contextlib.suppress(TypeError, ValueError):
                    change = _ros(item, item.converted(change.value))
            tidy.append(change)
        return tidy

    def _check(self, changes: list[RosParameter]) -> SetParametersResult:
        ours = {item.name: item.value for item in changes if item.name in PARAMETERS}
        try:
            self._refuse_fixed(ours)
            if not self._calling.forced:
                self._refuse_other_folders(ours)
            self.settings.changed(**ours)
        except VlmError as error:
            self._calling.error = error
            if not self._calling.quiet:
                self._node.get_logger().warning(f"parameter refused: {error}")
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _refuse_fixed(self, values: Mapping[str, object]) -> None:
        """Refuse changes that come too late. rclpy's own read-only parameters refuse the value that
        they have, too, so that a file of `ros2 param dump` could not be loaded again.
        """
        at_work = not self._calling.forced and not self._is_unconfigured()
        for name, value in values.items():
            item = PARAMETERS[name]
            if item.checked(value) == getattr(self.settings, name):
                continue
            if item.when == When.START:
                raise bad_parameter(
                    f"parameter {name} is read-only once the node has started",
                    "Start the node with another value.",
                )
            if item.when == When.CONFIGURE and at_work:
                raise bad_parameter(
                    f"parameter {name} takes effect when the node is configured",
                    "Deactivate and clean up first, or use ~/switch_model to change the model.",
                )

    def _refuse_other_folders(self, values: Mapping[str, object]) -> None:
        weights = values.get("weights")
        if isinstance(weights, str) and weights != self.settings.weights:
            confined(weights, self.open_folders())
        config = values.get("model_config")
        if isinstance(config, str) and config != self.settings.model_config:
            for path in paths_in(config):
                confined(path, self.open_folders(), "a path in model_config")

    def open_folders(self) -> tuple[Path, ...]:
        """Folders that weights may lie in which a client asks for."""
        return open_to_clients(self.settings.weights_folders, self._weights_at_start)

    def folders_of_checkpoints(self) -> tuple[Path, ...] | None:
        """Folders that the checkpoint may name other weights in: any (None) for one that the
        operator has chosen, unless he has named folders.
        """
        settings = self.settings
        if not settings.weights_folders and settings.weights == self._weights_at_start:
            return None
        return self.open_folders()

    def _apply(self, changes: list[RosParameter]) -> None:
        ours = {item.name: item.value for item in changes if item.name in PARAMETERS}
        if not ours:
            return
        with self._lock:  # a switch of the model sets parameters from another thread
            before, self.settings = self.settings, self.settings.changed(**ours)
            for name in ours:
                self.errors.pop(name, None)
        try:
            self._on_change(before, self.settings)
        except Exception as error:  # rclpy would raise it out of the executor
            self._node.get_logger().error(f"parameters set, but not applied: {as_vlm_error(error)}")


def _ros(item: Parameter, value: Value) -> RosParameter:
    return RosParameter(item.name, value=ros_value(value))


def _descriptor(item: Parameter) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(
        description=item.description,
        additional_constraints="; ".join(
            text for text in (item.bounds, f"may change {item.when.value}") if text
        ),
    )
    if item.low is not None and item.high is not None:
        if item.type_name == "integer":
            bounds = IntegerRange(from_value=int(item.low), to_value=int(item.high), step=1)
            descriptor.integer_range = [bounds]
        else:
            floats = FloatingPointRange(from_value=item.low, to_value=item.high, step=0.0)
            descriptor.floating_point_range = [floats]
    return descriptor


def guard_parameter_services(node: Any) -> None:
    """Answer the services for setting, which rclpy has made for `node`, with these checks."""

    def set_each(request: Any, response: Any) -> Any:
        response.results = _set(node, [[parameter] for parameter in request.parameters])
        return response

    def set_together(request: Any, response: Any) -> Any:
        (response.result,) = _set(node, [request.parameters])
        return response

    for service in node.services:
        if service.srv_type is SetParameters:
            service.callback = set_each
        elif service.srv_type is SetParametersAtomically:
            service.callback = set_together


def _set(node: Any, groups: Sequence[Sequence[Any]]) -> list[SetParametersResult]:
    """Set all messages of a group, or refuse all of them; a result for each group."""
    count = sum(map(len, groups))
    if count > _MOST_AT_ONCE:  # it would hold up the executor for long
        too_many = bad_parameter(
            f"{count} parameters are to be set at once, expected at most {_MOST_AT_ONCE}"
        )
        return [_refused(node, too_many)] * len(groups)
    results = []
    for group in groups:
        wrong = next(filter(None, (_wrong(node, parameter) for parameter in group)), None)
        if wrong is None:
            changes = [RosParameter.from_parameter_msg(parameter) for parameter in group]
            results.append(node.set_parameters_atomically(changes))
        else:
            results.append(_refused(node, wrong))
    return results


def _wrong(node: Any, parameter: Any) -> VlmError | None:
    name, kind = parameter.name, parameter.value.type
    if not node.has_parameter(name):
        return unknown_argument(name, sorted(node.get_parameters_by_prefix("")), "parameter")
    if kind not in _TYPES:
        return bad_parameter(
            f"the value for parameter {shortened(name)} is of type {kind}, which there is not",
            "Types are those of rcl_interfaces/msg/ParameterType.",
        )
    return None


def _refused(node: Any, error: VlmError) -> SetParametersResult:
    node.get_logger().warning(f"parameter refused: {error}")
    return SetParametersResult(successful=False, reason=str(error))
