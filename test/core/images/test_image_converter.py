"""Who converts: cv_bridge where it works, rosbags-image elsewhere, and never in silence."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from librobot_vlm_ros.core import ErrorCode, ModelError, VlmError, decode_image
from librobot_vlm_ros.core.images import converter as convert_module

WORKS = "return np.ndarray((m.height, m.width, 3), np.uint8, m.data)[..., ::-1].copy()"


@pytest.fixture(autouse=True)
def fresh_choice():
    convert_module._converter.cache_clear()
    yield
    convert_module._converter.cache_clear()
    sys.modules.pop("cv_bridge", None)


@pytest.fixture
def no_bridge(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv_bridge", None)


@pytest.fixture
def install_bridge(tmp_path, monkeypatch):
    """Writes a module that looks like cv_bridge: `body` converts message `m` to `wanted`."""

    def install(body, before=""):
        lines = [
            "import os, signal, numpy as np",
            before,
            "class CvBridge:",
            "    calls = 0",
            "    def imgmsg_to_cv2(self, m, wanted):",
            "        self.calls += 1",
            f"        {body}",
        ]
        (tmp_path / "cv_bridge.py").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("cv_bridge", None)

    return install


def decode_bgr(colour=(1, 2, 3)):
    return decode_image(bytes(colour), height=1, width=1, encoding="bgr8", step=3).tolist()


def test_cv_bridge_is_taken_where_it_is_installed(install_bridge):
    install_bridge(WORKS)
    assert convert_module._converter()[0] == "cv_bridge"
    assert decode_bgr() == [[[3, 2, 1]]]


def test_rosbags_image_is_taken_elsewhere_without_a_word(no_bridge, caplog):
    assert convert_module._converter()[0] == "rosbags-image"
    assert decode_bgr() == [[[3, 2, 1]]]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("body", "before", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "", "SIGSEGV"),  # built for another NumPy
        ("raise AttributeError('_ARRAY_API not found')", "", "_ARRAY_API not found"),
        ("return np.zeros((1, 1, 3), np.uint8)", "", "did not come back"),
        (WORKS, "import libopencv_core_406", "libopencv_core_406"),
        ("os._exit(3)", "", "exit code 3"),
    ],
    ids=["crash", "exception", "wrong pixels", "missing library", "silent exit"],
)
def test_a_cv_bridge_that_does_not_work_is_said_and_passed_over(
    install_bridge, caplog, body, before, reason
):
    install_bridge(body, before)
    with caplog.at_level(logging.WARNING):
        assert convert_module._converter()[0] == "rosbags-image"
    assert "cv_bridge is installed but not usable" in caplog.text
    assert reason in caplog.text
    assert decode_bgr() == [[[3, 2, 1]]]


def test_a_cv_bridge_that_hangs_is_passed_over(install_bridge, monkeypatch, caplog):
    install_bridge("import time; time.sleep(60)")
    monkeypatch.setattr(convert_module, "_PROBE_TIMEOUT_S", 0.2)
    assert convert_module._converter()[0] == "rosbags-image"
    assert "TimeoutExpired" in caplog.text


def test_without_any_converter_the_error_names_both_ways(no_bridge, monkeypatch):
    monkeypatch.setitem(sys.modules, "rosbags.image", None)
    with pytest.raises(ModelError, match="rosbags-image") as caught:
        decode_bgr()
    assert caught.value.code is ErrorCode.MISSING_DEPENDENCY
    assert "cv-bridge" in caught.value.hint


def test_views_need_no_converter(no_bridge, monkeypatch):
    monkeypatch.setitem(sys.modules, "rosbags.image", None)
    image = decode_image(bytes([1, 2, 3]), height=1, width=1, encoding="rgb8", step=3)
    assert image.tolist() == [[[1, 2, 3]]]


FAILS_LATER = f"if bytes(m.data) == b'\\x01\\x02\\x03': {WORKS}\n        "


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise RuntimeError('OpenCV assertion failed')", ErrorCode.BAD_IMAGE),
        ("return None", ErrorCode.BAD_IMAGE),
        ("return np.zeros((1, 1), np.uint8)", ErrorCode.BAD_IMAGE),
        ("raise MemoryError", ErrorCode.OUT_OF_MEMORY),
    ],
)
def test_a_conversion_that_fails_is_a_coded_error(install_bridge, body, code):
    install_bridge(FAILS_LATER + body)
    assert decode_bgr() == [[[3, 2, 1]]]
    with pytest.raises(VlmError) as caught:
        decode_bgr((9, 9, 9))
    assert caught.value.code is code


def test_opencv_missing_is_a_coded_error(monkeypatch):
    from librobot_vlm_ros.core.images import compressed

    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModelError, match="opencv") as caught:
        compressed._opencv()
    assert caught.value.code is ErrorCode.MISSING_DEPENDENCY


def test_importing_the_core_loads_no_image_library_yet():

    code = (
        "import sys, librobot_vlm_ros.core;"
        "heavy = {'cv2', 'torch', 'rclpy', 'rosbags', 'cv_bridge', 'transformers'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
