"""Colour conversion by cv_bridge where it is installed, by rosbags-image elsewhere.

Neither checks step, length or size: everything passed on from here is a packed array of our own, in
this machine's byte order. Depth is reduced to 8 bits by us, because the two differ there (cv_bridge
rounds, rosbags-image truncates).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ModelError, as_vlm_error, bad_image
from librobot_vlm_ros.core.images.encodings import Encoding
from librobot_vlm_ros.core.logtext import escape_for_log

_logger = logging.getLogger(__name__)

_Convert = Callable[[Any, str], Any]
"""(message-like object, wanted encoding) -> array"""

_PROBE_TIMEOUT_S = 60.0


@functools.lru_cache(maxsize=1)
def _converter() -> tuple[str, _Convert]:
    """Name and function of who converts: "cv_bridge" or "rosbags-image".

    A cv_bridge that is installed and does not work is said in the log.
    """
    if _is_installed("cv_bridge"):
        fault = _cv_bridge_fault()
        if fault is None:
            bridge = importlib.import_module("cv_bridge")
            return "cv_bridge", bridge.CvBridge().imgmsg_to_cv2
        _logger.warning(
            "cv_bridge is installed but not usable (%s); images are converted by rosbags-image",
            escape_for_log(fault),
        )
    try:
        convert: _Convert = importlib.import_module("rosbags.image").image_to_cvimage
    except ImportError as exc:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"neither cv_bridge nor rosbags-image can be imported ({exc})",
            "Install one of them: 'apt install ros-$ROS_DISTRO-cv-bridge', or "
            "'pip install rosbags-image opencv-python-headless'.",
        ) from exc
    check_converter(convert)
    return "rosbags-image", convert


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # an entry of sys.modules that keeps it from being imported
        return False


def _cv_bridge_fault() -> str | None:
    """Why cv_bridge cannot be used, None when it can.

    Tried in a process of its own: one that was built for NumPy 1 imports well under NumPy 2 and
    then ends the process with a segmentation fault (seen with cv_bridge 1.16 and NumPy 2.4).
    """
    code = (
        "import cv_bridge; from librobot_vlm_ros.core.images.converter import check_converter; "
        "check_converter(cv_bridge.CvBridge().imgmsg_to_cv2)"
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"{type(exc).__name__}: {exc}"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"it ends the process with {name}, it may be built for another NumPy"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def check_converter(convert: _Convert) -> None:
    """Sends one pixel through; `RuntimeError`, or what `convert` raises, when it does not work."""
    pixel = np.array([[[1, 2, 3]]], np.uint8)
    if np.asarray(convert(_message(pixel, "bgr8"), "rgb8")).tolist() != [[[3, 2, 1]]]:
        raise RuntimeError("a bgr8 pixel did not come back as rgb8")


def _message(packed: npt.NDArray[Any], encoding: str) -> SimpleNamespace:
    """What both converters read of a `sensor_msgs/Image`."""
    return SimpleNamespace(
        height=packed.shape[0],
        width=packed.shape[1],
        encoding=encoding,
        is_bigendian=int(sys.byteorder == "big"),
        step=packed.strides[0],
        data=packed.reshape(-1).view(np.uint8),
    )


def to_rgb8(packed: npt.NDArray[Any], encoding: Encoding) -> npt.NDArray[np.uint8]:
    """`packed` (C-contiguous [H, W] or [H, W, C], uint8 or native uint16) as RGB uint8 [H, W, 3].

    Raises `ImageError` (BAD_IMAGE) when the converter fails, `InferenceError` (OUT_OF_MEMORY).
    """
    name, wanted = encoding.name, "rgb8"
    if encoding.bytes_per_value == 2:
        if encoding.kind == "bayer":  # demosaiced at full depth, since it averages neighbours
            wanted = "rgb16"
        else:
            packed, name = sixteen_to_eight(packed), f"{encoding.kind}8"
    if name == "yuv422_yuy2":  # not every cv_bridge knows it: Y U Y V -> U Y V Y
        packed, name = packed.view(np.uint16).byteswap().view(np.uint8), "yuv422"
    converter, convert = _converter()
    if name == wanted:
        colour: Any = packed
    else:
        try:
            colour = convert(_message(packed, name), wanted)
        except MemoryError as exc:
            raise as_vlm_error(exc) from exc
        except Exception as exc:
            raise bad_image(
                f"{converter} cannot convert {encoding.name}: {type(exc).__name__}: {exc}"
            ) from exc
    if isinstance(colour, np.ndarray) and colour.dtype == np.uint16:
        colour = sixteen_to_eight(colour)
    if (
        not isinstance(colour, np.ndarray)
        or colour.dtype != np.uint8
        or colour.shape != (*packed.shape[:2], 3)
    ):
        raise bad_image(f"{converter} gave no RGB image for encoding {encoding.name}")
    return colour


def sixteen_to_eight(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """0..65535 to 0..255, to the nearest: round(v * 255 / 65535) = round(v / 257)."""
    # (255 v + 32895) >> 16 equals round(v / 257) for every 16-bit v, and needs no division.
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled += 32895
    scaled >>= 16
    return scaled.astype(np.uint8)
