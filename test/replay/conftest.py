"""The real node in a process of its own, and replays that collect what it publishes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RESULT_TOPICS = ("/vlm/caption", "/vlm/grounding", "/vlm/embedding")


@pytest.fixture
def start_node(
    start_process: Callable[..., Any], ros_env: dict[str, str], session: Any
) -> Callable[..., Any]:
    """`start_node("model:=fake", ...)`: `librobot-vlm run`, active when it returns."""
    import time

    from lifecycle_msgs.srv import GetState

    from librobot_vlm_ros.core import EngineError

    def start(*arguments: str, timeout_s: float = 60.0) -> Any:
        words = ["python", "-m", "librobot_vlm_ros.cli", "run", "autostart:=true", *arguments]
        process = start_process(words, name="node", env=ros_env)
        client = session.node.create_client(GetState, "/vlm/get_state")
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            assert process.alive, process.output()
            try:
                if session.call(client, GetState.Request(), 2.0).current_state.id == 3:
                    return process
            except EngineError:
                continue
            session.spin_until(lambda: False, time.monotonic() + 0.05)
        pytest.fail(f"the node was not active in {timeout_s:g} s:\n{process.output()}")

    return start


@pytest.fixture
def lock_step(ros_env: dict[str, str]) -> Callable[..., tuple[Any, list[Any]]]:
    """`lock_step(bag, remap={...}, **options)`: the report of a replay, and the results."""
    from librobot_vlm_ros.bags import BagReader
    from librobot_vlm_ros.client.session import Session
    from librobot_vlm_ros.replay.lock_step import NodeLink
    from librobot_vlm_ros.replay.player import Player, PlayOptions

    def replay(bag: Path, **options: Any) -> tuple[Any, list[Any]]:
        results: list[Any] = []
        given = {"rate": None, "discovery_s": 10.0, "remap": {"/instruction": "/vlm/instruction"}}
        with BagReader(bag) as reader, Session("lock_step_tests") as session:
            link = NodeLink(session)
            link.on_result = results.append
            link.connect()
            player = Player(session, reader, PlayOptions(**{**given, **options}), link=link)
            player.open()
            return player.play(), results

    return replay


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs ROS."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ros)
