"""Which results the example policy takes for answers to the present instruction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from librobot_vlm_ros.core import VlmError

pytestmark = pytest.mark.ros


@pytest.fixture
def present() -> Any:
    from librobot_vlm_ros.client.policy_node import PresentInstruction

    return PresentInstruction()


def info(number: int, prompt: str) -> Any:
    return SimpleNamespace(instruction_id=number, prompt=prompt)


def test_what_was_said_before_it_came_is_learnt_from_results(present: Any) -> None:
    assert present.is_answered_by(info(3, "the duck"))
    assert present.is_answered_by(info(3, "the duck"))


def test_results_of_an_older_instruction_are_refused(present: Any) -> None:
    assert present.is_answered_by(info(1, "the duck"))
    present.said("the cube")
    assert not present.is_answered_by(info(1, "the duck"))  # was under way
    assert present.is_answered_by(info(2, "the cube"))
    assert not present.is_answered_by(info(1, "the duck"))  # comes late


def test_an_old_result_that_is_the_first_one_heard_is_refused_too(present: Any) -> None:
    present.said("the cube")
    assert not present.is_answered_by(info(1, "the duck"))
    assert present.is_answered_by(info(2, " the cube".strip()))


def test_an_instruction_set_by_parameter_counts_as_well(present: Any) -> None:
    assert present.is_answered_by(info(1, "the duck"))
    assert present.is_answered_by(info(2, "the mug"))
    assert not present.is_answered_by(info(1, "the duck"))


def test_one_that_the_node_refuses_changes_nothing(present: Any) -> None:
    assert present.is_answered_by(info(1, "the duck"))
    with pytest.raises(VlmError):
        present.said("x" * 100_000)
    assert present.is_answered_by(info(1, "the duck"))


def test_tasks_with_a_prompt_of_their_own_are_no_answer(present: Any) -> None:
    assert not present.is_answered_by(info(0, "the duck"))


def test_a_restarted_node_counts_anew(present: Any) -> None:
    assert present.is_answered_by(info(7, "the duck"))
    present.node_restarted()
    assert present.is_answered_by(info(1, "the duck"))
