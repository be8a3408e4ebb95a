"""package.xml, setup.py and the build tell the same story, and what they name exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

import librobot_vlm_ros

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "librobot_vlm_ros"

#: Import name -> the key of package.xml that brings it on a robot.
KEYS = {
    "PIL": "python3-pil",
    "ament_index_python": "ament_index_python",
    "cv2": "python3-opencv",
    "cv_bridge": "cv_bridge",
    "huggingface_hub": "python3-transformers-pip",
    "jinja2": "python3-jinja2",
    "launch": "launch",
    "launch_ros": "launch_ros",
    "mcap": "mcap-ros2-support",
    "numpy": "python3-numpy",
    "rclpy": "rclpy",
    "rich": "python3-rich",
    "rosbags": "python3-rosbags-pip",
    "safetensors": "python3-transformers-pip",
    "scipy": "python3-scipy",
    "tokenizers": "python3-transformers-pip",
    "torch": "python3-pytorch-pip",
    "tqdm": "python3-transformers-pip",
    "transformers": "python3-transformers-pip",
    "yaml": "rclpy",
}

#: Imported where it is there, done without where it is not; each use says so.
OPTIONAL = {"accelerate", "bitsandbytes", "faster_coco_eval", "peft", "sentencepiece"}
OPTIONAL |= {"pybullet", "pybullet_data", "pybullet_utils"}


def package_xml() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def dependencies() -> set[str]:
    return {node.text or "" for node in package_xml() if node.tag.endswith("depend")}


def foreign_imports() -> dict[str, Path]:
    """Top-level names of everything that the package imports from outside, and a file doing it."""
    found: dict[str, Path] = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], path)
    return {
        name: path
        for name, path in found.items()
        if name not in sys.stdlib_module_names and name != PACKAGE
    }


def test_one_version_everywhere() -> None:
    assert package_xml().findtext("version") == librobot_vlm_ros.__version__


def test_package_xml_says_what_the_design_says() -> None:
    root = package_xml()
    assert root.findtext("name") == PACKAGE
    assert root.findtext("license") == "MIT"
    assert root.findtext("export/build_type") == "ament_cmake"
    assert root.findtext("member_of_group") == "rosidl_interface_packages"


def test_everything_imported_is_brought_by_a_key_of_package_xml() -> None:
    declared = dependencies()
    unexplained = []
    for name, path in sorted(foreign_imports().items()):
        key = KEYS.get(name, name)  # a package of messages is its own key
        if key not in declared and name not in OPTIONAL:
            unexplained.append(f"{name} ({path.relative_to(ROOT)})")
    assert unexplained == []


def test_interfaces_depend_on_every_package_whose_messages_they_hold() -> None:
    used = set()
    for kind in ("msg", "srv", "action"):
        for path in ROOT.glob(f"{kind}/*.{kind}"):
            used |= set(re.findall(r"^(\w+)/\w+", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert used <= dependencies()
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    generated_with = re.search(r"DEPENDENCIES ([\w ]+)\)", cmake)
    assert generated_with
    assert used <= set(generated_with[1].split())


def test_every_executable_names_a_module_with_a_main() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    named = re.findall(r"^install_python_executable\(([\w-]+) ([\w.]+)\)", cmake, re.MULTILINE)
    assert {name for name, _ in named} == {"vlm_node", "librobot-vlm"}
    for _, module in named:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        functions = [node.name for node in ast.parse(source).body if hasattr(node, "name")]
        assert "main" in functions, module


def test_every_target_of_the_makefile_is_explained_and_none_lies() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE)) - {"help", "python"}
    explained = set(re.findall(r"\bmake ([a-z-]+)", text)) - {"help"}
    assert targets == explained
    for module in re.findall(r"-m (librobot_vlm_ros[\w.]+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_the_wheel_for_pip_holds_weights_bag_and_definitions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "msg", "srv", "action"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{PACKAGE}/core/errors.py" in names
    assert any(name.endswith("share/librobot_vlm_ros/msg/InferenceInfo.msg") for name in names)
    for folder in ("models", "bench", "bags", "demo"):
        data = [
            path
            for path in (ROOT / PACKAGE / folder).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        ]
        assert data
        for path in data:
            assert str(path.relative_to(ROOT)) in names


@pytest.mark.ros
def test_the_installation_holds_executables_launch_files_and_interfaces() -> None:
    from ament_index_python.packages import get_package_prefix

    prefix = Path(get_package_prefix(PACKAGE))
    for name in ("vlm_node", "librobot-vlm"):
        assert os.access(prefix / "lib" / PACKAGE / name, os.X_OK)
    share = prefix / "share" / PACKAGE
    assert (share / "msg" / "Caption.msg").is_file()
    assert (share / "package.xml").is_file()
    for folder in ("launch", "config"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert (share / folder / path.relative_to(ROOT / folder)).is_file()


@pytest.mark.ros
def test_a_sourced_workspace_has_the_command_on_its_path() -> None:
    from ament_index_python.packages import get_package_prefix

    prefix = Path(get_package_prefix(PACKAGE))
    for command in (prefix / "bin/librobot-vlm", prefix / f"lib/{PACKAGE}/librobot-vlm"):
        assert os.access(command, os.X_OK), command
    script = f". '{prefix}/share/{PACKAGE}/local_setup.bash' && command -v librobot-vlm"
    env = {**os.environ, "PATH": os.defpath}
    found = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == str(prefix / "bin/librobot-vlm"), found.stderr
