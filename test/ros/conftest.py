"""The node as a process of its own, and a robot around it: cameras, clients, listeners, over real
DDS.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

_namespaces = itertools.count(1)


class Robot:
    """One rclpy node in the test's process, spun on a thread. Everything else of the robot hangs on
    it.
    """

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.context = rclpy.Context()
        self.context.init()
        self.node = rclpy.create_node("robot", context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._ending = False
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        self._clients: dict[str, Any] = {}

    def _spin(self) -> None:
        while not self._ending:
            self._executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        self._ending = True
        self._executor.wake()
        self._thread.join(5.0)
        self._executor.shutdown(0)
        self.node.destroy_node()
        self.context.shutdown()

    def listen(self, message_type: Any, topic: str, qos: Any = 50) -> list[Any]:
        """Messages of a topic as they come, oldest first."""
        heard: list[Any] = []
        self.node.create_subscription(message_type, topic, heard.append, qos)
        return heard

    def call(self, service_type: Any, name: str, timeout_s: float = 10.0, **fields: Any) -> Any:
        """Call a service and give its response."""
        return self.call_later(service_type, name, **fields)(timeout_s)

    def read(self, service_type: Any, name: str, **fields: Any) -> Any:
        """Call a service that changes nothing, and ask again when no answer comes.

        The first answer to a new client may be lost: the node can take the request before it knows
        who reads the answer (https://github.com/ros2/rmw_fastrtps/issues/842). In all the node
        still has 10 s.
        """
        for timeout_s in (2.0, 3.0):
            with contextlib.suppress(AssertionError):
                return self.call(service_type, name, timeout_s, **fields)
        return self.call(service_type, name, 5.0, **fields)

    def call_later(self, service_type: Any, name: str, **fields: Any) -> Callable[..., Any]:
        """Send a request now; what comes back waits for the response."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self.node.create_client(service_type, name)
        assert client.wait_for_service(10.0), f"no service {name}"
        future = client.call_async(service_type.Request(**fields))

        def wait(timeout_s: float = 10.0) -> Any:
            end = time.monotonic() + timeout_s
            while not future.done():
                assert time.monotonic() < end, f"no answer from {name} in {timeout_s} s"
                time.sleep(0.002)
            return future.result()

        return wait


class Vlm:
    """The node under test."""

    def __init__(self, process: Any, robot: Robot, name: str, wait_for: Callable[..., Any]) -> None:
        self.process, self.robot, self.name, self.wait_for = process, robot, name, wait_for

    def call(self, service_type: Any, name: str, timeout_s: float = 10.0, **fields: Any) -> Any:
        return self.robot.call(service_type, f"{self.name}/{name}", timeout_s, **fields)

    def read(self, service_type: Any, name: str, **fields: Any) -> Any:
        return self.robot.read(service_type, f"{self.name}/{name}", **fields)

    def call_later(self, service_type: Any, name: str, **fields: Any) -> Callable[..., Any]:
        return self.robot.call_later(service_type, f"{self.name}/{name}", **fields)

    def listen(self, message_type: Any, topic: str) -> list[Any]:
        """Messages of one of the node's topics; returns once the node's publisher is found."""
        heard = self.robot.listen(message_type, f"{self.name}/{topic}")
        self.wait_for(lambda: self.robot.node.count_publishers(f"{self.name}/{topic}"), 10.0)
        return heard

    @property
    def state(self) -> str:
        from lifecycle_msgs.srv import GetState

        return str(self.read(GetState, "get_state").current_state.label)

    def change_state(self, label: str, timeout_s: float = 15.0) -> bool:
        return self.change_state_later(label)(timeout_s).success

    def change_state_later(self, label: str) -> Callable[..., Any]:
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        return self.call_later(ChangeState, "change_state", transition=Transition(label=label))

    def wait_for_state(self, label: str, timeout_s: float = 20.0) -> None:
        self.wait_for(lambda: self.state == label, timeout_s, f"state {label}")

    def set_parameters(self, **values: Any) -> list[str]:
        """Set parameters as `ros2 param set` does; the reasons of those that were refused."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        parameters = [
            Parameter(name, value=value).to_parameter_msg() for name, value in values.items()
        ]
        results = self.call(SetParameters, "set_parameters", parameters=parameters).results
        return [result.reason for result in results if not result.successful]

    def get_parameter(self, name: str) -> Any:
        from rcl_interfaces.srv import GetParameters
        from rclpy.parameter import parameter_value_to_python

        (value,) = self.read(GetParameters, "get_parameters", names=[name]).values
        return parameter_value_to_python(value)

    def log(self) -> str:
        return self.process.output()

    def diagnostics(self, heard: list[Any], status: str) -> Any:
        """The newest status of that name, or None."""
        wanted = f"{self.name.lstrip('/')}: {status}"
        for message in reversed(heard):
            for item in message.status:
                if item.name == wanted:
                    return item
        return None


class CameraSim:
    """A camera: images with counting stamps on a topic."""

    def __init__(self, robot: Robot, topic: str, qos: Any = 10, compressed: bool = False) -> None:
        from sensor_msgs.msg import CompressedImage, Image

        self.robot, self.topic, self.compressed = robot, topic, compressed
        kind = CompressedImage if compressed else Image
        self.publisher = robot.node.create_publisher(kind, topic, qos)
        self._numbers = itertools.count(1)

    def message(
        self, pixels: np.ndarray | None = None, encoding: str = "rgb8", **fields: Any
    ) -> Any:
        number = next(self._numbers)
        if pixels is None:
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        if self.compressed:
            return self._compressed(pixels, number, fields)
        from sensor_msgs.msg import Image

        message = Image(encoding=encoding, height=pixels.shape[0], width=pixels.shape[1])
        message.step = int(np.prod(pixels.shape[1:])) * pixels.itemsize
        message.data = array.array("B", pixels.tobytes())
        self._header(message, number)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    def _compressed(self, pixels: np.ndarray, number: int, fields: dict[str, Any]) -> Any:
        import cv2
        from sensor_msgs.msg import CompressedImage

        _, data = cv2.imencode(".jpg", pixels[..., ::-1])
        message = CompressedImage(format="jpeg", data=array.array("B", data.tobytes()))
        self._header(message, number)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    def _header(self, message: Any, number: int) -> None:
        message.header.frame_id = f"{self.topic.strip('/').replace('/', '_')}_optical_frame"
        message.header.stamp.sec, message.header.stamp.nanosec = 1000 + number, 123456789

    def send(self, pixels: np.ndarray | None = None, encoding: str = "rgb8", **fields: Any) -> Any:
        """Publish one image; what was published."""
        message = self.message(pixels, encoding, **fields)
        self.publisher.publish(message)
        return message

    def wait_for_listener(self, wait_for: Callable[..., Any]) -> None:
        wait_for(
            lambda: self.publisher.get_subscription_count() > 0, 15.0, f"a listener on {self.topic}"
        )

    def warm_up(self, heard: list[Any], wait_for: Callable[..., Any]) -> None:
        """Send until answers come: only then have all sides found each other. Empties `heard`."""
        self.wait_for_listener(wait_for)

        def answered(timeout_s: float) -> bool:
            header, end = self.send().header, time.monotonic() + timeout_s
            while time.monotonic() < end:
                if heard and heard[-1].header == header:
                    return True
                time.sleep(0.01)
            return False

        def caught_up() -> bool:
            """No answer to an earlier frame comes after this one. A frame may still be lost: the
            node subscribes anew when it sees what the publisher offers.
            """
            return answered(0.1) or (bool(heard) and answered(2.0))

        wait_for(caught_up, 30.0, f"an answer to {self.topic}")
        heard.clear()

    def close(self) -> None:
        self.robot.node.destroy_publisher(self.publisher)


@pytest.fixture(scope="session")
def robot(ros_env: dict[str, str]) -> Iterator[Robot]:
    made = Robot()
    yield made
    made.close()


@pytest.fixture(scope="module")
def start_vlm(
    robot: Robot, start_module_process: Callable[..., Any], wait_until: Callable[..., Any]
) -> Iterator[Callable[..., Vlm]]:
    """`start_vlm(fake={...}, **parameters)`: the node with the fake model, in a namespace of its
    own. `code`: Python that runs the node's `main`, where something is to be in its way.
    """
    started: list[Vlm] = []

    def start(fake: dict[str, Any] | None = None, code: str = "", **parameters: Any) -> Vlm:
        namespace = f"/n{next(_namespaces)}"
        parameters = {"model": "fake", **parameters}
        if fake:
            parameters["model_config"] = json.dumps(fake)
        words = [
            "python",
            *(["-c", code] if code else ["-m", "librobot_vlm_ros.ros.main"]),
            "--ros-args",
            "-r",
            f"__ns:={namespace}",
        ]
        for name, value in parameters.items():
            words += ["-p", f"{name}:={json.dumps(value)}"]
        vlm = Vlm(start_module_process(words, "vlm"), robot, f"{namespace}/vlm", wait_until)
        started.append(vlm)
        return vlm

    yield start
    for vlm in started:
        vlm.process.terminate()


@pytest.fixture(scope="module")
def make_camera(robot: Robot) -> Iterator[Callable[..., CameraSim]]:
    made: list[CameraSim] = []

    def make(topic: str, qos: Any = 10, compressed: bool = False) -> CameraSim:
        made.append(CameraSim(robot, topic, qos, compressed))
        return made[-1]

    yield make
    for camera in made:
        camera.close()
