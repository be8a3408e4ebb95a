"""The declared parameters on a real node: declared with bounds and descriptions, validated before
applied.

A wrong value at start (launch argument, parameter file) does not end the node: it is logged with
its code, and configuring fails until the parameter is set right.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.parameter import Parameter as RosParameter

from librobot_vlm_ros.core import ErrorCode, RequestError, VlmError, as_vlm_error, escape_for_log
from librobot_vlm_ros.models.checkpoints.path_policy import confined, open_to_clients, paths_in
from librobot_vlm_ros.ros.parameters.declaration import Parameter, Value, When
from librobot_vlm_ros.ros.parameters.settings import PARAMETERS, Settings

__all__ = ["LiveParameters"]

_NOT_OURS = ("use_sim_time", "start_type_description_service", "qos_overrides.")


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
        self._refused = threading.local()  # what `set` gives back
        self._forced = (
            threading.local()
        )  # `force` lets configure-time parameters through on its thread
        self._lock = threading.Lock()
        self.errors: dict[str, VlmError] = {}
        self.settings = Settings()
        self._declare()
        self._weights_at_start = self.settings.weights
        node.add_pre_set_parameters_callback(self._tidy)
        node.add_on_set_parameters_callback(self._check)
        node.add_post_set_parameters_callback(self._apply)

    def force(self, values: Mapping[str, Value]) -> None:
        """Set parameters that follow from what the node did, whatever its state (the model after a
        switch).
        """
        self._forced.now = True
        try:
            self._node.set_parameters([_ros(PARAMETERS[n], value) for n, value in values.items()])
        finally:
            self._forced.now = False

    def set(self, name: str, value: object) -> VlmError | None:
        """Set one parameter as a client would; the error when it is refused, which is the caller's
        to log.
        """
        self._refused.quiet, self._refused.error = True, None
        try:
            (result,) = self._node.set_parameters([RosParameter(name, value=value)])
        except Exception as error:  # a value that is of no parameter type
            return as_vlm_error(error)
        finally:
            self._refused.quiet = False
        if result.successful:
            return None
        refused: VlmError | None = self._refused.error
        return refused or RequestError(ErrorCode.BAD_PARAMETER, result.reason)

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
        """`ros2 param set` sends 2 for 2.0 and an untyped empty list: give them their declared
        type.
        """
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
            self._refuse_start_only(ours)
            if not getattr(self._forced, "now", False) and not self._is_unconfigured():
                self._refuse_configure_time(ours)
            if not getattr(self._forced, "now", False):
                self._refuse_other_folders(ours)
            self.settings.changed(**ours)
        except VlmError as error:
            self._refused.error = error
            if not getattr(self._refused, "quiet", False):
                self._node.get_logger().warning(f"parameter refused: {error}")
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _refuse_start_only(self, values: Mapping[str, object]) -> None:
        """rclpy's own read-only parameters refuse the value that they have, too, so that a file of
        `ros2 param dump` could not be loaded again.
        """
        for name, value in values.items():
            item = PARAMETERS[name]
            if item.when == When.START and item.checked(value) != getattr(self.settings, name):
                raise RequestError(
                    ErrorCode.BAD_PARAMETER,
                    f"parameter {name} is read-only once the node has started",
                    "Start the node with another value.",
                )

    def _refuse_configure_time(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            item = PARAMETERS[name]
            same = item.checked(value) == getattr(self.settings, name)
            if item.when == When.CONFIGURE and not same:
                raise RequestError(
                    ErrorCode.BAD_PARAMETER,
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
    if isinstance(value, tuple):
        # rclpy takes an empty list for one of bytes; blank entries are left out again by `checked`.
        return RosParameter(item.name, RosParameter.Type.STRING_ARRAY, list(value) or [""])
    return RosParameter(item.name, value=value)


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
