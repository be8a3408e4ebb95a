"""A client in a process of its own that calls one service at a fixed rate and notes every answer.

    python test/torture/calling.py /vlm/query --rate 1000 --seconds 60 --out figures.json

It does without an executor (rclpy's costs more a call than the node does), so that what is measured
is the node: answers are taken from the middleware as they come, at most 0.3 ms late.
"""

from __future__ import annotations

import argparse
import array
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

#: What comes while this client is off the processor waits in its reader.
_DEPTH = 2000
_GRACE_S = 20.0


def _request(service: str) -> tuple[Any, Any]:
    """(type, request) by the service's last name."""
    if service.endswith("/get_state"):
        from lifecycle_msgs.srv import GetState

        return GetState, GetState.Request()
    if service.endswith("/list_models"):
        from librobot_vlm_ros.srv import ListModels

        return ListModels, ListModels.Request()
    from librobot_vlm_ros.srv import Query

    request = Query.Request(task="caption", use_image=True)
    request.image.encoding, request.image.width, request.image.height = "rgb8", 64, 48
    request.image.step = 192
    request.image.data = array.array("B", bytes(range(192)) * 48)
    return Query, request


def flood(client: Any, request: Any, rate: float, seconds: float) -> dict[str, Any]:
    """Call at `rate` per second for that time, then wait for what is missing."""
    sent: dict[int, float] = {}
    took: list[tuple[int, float]] = []
    count, begun = 0, time.perf_counter()
    last_heard = begun
    while True:
        now = time.perf_counter()
        if now - begun < seconds:
            for _ in range(min(50, int((now - begun) * rate) + 1 - count)):
                at = time.perf_counter()
                sent[client.handle.send_request(request)] = at
                count += 1
        elif not sent or now - max(last_heard, begun + seconds) > _GRACE_S:
            break
        idle = True
        while (taken := client.handle.take_response(client.srv_type.Response))[0] is not None:
            header, response = taken
            last_heard, idle = time.perf_counter(), False
            number = header.request_id.sequence_number
            if number not in sent:
                print(
                    "DOUBLE",
                    number,
                    count,
                    getattr(response, "error_code", 0),
                    response.error_msg,
                    [t for t in took if t[2] == number],
                    file=sys.stderr,
                )
                continue
            took.append((getattr(response, "error_code", 0), last_heard - sent.pop(number), number))
            if len(took) % 50 == 0:
                break
        if idle:
            time.sleep(0.0003)
    return _figures(count, len(sent), took, time.perf_counter() - begun)


def _figures(
    count: int, lost: int, took: list[tuple[int, float]], seconds: float
) -> dict[str, Any]:
    codes: dict[str, Any] = {}
    for code, number in Counter(code for code, _, _ in took).items():
        times = sorted(1000 * spent for its, spent, _ in took if its == code)
        codes[str(code)] = {
            "count": number,
            "p50_ms": times[len(times) // 2],
            "p99_ms": times[int(0.99 * (len(times) - 1))],
            "max_ms": times[-1],
        }
    return {"calls": count, "lost": lost, "seconds": seconds, "codes": codes}


def main() -> int:
    """Call, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service")
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--depth", type=int, default=_DEPTH)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()

    import rclpy
    from rclpy.qos import QoSProfile

    from librobot_vlm_ros.ros.dds import use_image_profile

    use_image_profile()
    rclpy.init(args=[])
    node = rclpy.create_node("flood")
    kind, request = _request(words.service)
    client = node.create_client(kind, words.service, qos_profile=QoSProfile(depth=words.depth))
    if not client.wait_for_service(30.0):
        print(f"no service {words.service}", file=sys.stderr)
        return 1
    time.sleep(0.5)  # both ends of the answers find each other too (rmw_fastrtps#842)
    text = json.dumps(flood(client, request, words.rate, words.seconds))
    if words.out:
        words.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
