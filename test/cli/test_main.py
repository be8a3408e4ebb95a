"""The command line as a user meets it: help, version, errors with codes, exit codes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from rectangle_bag import write_rectangle_bag

from librobot_vlm_ros import __version__
from librobot_vlm_ros.cli.main import COMMANDS, _parser, in_flags, main

Captured = pytest.CaptureFixture[str]


def test_help_names_every_command_and_the_exit_codes(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for command in COMMANDS:
        assert re.search(rf"\n    {command}\s", shown)
    assert "Exit codes" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_explains_its_arguments(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: librobot-vlm {command}" in shown
    assert len(shown.splitlines()) > 5


def test_hints_are_in_the_flags_that_a_command_has() -> None:
    flags = ["--weights", "--max-new-tokens"]
    assert in_flags("Example: weights:=/a/b, or model:=x", flags) == (
        "Example: --weights /a/b, or model:=x"
    )
    assert in_flags("max_new_tokens:=3", flags) == "--max-new-tokens 3"


@pytest.mark.parametrize("command", ["annotate", "ask"])
def test_ways_to_weights_are_told_as_the_command_takes_them(
    command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = {
        "annotate": [str(tmp_path / "bag"), str(tmp_path / "out"), "--tasks", "caption"],
        "ask": [str(Path(__file__).parents[2] / "docs" / "demo.png")],
    }[command]
    write_rectangle_bag(tmp_path / "bag", 2)
    assert main([command, *words, "--model", "florence-2-base"]) == 1
    said = capsys.readouterr().err
    assert "WEIGHTS_NOT_FOUND(301)" in said
    assert "--weights /path/to/folder" in said
    assert "--model florence-2-tabletop" in said
    assert ":=" not in said


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"librobot-vlm {__version__}\n"


def test_without_a_command_the_help_is_shown(capsys: Captured) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["dance"], ["query"], ["replay", "bag", "--rate", "0"], ["replay", "bag", "--remap", "/a"]],
)
def test_wrong_usage_ends_with_2(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_usage_is_that_of_the_command(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["query", "caption", "--no-such-option"])
    assert capsys.readouterr().err.startswith("usage: librobot-vlm query")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_is_understood(command: str) -> None:
    _, children, _ = _parser([command])
    examples = re.findall(
        rf"^  librobot-vlm ({command}\b.*)$", children[command].epilog or "", re.M
    )
    for example in examples:
        # Two blanks stand before what an example does.
        words = shlex.split(re.split(r" {3,}| > ", example)[0])
        children[command].parse_intermixed_args(words[1:])
    assert examples or command == "demo"


def test_options_may_stand_between_the_words() -> None:
    _, children, _ = _parser(["query"])
    args = children["query"].parse_intermixed_args(["ground", "--timeout", "5", "the red cube"])
    assert (args.task, args.prompt, args.timeout) == ("ground", "the red cube", 5.0)


def test_errors_are_printed_with_their_code(tmp_path: Path, capsys: Captured) -> None:
    assert main(["replay", str(tmp_path / "nothing")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("librobot-vlm replay: FILE_NOT_FOUND(604): ")
    assert "Errno" not in shown
    assert "Traceback" not in shown


def test_a_bag_that_is_cut_off_is_refused_with_its_code(tmp_path: Path, capsys: Captured) -> None:
    write_rectangle_bag(tmp_path / "bag", 3)
    file = tmp_path / "bag" / "bag.mcap"
    file.write_bytes(file.read_bytes()[:-500])
    assert main(["replay", str(tmp_path / "bag")]) == 1
    assert "BAG_TRUNCATED(607)" in capsys.readouterr().err


def test_a_demo_of_a_model_without_weights_says_so_and_leaves_nothing(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-hub"))
    write_rectangle_bag(tmp_path / "bag", 1)
    words = ["demo", "--model", "florence-2-base", "--bag", str(tmp_path / "bag")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "WEIGHTS_NOT_FOUND(301)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_demo_of_an_unknown_model_names_the_nearest(tmp_path: Path, capsys: Captured) -> None:
    assert main(["demo", "--model", "florence-2-tabeltop", "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "UNKNOWN_MODEL(300)" in shown
    assert "florence-2-tabletop" in shown


def test_a_defect_is_shown_with_its_traceback(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_args: object) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("librobot_vlm_ros.cli.models.main", broken)
    assert main(["models"]) == 1
    shown = capsys.readouterr().err
    assert "INTERNAL(900)" in shown
    assert "Traceback" in shown


@pytest.mark.parametrize("words", [["--help"], ["replay", "--help"], ["models"]])
def test_nothing_heavy_is_imported_for_it(words: list[str]) -> None:
    heavy = ("torch", "transformers", "rclpy", "rich")
    program = (
        "import sys\nfrom librobot_vlm_ros.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {heavy} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "HEAVY []"


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = "import sys\nfrom librobot_vlm_ros.cli.main import main\nsys.exit(main(['models']))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        shown = process.stderr.read()
    assert shown == ""


@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [(">&-", 1, "BAD_PARAMETER(204)"), ("2>&-", 0, ""), (">&- 2>&-", 1, "")],
)
def test_closed_streams_are_no_defect(closed: str, code: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m librobot_vlm_ros.cli models {closed}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ran.returncode == code
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert bool(ran.stdout) == (code == 0)


@pytest.mark.parametrize(
    ("error", "of_ros"),
    [
        (ModuleNotFoundError("No module named 'rclpy'", name="rclpy"), True),
        (ModuleNotFoundError("No module named", name="librobot_vlm_ros.srv"), True),
        (ModuleNotFoundError("No module named", name="diagnostic_msgs.msg"), True),
        (ImportError("librcl.so: cannot open\nThe C extension 'rclpy/_rclpy_pybind11.so'"), True),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), False),
        (ModuleNotFoundError("No module named", name="librobot_vlm_ros.nothing"), False),
    ],
)
def test_a_command_that_needs_ros_says_how_to_get_it(
    error: ImportError, of_ros: bool, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fails(args: object) -> int:
        raise error

    monkeypatch.setattr("librobot_vlm_ros.cli.query.main", fails)
    assert main(["query", "caption"]) == 1
    shown = capsys.readouterr().err
    assert "MISSING_DEPENDENCY(312)" in shown
    assert ("source install/setup.bash" in shown) == of_ros
    assert ("Install that package" in shown) != of_ros
