"""What clients ask of the parameter services and rclpy answers badly, or not at all.

rclpy 7.1.6 leaves a request unanswered that holds a value of no known type, takes the name "" for a
declared one, and names nothing in its refusal of an undeclared one. Here each of them is refused
as any other wrong value is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.parameter import Parameter as RosParameter

from librobot_vlm_ros.core import ErrorCode, RequestError, VlmError, shortened
from librobot_vlm_ros.ros.parameters.arguments import unknown_argument

__all__ = ["guard_parameter_services"]

_MOST_AT_ONCE = 256
_TYPES = frozenset(kind.value for kind in RosParameter.Type)


def guard_parameter_services(node: Any) -> None:
    """Put the checks in front of the services for setting that `node` has made of its own."""
    for service in node.services:
        if service.srv_type is SetParameters:
            service.callback = partial(_set_each, node, service.callback)
        elif service.srv_type is SetParametersAtomically:
            service.callback = partial(_set_together, node, service.callback)


def _set_each(node: Any, answer: Callable[..., Any], request: Any, response: Any) -> Any:
    if too_many := _too_many(request):
        response.results = [_refused(node, too_many)] * len(request.parameters)
        return response
    for parameter in request.parameters:
        wrong = _wrong(node, parameter)
        if wrong is None:
            one = answer(SetParameters.Request(parameters=[parameter]), SetParameters.Response())
            response.results.extend(one.results)
        else:
            response.results.append(_refused(node, wrong))
    return response


def _set_together(node: Any, answer: Callable[..., Any], request: Any, response: Any) -> Any:
    if too_many := _too_many(request):
        response.result = _refused(node, too_many)
        return response
    for parameter in request.parameters:
        wrong = _wrong(node, parameter)
        if wrong is not None:
            response.result = _refused(node, wrong)
            return response
    return answer(request, response)


def _too_many(request: Any) -> VlmError | None:
    """Nothing else is answered meanwhile."""
    count = len(request.parameters)
    if count <= _MOST_AT_ONCE:
        return None
    return RequestError(
        ErrorCode.BAD_PARAMETER,
        f"{count} parameters are to be set at once, expected at most {_MOST_AT_ONCE}",
    )


def _wrong(node: Any, parameter: Any) -> VlmError | None:
    name, kind = parameter.name, parameter.value.type
    if not node.has_parameter(name):
        return unknown_argument(name, sorted(node.get_parameters_by_prefix("")), "parameter")
    if kind not in _TYPES:
        return RequestError(
            ErrorCode.BAD_PARAMETER,
            f"the value for parameter {shortened(name)} is of type {kind}, which there is not",
            "Types are those of rcl_interfaces/msg/ParameterType.",
        )
    return None


def _refused(node: Any, error: VlmError) -> SetParametersResult:
    node.get_logger().warning(f"parameter refused: {error}")
    return SetParametersResult(successful=False, reason=str(error))
