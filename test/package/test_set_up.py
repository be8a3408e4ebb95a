"""The set-up: what it repairs, when it does a step again, what it says when a thing is missing."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


# --- repairs -------------------------------------------------------------------------------------

WHEEL_TARGET = """set_target_properties(std_msgs::std_msgs__rosidl_generator_py PROPERTIES
  INTERFACE_INCLUDE_DIRECTORIES "/opt/python/cp312-cp312/include/python3.12;/opt/python/\
cp312-cp312/lib/python3.12/site-packages/numpy/_core/include"
)
"""


def test_the_builders_paths_become_this_environments(tmp_path: Path) -> None:
    from repair_wheels import repair_folder

    broken = tmp_path / "std_msgs" / "cmake" / "export.cmake"
    broken.parent.mkdir(parents=True)
    broken.write_text(WHEEL_TARGET)
    fine = tmp_path / "fine.cmake"
    fine.write_text("set(x /opt/ros/jazzy/include)\n")

    changed = repair_folder(tmp_path, "/usr/include/python3.12", r"/home/a\1/.venv/site-packages")

    assert changed == [broken]
    text = broken.read_text()
    assert '"/usr/include/python3.12;/home/a\\1/.venv/site-packages/numpy/_core/include"' in text
    assert fine.read_text() == "set(x /opt/ros/jazzy/include)\n"


def test_a_second_repair_finds_nothing_to_do(tmp_path: Path) -> None:
    from repair_wheels import repair_folder

    (tmp_path / "export.cmake").write_text(WHEEL_TARGET)
    assert len(repair_folder(tmp_path, "/inc", "/site")) == 1
    assert repair_folder(tmp_path, "/inc", "/site") == []


# --- steps ---------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with all that the keys of the steps are made of."""
    for name in ("requirements.txt", "constraints.txt", "requirements-tabletop.txt"):
        (tmp_path / name).write_text(f"# {name}\n")
    for name in ("CMakeLists.txt", "package.xml"):
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "msg").mkdir()
    (tmp_path / "msg" / "A.msg").write_text("bool a\n")
    (tmp_path / "librobot_vlm_ros").mkdir()
    (tmp_path / "librobot_vlm_ros" / "a.py").write_text("a = 1\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "repair_wheels.py").write_text("# repairs\n")
    return tmp_path


def make_all_done(checkout: Path, extras: tuple[str, ...] = ()) -> None:
    from set_up_steps import SetUp

    set_up = SetUp(checkout, extras)
    set_up.python.parent.mkdir(parents=True, exist_ok=True)
    set_up.python.touch()
    (checkout / "install").mkdir(exist_ok=True)
    (checkout / "install" / "setup.bash").touch()
    set_up.stamps.mkdir(exist_ok=True)
    for step in set_up.steps:
        (set_up.stamps / step.name).write_text(step.key)


def due(checkout: Path, extras: tuple[str, ...] = ()) -> list[str]:
    from set_up_steps import SetUp

    return SetUp(checkout, extras).due()


def test_a_fresh_checkout_needs_every_step(checkout: Path) -> None:
    assert due(checkout) == ["venv", "requirements", "repairs", "build"]


def test_nothing_is_due_once_all_is_done(checkout: Path) -> None:
    make_all_done(checkout)
    assert due(checkout) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("requirements.txt", ["requirements", "repairs", "build"]),
        ("constraints.txt", ["requirements", "repairs", "build"]),
        ("tools/repair_wheels.py", ["repairs", "build"]),
        ("msg/A.msg", ["build"]),
        ("msg/New.msg", ["build"]),
        ("CMakeLists.txt", ["build"]),
        ("librobot_vlm_ros/new.py", ["build"]),  # must be linked into the installation
        ("librobot_vlm_ros/a.py", []),  # is linked already: an edit counts at once
        ("librobot_vlm_ros/__pycache__/a.cpython-311.pyc", []),
        ("README.md", []),
    ],
)
def test_a_change_makes_due_what_depends_on_it(
    checkout: Path, path: str, expected: list[str]
) -> None:
    make_all_done(checkout)
    (checkout / path).parent.mkdir(exist_ok=True)
    with (checkout / path).open("a") as file:
        file.write("# changed\n")
    assert due(checkout) == expected


def test_a_lost_installation_is_built_again(checkout: Path) -> None:
    make_all_done(checkout)
    shutil.rmtree(checkout / "install")
    assert due(checkout) == ["build"]


def test_an_extra_is_due_only_where_it_is_asked_for(checkout: Path) -> None:
    make_all_done(checkout)
    assert due(checkout, ("tabletop",)) == ["requirements-tabletop"]
    make_all_done(checkout, ("tabletop",))
    assert due(checkout, ("tabletop",)) == []
    assert due(checkout) == []


def test_a_checkout_that_was_moved_is_set_up_anew(checkout: Path, tmp_path: Path) -> None:
    make_all_done(checkout)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in list(checkout.iterdir()):
        if path != moved:
            shutil.move(path, moved / path.name)
    assert due(moved) == ["venv", "requirements", "repairs", "build"]


def test_a_step_that_fails_is_due_again_and_says_why(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from progress import CommandError
    from set_up_steps import SetUp, SetUpError

    make_all_done(checkout)
    (checkout / "msg" / "A.msg").write_text("bool b\n")
    with SetUp(checkout) as set_up:
        log = checkout / "build.log"

        def fail() -> None:
            raise CommandError(["colcon"], 2, log, "A.msg:1: no such type\n")

        set_up.steps[3] = type(set_up.steps[3])("build", "build", set_up.steps[3].key, fail)
        with pytest.raises(SetUpError, match=r"(?s)no such type.*build\.log.*again"):
            set_up.run()
    assert "[set-up 4/4] build" in capsys.readouterr().out
    (checkout / "msg" / "A.msg").write_text("bool a\n")
    assert due(checkout) == ["build"], "half done is not done, though the key is the old one again"


def test_only_the_steps_that_are_due_run_and_each_is_announced(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from set_up_steps import SetUp

    make_all_done(checkout)
    (checkout / "tools" / "repair_wheels.py").write_text("# better repairs\n")
    ran = []
    with SetUp(checkout) as set_up:
        set_up.steps = [
            type(step)(step.name, step.title, step.key, lambda name=step.name: ran.append(name))
            for step in set_up.steps
        ]
        set_up.run()
    assert ran == ["repairs", "build"]
    said = capsys.readouterr().out
    assert "[set-up 3/4]" in said
    assert "[set-up 4/4]" in said
    assert "[set-up 2/4]" not in said
    assert "ready after" in said
    assert due(checkout) == []


def test_links_of_deleted_modules_are_removed_from_the_installation(tmp_path: Path) -> None:
    from set_up_steps import remove_dangling_links

    (tmp_path / "kept.py").touch()
    (tmp_path / "good.py").symlink_to(tmp_path / "kept.py")
    (tmp_path / "bad.py").symlink_to(tmp_path / "deleted.py")
    assert remove_dangling_links(tmp_path) == [tmp_path / "bad.py"]
    assert (tmp_path / "good.py").is_symlink()


# --- prerequisites -------------------------------------------------------------------------------


def missing(root: Path | str = "/home/robot/vlm", **machine: object) -> str:
    from prerequisites import missing_prerequisites

    complete: dict[str, object] = {
        "which": lambda name: f"/usr/bin/{name}",
        "has_module": lambda name: True,
        "free_bytes": lambda path: 10**12,
        "machine": "Linux x86_64",
    }
    return "\n".join(missing_prerequisites(root, **{**complete, **machine}))


def test_a_complete_machine_lacks_nothing() -> None:
    assert missing() == ""


def test_missing_compilers_come_with_one_line_that_installs_them() -> None:
    text = missing(which=lambda name: None if name in ("gcc", "g++") else name)
    assert "Not found: gcc, g++." in text
    assert "sudo apt-get update && sudo apt-get install -y gcc g++" in text
    assert "make" not in text


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_names_the_package(module: str) -> None:
    text = missing(has_module=lambda name: name != module)
    assert f"python3.{sys.version_info[1]}-venv" in text
    assert "apt-get install -y" in text


def test_a_full_disk_is_said_before_anything_is_downloaded() -> None:
    text = missing(free_bytes=lambda path: 10**9)
    assert "1.0 GB are free" in text
    assert "needs 4 GB" in text
    assert missing(free_bytes=lambda path: 10**9, installing=False) == ""


def test_another_processor_is_sent_to_a_ros_installation() -> None:
    text = missing(machine="Linux aarch64")
    assert "aarch64" in text
    assert "colcon" in text


@pytest.mark.parametrize("root", ["/home/robot/my code/vlm", "/home/$USER/vlm", "/home/a:b/vlm"])
def test_a_path_that_cmake_cannot_take_is_refused(root: str) -> None:
    assert "move the checkout" in missing(root)


def test_the_extra_that_needs_an_older_python_says_so() -> None:
    text = missing(extras=["tabletop"], python=(3, 12))
    assert "stop at Python 3.11; this is 3.12" in text
    assert "PYTHON=" in text
    assert missing(extras=["tabletop"], python=(3, 11)) == ""
    assert missing(python=(3, 12)) == ""


def test_an_old_python_is_told_what_to_install(tmp_path: Path) -> None:
    # The file itself must be readable to an old interpreter, or it could not say so.
    script = (
        "import sys; sys.version_info = (3, 8, 10, 'final', 0)\n"
        f"sys.argv = ['set_up.py']; sys.path.insert(0, {str(TOOLS)!r})\n"
        "import set_up; set_up.use_supported_python()\n"
    )
    empty = {**os.environ, "PATH": str(tmp_path)}  # no other Python to go on in
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=empty)
    assert done.returncode == 1
    assert "3.10 to 3.13 is needed, this is 3.8" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="a ROS installation, no set-up of ours")
def test_another_sourced_ros_is_not_mixed_in() -> None:
    sourced = {
        "PYTHONPATH": "/opt/ros/other/lib/python3/site-packages",
        "AMENT_PREFIX_PATH": "/opt/ros/other",
        "CMAKE_PREFIX_PATH": "/opt/ros/other",
        "LD_LIBRARY_PATH": "/opt/ros/other/lib",
        "RMW_IMPLEMENTATION": "rmw_other",
    }
    done = subprocess.run(
        ["bash", str(TOOLS / "run"), "env"],
        capture_output=True,
        text=True,
        env={**os.environ, **sourced},
        check=True,
    )
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert [
        name for name, value in environment.items() if "ros/other" in value or value == "rmw_other"
    ] == []
    assert environment["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert environment["AMENT_PREFIX_PATH"].endswith(str(ROOT / ".venv"))


def test_without_a_set_up_the_environment_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("run", "env.sh"):
        shutil.copy(TOOLS / name, tmp_path / "tools" / name)
    done = subprocess.run(
        ["bash", str(tmp_path / "tools" / "run"), "true"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "make setup" in done.stderr


# --- commands that take minutes ------------------------------------------------------------------


def test_a_failing_command_shows_its_end_and_keeps_all_of_it(tmp_path: Path) -> None:
    from progress import CommandError, run_logged

    log = tmp_path / "log"
    script = "print('first'); print('Read timed out.'); raise SystemExit(3)"
    with pytest.raises(CommandError) as caught:
        run_logged([sys.executable, "-c", script], log, summarise=str)
    assert caught.value.code == 3
    assert caught.value.looks_like_network
    assert log.read_text().splitlines() == ["first", "Read timed out."]


def test_a_missing_package_is_not_taken_for_a_network_failure(tmp_path: Path) -> None:
    from progress import CommandError

    text = "ERROR: No matching distribution found for torch==2.13.0"
    assert not CommandError(["pip"], 1, tmp_path / "log", text).looks_like_network


def test_progress_is_one_overwritten_line_on_a_terminal() -> None:
    from progress import Ticker

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Ticker(screen) as ticker:
        ticker.say("downloading torch")
        ticker._tick()
    assert "\n" not in screen.getvalue()
    assert "downloading torch" in screen.getvalue()
    assert screen.getvalue().endswith("\r\033[K")


def test_what_pip_and_make_write_is_told_in_a_few_words() -> None:
    from set_up_steps import build_progress, pip_progress

    assert pip_progress("Collecting numpy==2.4.6 (from -r requirements.txt (line 20))") == (
        "Collecting numpy==2.4.6"
    )
    assert pip_progress("Installing collected packages: a, b, c") == "unpacking 3 packages"
    assert pip_progress("WARNING: something") is None
    assert build_progress("[ 34%] Building C object CMakeFiles/x.dir/a/b.c.o") == "[ 34%] b.c.o"
    assert build_progress("[ 66%] Generating Python code") == "[ 66%] Generating Python code"
