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
from librobot_vlm_ros.doctor.finding import Finding, gib
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
        yield Finding("python", "problem", text, f"use Python {low[0]}.{low[1]} or newer")
    elif sys.version_info[:2] > high:
        yield Finding("python", "warning", text, f"tested up to Python {high[0]}.{high[1]}")
    else:
        yield Finding("python", "ok", text)
    facts, why = ask_python("import numpy; tell(version=numpy.__version__)")
    if why:
        yield Finding("numpy", "problem", f"cannot be imported: {why}", "pip install numpy")
    else:
        yield Finding("numpy", "ok", facts["version"])


def check_packages() -> Iterator[Finding]:
    """OpenCV, and what makes some models faster or smaller."""
    facts, why = ask_python("import cv2; tell(version=cv2.__version__)")
    if why:
        fix = "apt install python3-opencv, or pip install opencv-python-headless"
        yield Finding("opencv", "problem", f"JPEG and PNG cannot be decoded: {why}", fix)
    else:
        yield Finding("opencv", "ok", facts["version"])
    for module, (package, without) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(package, "ok", f"not installed: {without}")
            continue
        _, why = ask_python(f"import {module}")
        version = _version(package)
        if why:
            fix = (
                f"install {package} built for this torch, or take it away: pip uninstall {package}"
            )
            yield Finding(package, "warning", f"{version}, cannot be imported: {why}", fix)
        else:
            yield Finding(package, "ok", version)


def check_cv_bridge() -> Iterator[Finding]:
    """Whether cv_bridge and numpy are of one ABI; this package does without."""
    if importlib.util.find_spec("cv_bridge") is None:
        yield Finding("cv_bridge", "ok", "not installed: this package decodes images itself")
        return
    facts, why = ask_python(_CV_BRIDGE)
    numpy = facts.get("numpy", "?")
    if facts.get("works"):
        yield Finding("cv_bridge", "ok", f"works with numpy {numpy}")
        return
    yield Finding(
        "cv_bridge",
        "warning",
        f"does not work with numpy {numpy}: {why or 'it gives wrong images'}",
        "this package does without it; for other nodes: pip install 'numpy<2' where cv_bridge was "
        "built for numpy 1, or build it anew",
    )


def check_ros() -> Iterator[Finding]:
    """Distribution, middleware, and the messages of this package."""
    if importlib.util.find_spec("rclpy") is None:
        found = sorted(path.parent.name for path in Path("/opt/ros").glob("*/setup.bash"))
        source = f"source /opt/ros/{found[-1] if found else _TESTED_DISTRO}/setup.bash"
        yield Finding(
            "ros",
            "warning",
            "no ROS 2 in this shell: models, ask, convert work, the node does not",
            source if found else f"install ROS 2 {_TESTED_DISTRO}, then: {source}",
        )
        return
    version = _version("rclpy")
    distro = os.environ.get("ROS_DISTRO") or _DISTROS.get(version.partition(".")[0], "unknown")
    text = f"{distro} (rclpy {version or 'of unknown version'})"
    if distro == _TESTED_DISTRO:
        yield Finding("ros", "ok", text)
    else:
        yield Finding("ros", "warning", text, f"tested with {_TESTED_DISTRO} only")
    facts, why = ask_python(_ROS)
    wanted = os.environ.get("RMW_IMPLEMENTATION", "")
    if "rmw" not in facts:
        fix = "source the workspace anew"
        if wanted:
            fix = f"RMW_IMPLEMENTATION is {wanted}: install it (apt), or unset the variable"
        yield Finding("middleware", "problem", f"rclpy cannot be used: {why}", fix)
        return
    if facts["rmw"].startswith("rmw_fastrtps"):
        yield Finding("middleware", "ok", facts["rmw"])
    else:
        fix = "its settings for images are not tested: see config/README.md"
        yield Finding("middleware", "warning", facts["rmw"], fix)
    if facts.get("messages"):
        yield Finding("messages", "ok", "built")
    else:
        fix = "colcon build --packages-select librobot_vlm_ros && source install/setup.bash"
        yield Finding("messages", "problem", f"those of this package are not built: {why}", fix)


def check_transport() -> Iterator[Finding]:
    """Shared memory of Fast DDS: the segment that the profile gives, and the room for it."""
    rmw = os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")
    has_ros = importlib.util.find_spec("rclpy") is not None  # without, nothing is sent
    if has_ros and rmw.startswith("rmw_fastrtps"):
        yield _segment(*profile_in_force())
    if not SHARED_MEMORY.is_dir():
        yield Finding("/dev/shm", "warning", "not there", "images go by UDP: mount a tmpfs on it")
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < _NEEDED_BYTES:
        fix = "in a container: docker run --shm-size=512m; else remove what fills it"
        yield Finding("/dev/shm", "warning", f"{gib(free)} free, 128 MiB are needed", fix)
    else:
        yield Finding("/dev/shm", "ok", f"{gib(free)} free")


def _segment(profile: Path | None, words: str) -> Finding:
    name, said = "shared memory", f"profile {profile}" if profile else "no profile"
    built_in = os.environ.get("FASTDDS_BUILTIN_TRANSPORTS", "")
    if profile is None and built_in.upper().startswith(("UDP", "TCP")):
        fix = "unset FASTDDS_BUILTIN_TRANSPORTS, or publish small images only"
        text = f"switched off by FASTDDS_BUILTIN_TRANSPORTS={built_in}"
        return Finding(name, "warning", text, fix)
    try:
        size = segment_bytes(profile)
    except (OSError, ValueError) as error:
        fix = "correct the file, or unset the variable that names it"
        return Finding(name, "warning", f"{said} cannot be read: {error}", fix)
    profile_fix = (
        "unset LIBROBOT_VLM_TRANSPORT and other profiles, and start the cameras with "
        "FASTRTPS_DEFAULT_PROFILES_FILE=.../config/fastdds.xml too"
    )
    if size is None:
        return Finding(name, "warning", f"{said} leaves it out", profile_fix)
    if size < _IMAGE_BYTES:
        text = f"segment of {gib(size)}, less than a 640x480 image ({said}; {words})"
        return Finding(name, "warning", text, profile_fix)
    return Finding(name, "ok", f"segment of {gib(size)} for the node ({said}); cameras need it too")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
