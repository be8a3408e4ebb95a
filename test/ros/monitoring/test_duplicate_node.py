"""Another node of the same name is said, once it is sure to be there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from librobot_vlm_ros.ros.monitoring.duplicate_node import DuplicateNodeCheck


class Graph:
    """A node's view of the graph."""

    def __init__(self) -> None:
        self.nodes = [("vlm", "/front"), ("vlm", "/rear"), ("camera", "/front")]
        self.said: list[str] = []
        self.logger = SimpleNamespace(warning=self.said.append, info=self.said.append)

    def get_name(self) -> str:
        return "vlm"

    def get_namespace(self) -> str:
        return "/front"

    def get_fully_qualified_name(self) -> str:
        return "/front/vlm"

    def get_node_names_and_namespaces(self) -> list[tuple[str, str]]:
        return self.nodes

    def get_logger(self) -> SimpleNamespace:
        return self.logger


@pytest.fixture
def graph() -> Graph:
    return Graph()


def test_a_name_in_another_namespace_is_none_of_ours(graph: Graph) -> None:
    looked = DuplicateNodeCheck(graph, ghost_s=0.0)
    looked.check()
    assert not looked.problem
    assert not graph.said


def test_a_lasting_duplicate_is_said_once_with_what_to_do_and_its_end(
    graph: Graph,
) -> None:
    now = [100.0]
    looked = DuplicateNodeCheck(graph, ghost_s=30.0, clock=lambda: now[0])
    graph.nodes.append(("vlm", "/front"))
    for now[0] in (100.0, 115.0, 129.0):
        looked.check()
        assert not looked.problem  # may be a process that was killed and is still listed
    for now[0] in (130.0, 131.0):
        looked.check()
        assert looked.problem.startswith("2 nodes are called /front/vlm")
    graph.nodes.pop()
    looked.check()
    assert not looked.problem
    assert len(graph.said) == 2
    assert "namespace:=" in graph.said[0]
    assert "only node" in graph.said[1]


def test_one_that_goes_in_time_and_another_that_comes_are_two(graph: Graph) -> None:
    now = [0.0]
    looked = DuplicateNodeCheck(graph, ghost_s=30.0, clock=lambda: now[0])
    for now[0] in range(0, 120, 10):
        graph.nodes = [("vlm", "/front")] * (2 if now[0] % 20 else 1)
        looked.check()
    assert not graph.said
