"""Clients that set what there is not get an answer that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def vlm(start_vlm: Callable[..., Any]) -> Any:
    made = start_vlm()
    made.wait_for_state("unconfigured")
    return made


@pytest.fixture(params=["set_parameters", "set_parameters_atomically"])
def send(request: Any, vlm: Any) -> Callable[..., list[tuple[bool, str]]]:
    """`send((name, value), ...)`: success and reason of each, or of all together."""
    from rcl_interfaces.msg import Parameter, ParameterValue
    from rcl_interfaces.srv import SetParameters, SetParametersAtomically

    together = request.param.endswith("atomically")
    service = SetParametersAtomically if together else SetParameters

    def sent(*asked: tuple[str, dict[str, Any]]) -> list[tuple[bool, str]]:
        parameters = [Parameter(name=name, value=ParameterValue(**value)) for name, value in asked]
        answer = vlm.call(service, request.param, parameters=parameters)
        results = [answer.result] if together else answer.results
        return [(result.successful, result.reason) for result in results]

    return sent


WORDS = {"type": 4, "string_value": "red cube"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("instruction", {"type": 77}, "is of type 77, which there is not"),
        ("instrution", WORDS, "there is no parameter 'instrution'. Did you mean instruction?"),
        ("", WORDS, "there is no parameter ''. Known: "),
        ("a\nb", WORDS, "there is no parameter 'a\\nb'. Known: "),
        ("x" * 2**20, WORDS, "there is no parameter 'xxx"),
        ("model_config", {"type": 4, "string_value": '{"a":' + "[" * 100_000}, "model_config"),
        ("tasks", {"type": 9, "string_array_value": ["a" + " " * 100_000 + "!"]}, "tasks entry"),
        ("weights_sha256", {"type": 9, "string_array_value": ["0" * 64] * 2000}, "2000 entries"),
        ("device", {"type": 4, "string_value": "gp\nu"}, "parameter device is 'gp\\nu'"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(
    vlm: Any, send: Callable[..., Any], name: str, value: dict[str, Any], said: str
) -> None:
    ((successful, reason),) = send((name, value))
    assert not successful
    assert reason.startswith("BAD_PARAMETER(204)")
    assert said in reason
    assert len(reason) < 2000
    assert "Traceback" not in vlm.log()


def test_one_wrong_value_spoils_no_other_but_where_all_go_together(
    vlm: Any, send: Callable[..., Any]
) -> None:
    assert vlm.set_parameters(instruction="") == []
    results = send(("nothing", WORDS), ("instruction", WORDS), ("min_score", {"type": 99}))
    each = len(results) == 3
    assert [successful for successful, _ in results] == ([False, True, False] if each else [False])
    assert vlm.get_parameter("instruction") == ("red cube" if each else "")


def test_more_at_once_than_anybody_has_are_refused_together(send: Callable[..., Any]) -> None:
    results = send(*[("instruction", WORDS)] * 300)
    assert {successful for successful, _ in results} == {False}
    assert {"300 parameters are to be set at once" in reason for _, reason in results} == {True}


def test_right_values_are_set_in_their_order(vlm: Any, send: Callable[..., Any]) -> None:
    assert {done for done, _ in send(("instruction", WORDS), ("min_score", _float(0.5)))} == {True}
    assert vlm.get_parameter("instruction") == "red cube"
    assert vlm.get_parameter("min_score") == 0.5
    assert {done for done, _ in send(("min_score", _float(0.1)), ("min_score", _float(0.0)))} == {
        True
    }
    assert vlm.get_parameter("min_score") == 0.0


def _float(value: float) -> dict[str, Any]:
    return {"type": 3, "double_value": value}
