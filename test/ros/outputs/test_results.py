"""Images in, results out: provenance, headers, bad images, instructions, rates."""

from __future__ import annotations

import array
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.ros

TASKS = ["caption", "detect", "ground", "embed"]


@pytest.fixture(scope="module")
def vlm(start_vlm: Callable[..., Any]) -> Any:
    return start_vlm(image_topic="/cam/image_raw", tasks=TASKS, lock_step=True, autostart=True)


@pytest.fixture(scope="module")
def heard(vlm: Any) -> dict[str, list[Any]]:
    from diagnostic_msgs.msg import DiagnosticArray
    from librobot_vlm_ros.msg import Caption, Embedding, GroundingArray

    return {
        "caption": vlm.listen(Caption, "caption"),
        "grounding": vlm.listen(GroundingArray, "grounding"),
        "embedding": vlm.listen(Embedding, "embedding"),
        "diagnostics": vlm.robot.listen(DiagnosticArray, "/diagnostics"),
    }


@pytest.fixture(scope="module")
def camera(vlm: Any, make_camera: Callable[..., Any], heard: dict[str, list[Any]]) -> Any:
    made = make_camera("/cam/image_raw")
    for topic in ("caption", "grounding", "embedding"):
        made.warm_up(heard[topic], vlm.wait_for)
    return made


def wait_for_result(vlm: Any, messages: list[Any], header: Any, task: str) -> Any:
    def find() -> Any:
        return [m for m in messages if m.header == header and m.info.task == task]

    return vlm.wait_for(find, 10.0, f"{task} of {header.stamp}\n{vlm.log()}")[0]


def test_each_task_answers_under_the_source_images_own_header(
    vlm: Any, camera: Any, heard: dict[str, list[Any]]
) -> None:
    sent = camera.send()
    caption = wait_for_result(vlm, heard["caption"], sent.header, "caption")
    detection = wait_for_result(vlm, heard["grounding"], sent.header, "detect")
    embedding = wait_for_result(vlm, heard["embedding"], sent.header, "embed")
    for message in (caption, detection, embedding):
        assert (message.error_code, message.error_msg) == (0, "")
        assert message.info.model == "fake"
        assert message.info.camera == "camera"
        assert 0.0 <= message.info.age_s < 20.0
        assert message.info.batch_size >= 1
    assert caption.text
    assert 0.5 <= caption.score <= 1.0
    assert (detection.image_width, detection.image_height) == (64, 48)
    for region in detection.regions:
        assert 0 <= region.x_min <= region.x_max <= 64
        assert 0 <= region.y_min <= region.y_max <= 48
    assert (embedding.dtype, embedding.pooling, list(embedding.shape)) == ("float32", "mean", [16])
    values = np.frombuffer(embedding.data, "<f4")
    assert values.shape == (16,)
    assert np.isfinite(values).all()


def test_a_task_without_its_instruction_waits_for_it_and_results_say_which_they_answer(
    vlm: Any, camera: Any, heard: dict[str, list[Any]]
) -> None:
    from std_msgs.msg import String

    sent = camera.send()
    wait_for_result(vlm, heard["caption"], sent.header, "caption")
    assert not [m for m in heard["grounding"] if m.info.task == "ground"]

    publisher = vlm.robot.node.create_publisher(String, f"{vlm.name}/instruction", 10)
    vlm.wait_for(lambda: publisher.get_subscription_count() > 0, 10.0)
    numbers = []
    for text in ("red cube", "blue ball", "blue ball"):
        publisher.publish(String(data=text))
        vlm.wait_for(lambda text=text: vlm.get_parameter("instruction") == text, 10.0)
        sent = camera.send()
        result = wait_for_result(vlm, heard["grounding"], sent.header, "ground")
        assert result.info.prompt == text
        assert {region.label for region in result.regions} == {text}
        numbers.append(result.info.instruction_id)
    assert numbers == [1, 2, 2]
    caption = wait_for_result(vlm, heard["caption"], sent.header, "caption")
    assert caption.info.instruction_id == 0


def test_a_bad_instruction_is_refused_and_the_old_one_stays(vlm: Any) -> None:
    from std_msgs.msg import String

    assert vlm.set_parameters(instruction="duck") == []
    publisher = vlm.robot.node.create_publisher(String, f"{vlm.name}/instruction", 10)
    vlm.wait_for(lambda: publisher.get_subscription_count() > 0, 10.0)
    publisher.publish(String(data="x" * 5000))
    vlm.process.wait_for_output("~/instruction refused: PROMPT_TOO_LONG(201)")
    assert "parameter refused" not in vlm.log()  # said once
    assert vlm.get_parameter("instruction") == "duck"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"encoding": "no\nsuch\x1b[31m"}, "UNKNOWN_ENCODING(101)"),
        ({"encoding": "32FC1", "step": 256}, "UNSUPPORTED_ENCODING(102)"),
        ({"step": 3}, "BAD_STEP(103)"),
        ({"data": array.array("B", b"123")}, "BAD_DATA_LENGTH(104)"),
        ({"height": 0}, "EMPTY_IMAGE(105)"),
        ({"height": 2**31, "width": 2**31}, "IMAGE_TOO_LARGE(106)"),
    ],
)
def test_a_bad_image_is_said_and_the_next_good_one_is_served(
    vlm: Any, camera: Any, heard: dict[str, list[Any]], fields: dict[str, Any], code: str
) -> None:
    camera.send(**fields)
    good = camera.send()
    wait_for_result(vlm, heard["caption"], good.header, "caption")
    vlm.process.wait_for_output(code)
    assert "\x1b[31m" not in vlm.log()


def test_bad_images_are_counted_in_diagnostics(
    vlm: Any, camera: Any, heard: dict[str, list[Any]]
) -> None:
    camera.send(step=1)

    def bad_images() -> int:
        status = vlm.diagnostics(heard["diagnostics"], "camera camera")
        values = {item.key: item.value for item in status.values} if status else {}
        return int(values.get("bad_images", 0)) >= 7 and "BAD_STEP" in values["last_bad_image"]

    vlm.wait_for(bad_images, 15.0)
    status = vlm.diagnostics(heard["diagnostics"], "camera camera")
    assert status.level == status.ERROR
    assert "BAD_STEP(103)" in status.message


def test_diagnostics_tell_the_model_and_what_the_engine_does(
    vlm: Any, camera: Any, heard: dict[str, list[Any]]
) -> None:
    sent = camera.send()
    wait_for_result(vlm, heard["caption"], sent.header, "caption")
    vlm.wait_for(lambda: vlm.diagnostics(heard["diagnostics"], "engine"), 15.0)
    model = vlm.diagnostics(heard["diagnostics"], "model")
    assert model.level == model.OK
    values = {
        status: {i.key: i.value for i in vlm.diagnostics(heard["diagnostics"], status).values}
        for status in ("model", "engine", "camera camera")
    }
    assert int(values["engine"]["frames_received"]) > 0
    assert {"model", "revision", "device", "dtype", "memory_bytes", "free_memory_bytes"} <= set(
        values["model"]
    )
    assert {
        "frames_received", "frames_processed", "dropped_replaced", "dropped_not_due",
        "dropped_too_old", "dropped_bad_image", "results", "age_p50_s", "age_p99_s",
        "inference_p50_s", "inference_p99_s", "tokens_per_s", "queue_depth", "in_flight",
        "last_error",
    } <= set(values["engine"])  # fmt: skip
    assert {
        "topic", "publishers", "qos", "received", "processed", "rate_hz", "silent_s", "age_p50_s",
        "age_p99_s", "bad_images", "last_bad_image",
    } <= set(values["camera camera"])  # fmt: skip


@pytest.mark.parametrize("encoding", ["bgr8", "mono8", "rgba8"])
def test_other_encodings_give_the_same_answer_as_rgb8(
    vlm: Any, camera: Any, heard: dict[str, list[Any]], encoding: str
) -> None:
    gray = np.random.default_rng(7).integers(0, 256, (48, 64, 1), np.uint8)
    rgb = np.repeat(gray, 3, axis=2)
    alpha = np.full_like(gray, 255)
    pixels = {"bgr8": rgb, "mono8": gray, "rgba8": np.concatenate([rgb, alpha], axis=2)}[encoding]
    first, second = camera.send(rgb), camera.send(pixels, encoding)
    texts = [
        wait_for_result(vlm, heard["caption"], sent.header, "caption").text
        for sent in (first, second)
    ]
    assert texts[0] == texts[1]


def test_regions_below_the_threshold_are_left_out(
    vlm: Any, camera: Any, heard: dict[str, list[Any]]
) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    assert vlm.set_parameters(min_score=0.0) == []
    scores = {r.score for r in _detect(vlm, camera, heard, pixels).regions}
    assert len(scores) == 2
    assert not any(math.isnan(score) for score in scores)
    assert vlm.set_parameters(min_score=(min(scores) + max(scores)) / 2) == []
    assert {r.score for r in _detect(vlm, camera, heard, pixels).regions} == {max(scores)}
    assert vlm.set_parameters(min_score=0.0) == []


def _detect(vlm: Any, camera: Any, heard: dict[str, list[Any]], pixels: np.ndarray) -> Any:
    return wait_for_result(vlm, heard["grounding"], camera.send(pixels).header, "detect")


@pytest.mark.parametrize("compressed", [False, True])
def test_in_lock_step_every_frame_is_answered_in_order(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any], compressed: bool
) -> None:
    from librobot_vlm_ros.msg import Caption

    topic = f"/burst{int(compressed)}/image"
    transport = "compressed" if compressed else "raw"
    vlm = start_vlm(
        fake={"latency_s": 0.01}, image_topic=topic, image_transport=transport, tasks=["caption"],
        lock_step=True, autostart=True,
    )  # fmt: skip
    captions = vlm.listen(Caption, "caption")
    camera = make_camera(f"{topic}/compressed" if compressed else topic, 200, compressed)
    camera.warm_up(captions, vlm.wait_for)
    sent = [camera.send().header for _ in range(100)]
    vlm.wait_for(lambda: len(captions) == 100, 20.0, "100 captions")
    assert [caption.header for caption in captions] == sent


def test_the_annotated_image_is_drawn_only_for_a_listener(vlm: Any, camera: Any) -> None:
    from sensor_msgs.msg import Image

    pixels = np.zeros((48, 64, 3), np.uint8)
    drawn: list[Any] = []
    subscription = vlm.robot.node.create_subscription(
        Image, f"{vlm.name}/annotated", drawn.append, 10
    )

    def see() -> bool:
        camera.send(pixels)
        time.sleep(0.05)
        return bool(drawn)

    vlm.wait_for(see, 10.0, "an annotated image")
    vlm.robot.node.destroy_subscription(subscription)
    image = drawn[-1]
    assert image.header.frame_id == "cam_image_raw_optical_frame"
    assert (image.width, image.height, image.encoding, image.step) == (64, 48, "rgb8", 192)
    assert np.frombuffer(image.data, np.uint8).max() > 100


def test_a_failing_model_gives_a_coded_result_under_the_images_header(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    from librobot_vlm_ros.msg import Caption

    vlm = start_vlm(
        fake={"nan_every": 2}, image_topic="/nan/image", tasks=["caption"], lock_step=True,
        autostart=True,
    )  # fmt: skip
    captions = vlm.listen(Caption, "caption")
    camera = make_camera("/nan/image")
    camera.warm_up(captions, vlm.wait_for)
    sent = [camera.send() for _ in range(4)]
    vlm.wait_for(lambda: len(captions) == 4, 10.0, vlm.log())
    assert [m.header for m in captions] == [m.header for m in sent]
    assert sorted(m.error_code for m in captions) == [0, 0, 402, 402]
    failed = next(m for m in captions if m.error_code)
    assert "NAN_LOGITS(402)" in failed.error_msg
    assert failed.text == ""
    assert math.isnan(failed.score)
    assert "NAN_LOGITS(402)" in vlm.log()
