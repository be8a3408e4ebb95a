"""`librobot-vlm example-policy` beside the node: targets for the present instruction only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.ros


def test_it_points_at_what_the_instruction_names(
    robot: Any,
    start_vlm: Callable[..., Any],
    start_process: Callable[..., Any],
    make_camera: Callable[..., Any],
    wait_until: Callable[..., Any],
) -> None:
    from geometry_msgs.msg import PointStamped
    from librobot_vlm_ros.msg import GroundingArray
    from std_msgs.msg import String

    vlm = start_vlm(
        fake={"regions": 1},
        image_topic="/policy/image_raw",
        tasks=["caption", "ground", "embed"],
        instruction="the duck",
        autostart=True,
    )
    policy = start_process(
        ["python", "-m", "librobot_vlm_ros.cli", "example-policy", "--node", vlm.name], "policy"
    )
    targets = robot.listen(PointStamped, "/pointing_policy/target")
    groundings = vlm.listen(GroundingArray, "grounding")
    camera = make_camera("/policy/image_raw")
    pixels = np.full((48, 64, 3), 90, np.uint8)

    # The same picture and prompt give the same region, so that a smoothed target stays in place.
    def target_of(instruction: str) -> Any:
        camera.send(pixels)
        answers = [m for m in list(groundings) if m.info.prompt == instruction]
        for target in list(targets):
            for message in answers:
                if target.header == message.header and points_at(target, message):
                    return target, message
        return None

    def points_at(target: Any, message: Any) -> bool:
        (region,) = message.regions
        middle = (region.x_min + region.x_max) / 2, (region.y_min + region.y_max) / 2
        return (target.point.x, target.point.y) == pytest.approx(middle, abs=1e-3)

    _, duck = wait_until(lambda: target_of("the duck"), 40.0, "a target for the duck")
    say = robot.node.create_publisher(String, f"{vlm.name}/instruction", 10)
    wait_until(lambda: say.get_subscription_count() >= 2, 20.0, "node and policy listen")
    say.publish(String(data="the red cube"))
    first, cube = wait_until(
        lambda: target_of("the red cube"), 40.0, f"a target for the cube\n{policy.output()}"
    )
    assert not points_at(first, duck)
    assert cube.info.instruction_id == duck.info.instruction_id + 1
    before = len(targets)
    wait_until(lambda: camera.send(pixels) and len(targets) >= before + 3, 40.0, "more targets")
    place = next(index for index, target in enumerate(targets) if target is first)
    assert all(points_at(target, cube) for target in list(targets)[place:])

    assert policy.terminate() == 130, policy.output()
    robot.node.destroy_publisher(say)


def test_its_source_is_printed_to_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    from librobot_vlm_ros.cli.main import main

    assert main(["example-policy", "--source"]) == 0
    source = capsys.readouterr().out
    compile(source, "my_policy.py", "exec")
    assert len(source.splitlines()) <= 170
