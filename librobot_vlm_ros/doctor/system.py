"""The doctor's look at Python, packages, ROS and its transport. Nothing of it needs to be there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from librobot_vlm_ros.doctor.child_process import ask_python
from librobot_vlm_ros.doctor.finding import Finding, gib, ok, problem, warning
from librobot_vlm_ros.ros.dds import SHARED_MEMORY, profile_in_force, segment_bytes

_TESTED_PYTHON = ((3, 10), (3, 13))
_TESTED_DISTRO = "jazzy"
#: Versions of rclpy by the distribution that they came with.
_DISTROS = {"3": "humble", "4": "iron", "7": "jazzy", "9": "kilted"}
_IMAGE_BYTES = 640 * 480 * 3
_NEEDED_BYTES = 128 * 1024 * 1024
_OPTIONAL = {
    "flash_attn": ("flash-attn", "attention is sdpa"),
    "bitsandbytes": ("bitsandbytes", "quantization int8 and nf4 are not to be had"),
}
_CV_BRIDGE = """
import numpy
tell(numpy=numpy.__version__)
from cv_bridge import CvBridge
bridge = CvBridge()
sent = bridge.cv2_to_imgmsg(numpy.zeros((2, 2, 3), numpy.uint8), "bgr8")
tell(works=bridge.imgmsg_to_cv2(sent, "rgb8").shape == (2, 2, 3))
"""
_ROS = """
import rclpy
from rclpy.utilities import get_rmw_implementation_identifier
tell(rmw=get_rmw_implementation_identifier())
import librobot_vlm_ros.msg
from librobot_vlm_ros.srv import Query
tell(messages=True)
"""


def check_python() -> Iterator[Finding]:
    """The interpreter and numpy."""
    version = ".".join(map(str, sys.version_info[:3]))
    low, high = _TESTED_PYTHON
    text = f"{version} ({sys.executable})"
    if sys.version_info[:2] < low:
        yield problem("python", text, f"use Python {low[0]}.{low[1]} or newer")
    elif sys.version_info[:2] > high:
        yield warning("python", text, f"tested up to Python {high[0]}.{high[1]}")
    else:
        yield ok("python", text)
    yield _imported("numpy", "numpy", "cannot be imported", "pip install numpy")


def check_packages() -> Iterator[Finding]:
    """OpenCV, and what makes some models faster or smaller."""
    fix = "apt install python3-opencv, or pip install opencv-python-headless"
    yield _imported("opencv", "cv2", "JPEG and PNG cannot be decoded", fix)
    for module, (package, without) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield ok(package, f"not installed: {without}")
            continue
        _, why = ask_python(f"import {module}")
        version = _version(package)
        if why:
            text = f"{version}, cannot be imported: {why}"
            fix = f"install {package} built for this torch, or take it away: pip uninstall"
            yield warning(package, text, f"{fix} {package}")
        else:
            yield ok(package, version)


def _imported(name: str, module: str, without: str, fix: str) -> Finding:
    facts, why = ask_python(f"import {module}; tell(version={module}.__version__)")
    return problem(name, f"{without}: {why}", fix) if why else ok(name, facts["version"])


def check_cv_bridge() -> Iterator[Finding]:
    """Whether cv_bridge and numpy are of one ABI; this package does without."""
    if importlib.util.find_spec("cv_bridge") is None:
        yield ok("cv_bridge", "not installed: this package decodes images itself")
        return
    facts, why = ask_python(_CV_BRIDGE)
    numpy = facts.get("numpy", "?")
    if facts.get("works"):
        yield ok("cv_bridge", f"works with numpy {numpy}")
    else:
        yield warning(
            "cv_bridge",
            f"does not work with numpy {numpy}: {why or 'it gives wrong images'}",
            "this package does without it; for other nodes: pip install 'numpy<2' where cv_bridge "
            "was built for numpy 1, or build it anew",
        )


def check_ros() -> Iterator[Finding]:
    """Distribution, middleware, and the messages of this package."""
    if importlib.util.find_spec("rclpy") is None:
        found = sorted(path.parent.name for path in Path("/opt/ros").glob("*/setup.bash"))
        source = f"source /opt/ros/{found[-1] if found else _TESTED_DISTRO}/setup.bash"
        yield warning(
            "ros",
            "no ROS 2 in this shell: models, ask, convert work, the node does not",
            source if found else f"install ROS 2 {_TESTED_DISTRO}, then: {source}",
        )
        return
    version = _version("rclpy")
    distro = os.environ.get("ROS_DISTRO") or _DISTROS.get(version.partition(".")[0], "unknown")
    text = f"{distro} (rclpy {version or 'of unknown version'})"
    if distro == _TESTED_DISTRO:
        yield ok("ros", text)
    else:
        yield warning("ros", text, f"tested with {_TESTED_DISTRO} only")
    facts, why = ask_python(_ROS)
    wanted = os.environ.get("RMW_IMPLEMENTATION", "")
    if "rmw" not in facts:
        fix = "source the workspace anew"
        if wanted:
            fix = f"RMW_IMPLEMENTATION is {wanted}: install it (apt), or unset the variable"
        yield problem("middleware", f"rclpy cannot be used: {why}", fix)
        return
    if facts["rmw"].startswith("rmw_fastrtps"):
        yield ok("middleware", facts["rmw"])
    else:
        fix = "its settings for images are not tested: see config/README.md"
        yield warning("middleware", facts["rmw"], fix)
    if facts.get("messages"):
        yield ok("messages", "built")
    else:
        fix = "colcon build --packages-select librobot_vlm_ros && source install/setup.bash"
        yield problem("messages", f"those of this package are not built: {why}", fix)


def check_transport() -> Iterator[Finding]:
    """Shared memory of Fast DDS: the segment that the profile gives, and the room for it."""
    rmw = os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")
    has_ros = importlib.util.find_spec("rclpy") is not None  # without, nothing is sent
    if has_ros and rmw.startswith("rmw_fastrtps"):
        yield _segment(*profile_in_force())
    if not SHARED_MEMORY.is_dir():
        yield warning("/dev/shm", "not there", "images go by UDP: mount a tmpfs on it")
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < _NEEDED_BYTES:
        fix = "in a container: docker run --shm-size=512m; else remove what fills it"
        yield warning("/dev/shm", f"{gib(free)} free, 128 MiB are needed", fix)
    else:
        yield ok("/dev/shm", f"{gib(free)} free")


def _segment(profile: Path | None, words: str) -> Finding:
    name, said = "shared memory", f"profile {profile}" if profile else "no profile"
    built_in = os.environ.get("FASTDDS_BUILTIN_TRANSPORTS", "")
    if profile is None and built_in.upper().startswith(("UDP", "TCP")):
        fix = "unset FASTDDS_BUILTIN_TRANSPORTS, or publish small images only"
        text = f"switched off by FASTDDS_BUILTIN_TRANSPORTS={built_in}"
        return warning(name, text, fix)
    try:
        size = segment_bytes(profile)
    except (OSError, ValueError) as error:
        fix = "correct the file, or unset the variable that names it"
        return warning(name, f"{said} cannot be read: {error}", fix)
    profile_fix = (
        "unset LIBROBOT_VLM_TRANSPORT and other profiles, and start the cameras with "
        "FASTRTPS_DEFAULT_PROFILES_FILE=.../config/fastdds.xml too"
    )
    if size is None:
        return warning(name, f"{said} leaves it out", profile_fix)
    if size < _IMAGE_BYTES:
        text = f"segment of {gib(size)}, less than a 640x480 image ({said}; {words})"
        return warning(name, text, profile_fix)
    return ok(name, f"segment of {gib(size)} for the node ({said}); cameras need it too")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
