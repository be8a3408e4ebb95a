"""`~/query`, `~/list_models`, `~/switch_model` and `~/generate`, as clients meet them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

pytestmark = pytest.mark.ros

_ANSWER_S = 12.0


@pytest.fixture(scope="module")
def vlm(start_vlm: Callable[..., Any]) -> Any:
    made = start_vlm(
        fake={"latency_s": 0.3},
        cameras=["front=/front/image", "wrist=/wrist/image:compressed"],
        tasks=["caption@1000"],
        queue_size=3,
        camera_timeout_s=0.0,
        max_frame_age_s=0.0,
        autostart=True,
    )
    made.wait_for_state("active")
    assert made.set_parameters(tasks=[""]) == []
    return made


@pytest.fixture(scope="module")
def slow(start_vlm: Callable[..., Any]) -> Any:
    """A node whose model takes so long that all else is quick beside it on a busy machine, too."""
    made = start_vlm(fake={"latency_s": _ANSWER_S}, tasks=[""], queue_size=3, autostart=True)
    made.wait_for_state("active")
    return made


@pytest.fixture
def at_work(slow: Any, cameras: dict[str, Any]) -> Iterator[Any]:
    """A goal that the slow model is at work on; ended with everything else afterwards."""
    if slow.state == "inactive":
        assert slow.change_state("activate")
    goal = Goal(slow, task="caption", use_image=True, image=cameras["front"].message())
    slow.wait_for(lambda: goal.feedback, 30.0, "the first token")
    yield goal
    if slow.state == "active":
        assert slow.change_state("deactivate")


@pytest.fixture(scope="module")
def silent_cameras(vlm: Any, make_camera: Callable[..., Any]) -> dict[str, Any]:
    made = {
        "front": make_camera("/front/image"),
        "wrist": make_camera("/wrist/image/compressed", compressed=True),
    }
    for camera in made.values():
        camera.wait_for_listener(vlm.wait_for)
    return made


@pytest.fixture(scope="module")
def cameras(vlm: Any, silent_cameras: dict[str, Any]) -> dict[str, Any]:
    for name, camera in silent_cameras.items():

        def heard(name: str = name, camera: Any = camera) -> bool:
            camera.send()
            return bool(query(vlm, task="caption", camera=name).success)

        vlm.wait_for(heard, 15.0, f"a frame of {name}")
    return silent_cameras


def query(vlm: Any, **fields: Any) -> Any:
    return query_later(vlm, **fields)(10.0)


def query_later(vlm: Any, **fields: Any) -> Any:
    from librobot_vlm_ros.srv import Query

    return vlm.call_later(Query, "query", **fields)


def wait_for_frame(vlm: Any, camera: str, header: Any) -> None:
    """Until the newest frame of the camera is the one of that header."""
    vlm.wait_for(
        lambda: query(vlm, task="caption", camera=camera).header == header,
        10.0,
        f"frame of {camera}",
    )


def test_a_query_before_any_frame_says_so(vlm: Any, silent_cameras: dict[str, Any]) -> None:
    response = query(vlm, task="caption", camera="front")
    assert not response.success
    assert response.error_code == 206
    assert "NO_FRAME(206)" in response.error_msg


def test_the_newest_frame_of_a_camera_is_asked(vlm: Any, cameras: dict[str, Any]) -> None:
    for name, camera in cameras.items():
        sent = camera.send()
        wait_for_frame(vlm, name, sent.header)
        response = query(vlm, task="detect", camera=name)
        assert response.success, response.error_msg
        assert response.info.camera == name
        assert response.header == response.grounding.header == sent.header
        assert len(response.grounding.regions) == 2
        assert response.info.request_id.startswith("query/")
    assert query(vlm, task="caption").info.camera == "front"  # no name: the first camera


def test_a_frame_of_a_given_stamp_is_asked(vlm: Any, cameras: dict[str, Any]) -> None:
    camera = cameras["front"]
    old = camera.send()
    wait_for_frame(vlm, "front", old.header)
    new = camera.send()
    wait_for_frame(vlm, "front", new.header)
    response = query(vlm, task="caption", camera="front", stamp=old.header.stamp)
    assert response.header == old.header
    stamp = old.header.stamp
    stamp.nanosec += 1
    response = query(vlm, task="caption", camera="front", stamp=stamp)
    assert response.error_code == 206


def test_an_image_of_ones_own_is_asked(vlm: Any, cameras: dict[str, Any]) -> None:
    image = cameras["front"].message(np.zeros((10, 20, 3), np.uint8))
    response = query(vlm, task="<OD>", use_image=True, image=image)
    assert response.success, response.error_msg
    assert response.header == image.header
    assert response.info.camera == ""
    assert (response.grounding.image_width, response.grounding.image_height) == (20, 10)


def test_an_embedding_is_asked(vlm: Any, cameras: dict[str, Any]) -> None:
    image = cameras["front"].message()
    response = query(vlm, task="embed", use_image=True, image=image)
    assert response.success, response.error_msg
    assert response.embedding.header == image.header
    assert len(response.embedding.data) == 16 * 4
    assert math.isnan(response.score)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"task": "capton"}, 202),
        ({"task": ""}, 202),
        ({"task": "ground"}, 200),
        ({"task": "ground", "prompt": " \u200b"}, 200),
        ({"task": "caption", "prompt": "x" * 5000}, 201),
        ({"task": "caption", "camera": "rear"}, 209),
        ({"task": "region_caption"}, 210),
        ({"task": "region_caption", "region": [1.0, 2.0, 3.0]}, 210),
        ({"task": "region_caption", "region": [float("nan")] * 4}, 210),
        ({"task": "caption", "timeout_s": -1.0}, 204),
        ({"task": "caption", "timeout_s": float("nan")}, 204),
        ({"task": "caption", "max_new_tokens": 2**32 - 1}, 204),
        ({"task": "caption", "use_image": True}, 105),
    ],
)
def test_a_wrong_question_is_answered_with_its_code(
    vlm: Any, cameras: dict[str, Any], fields: dict[str, Any], code: int
) -> None:
    cameras["front"].send()
    response = query(vlm, **fields)
    assert not response.success
    assert response.error_code == code, response.error_msg
    assert f"({code})" in response.error_msg


def test_a_deadline_is_kept(slow: Any, at_work: Any, cameras: dict[str, Any]) -> None:
    image = cameras["front"].message()
    started = time.monotonic()
    response = query(slow, task="caption", use_image=True, image=image, timeout_s=0.1)
    assert response.error_code == 502
    assert time.monotonic() - started < _ANSWER_S / 2


def test_more_questions_than_the_queue_takes_are_answered_busy_at_once(
    slow: Any, at_work: Any, cameras: dict[str, Any]
) -> None:
    image = cameras["front"].message()
    waiting = [query_later(slow, task="caption", use_image=True, image=image) for _ in range(10)]
    # With the model at work, three wait, and the others are answered long before the model is.
    codes = [wait(15.0).error_code for wait in waiting[3:]]
    assert codes == [500] * 7
    assert not at_work.done
    assert slow.change_state("deactivate")
    assert [wait(15.0).error_code for wait in waiting[:3]] == [503] * 3


def test_models_are_listed(vlm: Any) -> None:
    from librobot_vlm_ros.srv import ListModels

    response = vlm.call(ListModels, "list_models")
    assert response.error_code == 0
    assert response.active == "fake"
    rows = {row.name: row for row in response.models}
    assert {"fake", "florence-2-base", "florence-2-tabletop"} <= set(rows)
    assert [name for name, row in rows.items() if row.active] == ["fake"]
    assert "detect" in rows["florence-2-base"].tasks
    assert rows["fake"].weights_present


def test_switching_to_an_unknown_model_keeps_the_old_one(vlm: Any, cameras: dict[str, Any]) -> None:
    from librobot_vlm_ros.srv import SwitchModel

    response = vlm.call(SwitchModel, "switch_model", model="fakee")
    assert not response.success
    assert response.error_code == 300
    assert response.active == "fake"
    assert query(vlm, task="caption", use_image=True, image=cameras["front"].message()).success


def test_switching_to_a_model_that_fails_to_load_rolls_back(
    vlm: Any, cameras: dict[str, Any]
) -> None:
    from librobot_vlm_ros.srv import SwitchModel

    from librobot_vlm_ros.models.checkpoints.hub import shipped_folder

    weights = str(shipped_folder() / "nowhere")
    response = vlm.call(SwitchModel, "switch_model", 60.0, model="florence-2-base", weights=weights)
    assert not response.success
    assert response.error_code == 301, response.error_msg
    assert response.active == "fake"
    assert vlm.state == "active"
    assert vlm.get_parameter("model") == "fake"
    assert query(vlm, task="caption", use_image=True, image=cameras["front"].message()).success


def test_an_answer_is_streamed_token_by_token(vlm: Any, cameras: dict[str, Any]) -> None:
    goal = Goal(vlm, task="caption", use_image=True, image=cameras["front"].message())
    status, result = goal.result()
    assert status == "succeeded"
    assert result.success
    assert len(goal.feedback) > 2
    assert "".join(f.token for f in goal.feedback) == goal.feedback[-1].text == result.text
    assert [f.generated_tokens for f in goal.feedback] == list(range(1, len(goal.feedback) + 1))
    assert result.info.request_id.startswith("generate/")


def test_a_goal_is_cancelled_between_two_tokens(
    slow: Any, at_work: Any, cameras: dict[str, Any]
) -> None:
    started = time.monotonic()
    at_work.cancel()
    status, result = at_work.result(_ANSWER_S)
    assert time.monotonic() - started < _ANSWER_S / 2
    assert status == "canceled"
    assert result.error_code == 501
    slow.wait_for(lambda: result.text == at_work.feedback[-1].text, 10.0, "the last token")
    # The model is free for what comes next.
    following = Goal(slow, task="caption", use_image=True, image=cameras["front"].message())
    slow.wait_for(lambda: following.feedback, 30.0, "the first token of the next goal")
    assert at_work.feedback[-1].text == result.text


def test_a_wrong_goal_is_aborted_with_its_code(vlm: Any, cameras: dict[str, Any]) -> None:
    status, result = Goal(vlm, task="capton").result()
    assert status == "aborted"
    assert result.error_code == 202


def test_goals_beyond_the_queue_are_aborted_busy(
    slow: Any, at_work: Any, cameras: dict[str, Any]
) -> None:
    image = cameras["front"].message()
    goals = [Goal(slow, task="caption", use_image=True, image=image) for _ in range(5)]
    # Three wait, as of queries; the one that the model is at work on is not among them.
    slow.wait_for(lambda: sum(goal.done for goal in goals) == 2, 10.0, "the others' end")
    for goal in goals:
        if goal.done:
            status, result = goal.result()
            assert (status, result.error_code) == ("aborted", 500)
    assert not at_work.done
    assert sum(goal.done for goal in goals) == 2
    assert query(slow, task="caption", use_image=True, image=image).error_code == 500


def test_questions_while_inactive_are_refused_and_a_running_one_is_ended(
    slow: Any, at_work: Any, vlm: Any
) -> None:
    from librobot_vlm_ros.srv import SwitchModel

    assert slow.change_state("deactivate")
    status, result = at_work.result()
    assert (status, result.error_code) == ("aborted", 503)
    for inactive in (slow, vlm):
        if inactive.state == "active":
            assert inactive.change_state("deactivate")
        assert query(inactive, task="caption").error_code == 503
        assert Goal(inactive, task="caption").result()[1].error_code == 503
        assert inactive.change_state("cleanup")
        assert query(inactive, task="caption").error_code == 503
        assert inactive.call(SwitchModel, "switch_model", model="fake").error_code == 311
    # Tests that follow may want the slow one again.
    assert slow.change_state("configure")


def test_switching_answers_what_waits_and_the_parameters_follow(
    vlm: Any, cameras: dict[str, Any]
) -> None:
    from librobot_vlm_ros.srv import SwitchModel

    assert vlm.set_parameters(model_config='{"latency_s": 0.3}') == []
    assert vlm.change_state("configure")
    assert vlm.change_state("activate")
    image = cameras["front"].message()
    waiting = [query_later(vlm, task="caption", use_image=True, image=image) for _ in range(2)]
    response = vlm.call(SwitchModel, "switch_model", model="fake")
    assert response.success, response.error_msg
    assert response.active == "fake"
    assert response.load_s >= 0
    assert [wait(15.0).error_code for wait in waiting] == [0, 0]
    assert vlm.get_parameter("model_config") == ""
    assert query(vlm, task="caption", use_image=True, image=image).info.inference_s < 0.3


class Goal:
    """One goal of `~/generate`, its feedback as it comes."""

    _clients: ClassVar[dict[str, Any]] = {}

    def __init__(self, vlm: Any, **fields: Any) -> None:
        from librobot_vlm_ros.action import Generate
        from rclpy.action import ActionClient

        name = f"{vlm.name}/generate"
        if name not in self._clients:
            self._clients[name] = ActionClient(vlm.robot.node, Generate, name)
        client = self._clients[name]
        assert client.wait_for_server(10.0)
        self.feedback: list[Any] = []
        self._handle = _wait(
            client.send_goal_async(
                Generate.Goal(**fields), lambda message: self.feedback.append(message.feedback)
            )
        )
        assert self._handle.accepted
        self._result = self._handle.get_result_async()

    def cancel(self) -> None:
        self._handle.cancel_goal_async()

    @property
    def done(self) -> bool:
        return bool(self._result.done())

    def result(self, timeout_s: float = 15.0) -> tuple[str, Any]:
        answer = _wait(self._result, timeout_s)
        names = {4: "succeeded", 5: "canceled", 6: "aborted"}
        return names[answer.status], answer.result


def _wait(future: Any, timeout_s: float = 10.0) -> Any:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    assert done.wait(timeout_s)
    return future.result()
