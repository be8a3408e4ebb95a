"""Images that are none: by the thousand at the core's door, and over DDS at the node's."""

from __future__ import annotations

import array
import random
import time
from typing import Any

from suite import Findings, borrowed, camera_of, robot_and_node, row, wait_for

_GROWTH_MIB = 32.0


@row
def malformed_images(found: Findings) -> None:
    """Refused with their code, at once, and nothing kept."""
    module = borrowed("core/images/test_malformed_images.py")
    module.decode_compressed(module.picture(random.Random(0), "png"))
    cases, slowest, before = found.number(10_000, len(module.KINDS)), 0.0, 0
    warm = min(10 * len(module.KINDS), cases // 2)
    for index in range(cases):
        kind = module.KINDS[index % len(module.KINDS)]
        fields, codes = kind(random.Random(f"{module.SEED}-{index}"))
        code, seconds = module.outcome(fields)
        for _ in range(5):  # a busy machine may take the processor away in the middle
            if seconds <= module.TIME_LIMIT_S:
                break
            seconds = min(seconds, module.outcome(fields)[1])
        slowest = max(slowest, seconds)
        found.check(code in codes, f"case {index} ({kind.__name__}): {code}")
        if index == warm:
            before = module.resident_bytes()
    growth = (module.resident_bytes() - before) / 2**20
    found.cases += cases
    found.within("slowest_best_of_6_ms", 1000 * slowest, 1000 * module.TIME_LIMIT_S)
    found.within("memory_growth_mib", growth, _GROWTH_MIB, time=False)


@row
def malformed_images_at_the_node(found: Findings) -> None:
    """Over DDS: each counted, no result of any, and the next good one is answered."""
    from librobot_vlm_ros.msg import Caption
    from sensor_msgs.msg import Image

    module = borrowed("core/images/test_malformed_images.py")
    cases = found.number(500, 20)
    with robot_and_node(image_topic="/torture/image", tasks=["caption"], autostart=True) as (
        robot,
        vlm,
    ):
        heard = vlm.listen(Caption, "caption")
        camera = camera_of(robot)
        camera.warm_up(heard, wait_for)
        bad = _counter(robot, vlm)
        for index in range(cases):
            camera.publisher.publish(_message(module, index, Image))
            time.sleep(0.01)  # at most one waits for the executor: the newest wins
        wait_for(bad, 20.0, "a count of bad images")
        time.sleep(1.1)  # diagnostics come once a second
        found.cases += cases
        found.note(refused=bad())
        found.check(bad() >= cases // 2, f"{bad()} of {cases} were counted as bad")
        found.check(not heard, f"{len(heard)} results of images that are none", len(heard))
        good = camera.send()
        answered = wait_for(lambda: heard and heard[-1].header == good.header, 20.0, "an answer")
        found.check(bool(answered), "the next good image was not answered")
        found.check(vlm.process.alive, "the node has ended")
        found.check("Traceback" not in vlm.log(), "an exception got past the node")


def _message(module: Any, index: int, image: Any) -> Any:
    """A malformed raw image that ROS can carry."""
    rng = random.Random(f"node-{index}")
    kinds = [module.short_step, module.short_data, module.long_data, module.no_pixels]
    kinds += [module.unsupported_encoding, module.depth, module.wrong_encoding]
    fields, _ = kinds[index % len(kinds)](rng)
    message = image(encoding=fields["encoding"], step=fields["step"])
    message.data = array.array("B", fields["data"])
    message.width, message.height = fields["width"], fields["height"]
    return message


def _counter(robot: Any, vlm: Any) -> Any:
    """Images that the node has refused, by its diagnostics."""
    from diagnostic_msgs.msg import DiagnosticArray

    heard = robot.listen(DiagnosticArray, "/diagnostics")

    def count() -> int:
        status = vlm.diagnostics(heard, "camera camera")
        values = {item.key: item.value for item in status.values} if status else {}
        return int(values.get("bad_images", 0))

    return count
