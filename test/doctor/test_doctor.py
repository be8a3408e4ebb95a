"""`librobot-vlm doctor`: says what is wrong on this machine and how to mend it, and never falls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from librobot_vlm_ros.cli.main import main
from librobot_vlm_ros.doctor import model as doctor_model
from librobot_vlm_ros.doctor import system as doctor_system
from librobot_vlm_ros.doctor.child_process import ask_python, last_words
from librobot_vlm_ros.doctor.finding import Finding, found_by
from librobot_vlm_ros.doctor.model import MINIMUM, ModelDoctor
from librobot_vlm_ros.models import model_info
from librobot_vlm_ros.models.checkpoints.hub import weights_present
from librobot_vlm_ros.ros import dds as transport

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
TORCH = {"fact": "torch", "version": "2.13.0+cu130", "cuda_build": "13.0"}
GPU = {"name": "GPU", "free": 10 * GIB, "total": 12 * GIB, "capability": "8.6"}


def facts_of(
    *, free: int | None = None, torch: Any = TORCH, gpus: Any = (), dtype: str = "float32"
) -> list[dict[str, Any]]:
    device = "cpu" if free is None else "cuda:0"
    return [
        torch,
        {"fact": "cuda", "gpus": list(gpus)},
        {"fact": "transformers", "version": "5.17.0"},
        {"fact": "placement", "device": device, "dtype": dtype, "free_bytes": free},
    ]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelDoctor]:
    """`doctor(facts, probed=[...], why="")`: one that is told these facts of the machine."""

    def make(
        facts: list[dict[str, Any]],
        *,
        name: str = "florence-2-base",
        weights: str = "",
        probed: Any = (),
        why: str = "",
        dtype: str = "auto",
    ) -> ModelDoctor:
        def ask(asked: dict[str, Any], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
            made.asked = asked  # type: ignore[attr-defined]
            return (list(probed), why) if asked.get("probe") else (facts, why)

        monkeypatch.setattr(doctor_model, "ask_torch", ask)
        made = ModelDoctor(model_info(name), weights, "auto", dtype)
        return made

    return make


def statuses(findings: Any) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def test_this_machine_is_looked_at_with_the_model_that_ships(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    code = main(["doctor", "--model", "florence-2-tabletop", "--device", "cpu", "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["checks"]}
    assert {"python", "numpy", "torch", "cuda", "transformers", "flash-attn", "bitsandbytes",
            "cv_bridge", "ros", "/dev/shm", "memory", "weights"} <= set(rows)  # fmt: skip
    assert rows["NaN probe float32"]["status"] == "ok"
    assert "florence-2-tabletop" in rows["NaN probe float32"]["value"]
    assert {"NaN probe float16", "NaN probe bfloat16"} <= set(rows)
    problems = [row for row in rows.values() if row["status"] == "problem"]
    assert report["ok"] == (not problems) == (code == 0)
    for row in rows.values():
        assert row["status"] == "ok" or row["fix"], row


def test_what_is_missing_or_broken_ends_nothing(tmp_path: Path) -> None:
    stubs = {
        "torch": "raise ModuleNotFoundError(\"No module named 'torch'\")",
        "cv2": "raise ImportError('libGL.so.1: cannot open shared object file')",
        "rclpy": "import os; os.abort()",
        "cv_bridge": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "flash_attn": "raise ImportError('undefined symbol: _ZN3c10')",
        "bitsandbytes": "raise RuntimeError('CUDA Setup failed')",
    }
    for name, text in stubs.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "librobot_vlm_ros.cli", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    assert rows["torch"]["status"] == "problem"
    assert rows["torch"]["fix"] == "pip install torch"
    assert rows["opencv"]["status"] == "problem"
    assert "libGL" in rows["opencv"]["value"]
    assert rows["middleware"]["status"] == "problem"
    assert "SIGABRT" in rows["middleware"]["value"]
    assert rows["cv_bridge"]["status"] == "warning"
    assert "SIGSEGV" in rows["cv_bridge"]["value"]
    assert "numpy<2" in rows["cv_bridge"]["fix"]
    assert rows["flash-attn"]["status"] == rows["bitsandbytes"]["status"] == "warning"
    assert "undefined symbol" in rows["flash-attn"]["value"]
    assert "weights" in rows


def test_without_ros_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_system.importlib.util, "find_spec", lambda name: None)
    (found,) = doctor_system.check_ros()
    assert found.status == "warning"
    assert "source /opt/ros/" in found.fix


def test_a_check_that_fails_itself_is_a_finding() -> None:
    def check() -> Any:
        yield Finding("a", "ok", "fine")
        raise ZeroDivisionError("oh")

    first, second = found_by("b", check)
    assert (first.name, second.name, second.status) == ("a", "b", "warning")
    assert "ZeroDivisionError: oh" in second.value


def test_a_process_that_hangs_or_dies_keeps_what_it_had_said() -> None:
    facts, why = ask_python("tell(a=1)\nimport time\ntime.sleep(60)", timeout_s=3.0)
    assert (facts, why) == ({"a": 1}, "it did not end within 3 s")
    facts, why = ask_python("print('noise'); tell(a=2)\nraise SystemExit('because')")
    assert (facts, why) == ({"a": 2}, "because")


def test_an_exception_is_told_whole_and_a_long_one_by_its_two_ends() -> None:
    why = "ImportError: /opt/lib.so: no symbol\nThe C extension is not there.\nSee https://x\n"
    assert last_words(f"noise\nTraceback (most recent call last):\n  File\n{why}") == (
        "ImportError: /opt/lib.so: no symbol The C extension is not there. See https://x"
    )
    told = last_words("RuntimeError: cannot load " + "/a/long/path " * 100 + "for this reason")
    assert len(told) <= 310
    assert told.startswith("RuntimeError: cannot load /a/long/path ")
    assert "/a/long/path ... /a/long/path" in told
    assert told.endswith("for this reason")
    assert last_words(" \n") == ""


def test_memory_is_held_against_the_model_by_dtype(doctor: Callable[..., ModelDoctor]) -> None:
    def memory(free: int, name: str, dtype: str = "float16") -> Finding:
        made = doctor(facts_of(free=free, gpus=[GPU], dtype=dtype), name=name)
        list(made.check_libraries())
        (found,) = made.check_memory()
        return found

    assert memory(10 * GIB, "florence-2-base").status == "ok"
    tight = memory(10 * GIB, "qwen2-vl-7b")
    assert tight.status == "warning"
    assert tight.fix == "quantization:=int8"
    assert memory(10 * GIB, "qwen2-vl-2b", "float32").status == "ok"
    wide = memory(9 * GIB, "qwen2-vl-2b", "float32")
    assert (wide.status, wide.fix) == ("warning", "dtype:=float16")
    assert memory(GIB, "llava-v1.5-13b").status == "problem"


@pytest.mark.parametrize(
    ("fact", "status", "fix"),
    [
        ({"dtype": "float32", "finite": True}, "ok", ""),
        ({"dtype": "float16", "finite": False}, "warning", "dtype:=bfloat16"),
        ({"dtype": "float32", "finite": False}, "problem", "damaged"),
        ({"dtype": "float32", "error": "OUT_OF_MEMORY(401): x."}, "problem", "error says"),
        ({"dtype": "bfloat16", "error": "INTERNAL(900): x."}, "warning", "leave bfloat16"),
    ],
)
def test_nan_is_told_by_dtype(
    doctor: Callable[..., ModelDoctor], fact: dict[str, Any], status: str, fix: str
) -> None:
    made = doctor(facts_of(), probed=[{"fact": "probe", "seconds": 1.0, **fact}])
    list(made.check_libraries())
    (found,) = made.check_answers()
    assert found.status == status
    assert fix in found.fix


def test_a_probe_that_ends_the_process_is_a_problem(doctor: Callable[..., ModelDoctor]) -> None:
    made = doctor(facts_of(), why="")
    list(made.check_libraries())
    made = doctor(facts_of(), why="the process was ended by SIGILL")
    made._placed = {"device": "cpu", "dtype": "float32", "free_bytes": None}
    (found,) = made.check_answers()
    assert found.status == "problem"
    assert "SIGILL" in found.value


def test_own_weights_are_probed_where_they_are_here(doctor: Callable[..., ModelDoctor]) -> None:
    made = doctor(facts_of(free=9 * GIB, gpus=[GPU]), name="florence-2-tabletop")
    for check in (made.check_libraries, made.check_memory, made.check_weights, made.check_answers):
        list(check())
    assert made.asked["own"] is True  # type: ignore[attr-defined]
    assert set(made.asked["dtypes"]) == {"float32", "float16", "bfloat16"}  # type: ignore[attr-defined]


def test_gpus_that_torch_cannot_use_are_told(
    doctor: Callable[..., ModelDoctor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cuda(**facts: Any) -> Finding:
        found = {f.name: f for f in doctor(facts_of(**facts)).check_libraries()}
        return found["cuda"]

    monkeypatch.setattr(doctor_model.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert "CPU build" in cuda(torch={**TORCH, "cuda_build": None}).value
    assert "driver" in cuda().fix
    assert cuda(gpus=[GPU]).status == "ok"
    monkeypatch.setattr(doctor_model.glob, "glob", lambda pattern: [])
    assert cuda().status == "ok"


def test_old_versions_are_problems(doctor: Callable[..., ModelDoctor]) -> None:
    old = doctor(facts_of(torch={**TORCH, "version": "2.3.1"}))
    assert statuses(old.check_libraries())["torch"] == "problem"
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name, numbers in MINIMUM.items():
        least = re.search(rf'"{name}>=([\d.]+)"', text)
        assert least is not None
        assert tuple(map(int, least[1].split("."))) == numbers


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_of_shards_that_is_none_is_told(
    doctor: Callable[..., ModelDoctor], tmp_path: Path, index: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").write_bytes(b"x")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    made = doctor(facts_of(), name="florence-2-base", weights=str(tmp_path))
    (found,) = made.check_weights()
    assert (found.status, "no index of shards" in found.value) == ("problem", True)
    assert "do it again" in found.fix


def test_weights_that_are_not_here_are_told_with_the_command(
    doctor: Callable[..., ModelDoctor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def weights(name: str = "florence-2-base", source: str = "") -> Finding:
        (found,) = doctor(facts_of(), name=name, weights=source).check_weights()
        return found

    base = model_info("florence-2-base")
    assert weights().status == "warning"
    assert (
        f"hf download {base.default_pretrained} --revision {base.pinned_revision}" in weights().fix
    )
    assert "weights:=" in weights().fix
    assert "model:=florence-2-tabletop" in weights().fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights().status == "problem"
    assert "weights:=" in weights().fix
    snapshot = tmp_path / "hub" / "models--microsoft--Florence-2-base" / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert weights().status == "problem"  # another revision than the pinned one
    snapshot.rename(snapshot.with_name(str(base.pinned_revision)))
    assert weights().status == "ok"
    assert weights_present(base)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "trial").write_text(str(base.pinned_revision))
    assert weights(source="microsoft/Florence-2-base@trial").status == "ok"
    assert weights(source="/no/such/folder").status == "problem"
    assert weights(name="florence-2-tabletop").status == "ok"
    folder = tmp_path / "mine"
    folder.mkdir()
    assert weights(source=str(folder)).status == "problem"
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(b"x")
    assert weights(source=str(folder)).status == "ok"
    index = {"weight_map": {"k": "a.safetensors", "l": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors" in weights(source=str(folder)).value
    assert list(doctor(facts_of(), name="fake").check_weights()) == []


def test_the_segment_of_the_profile_in_force_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE",
                 "FASTDDS_BUILTIN_TRANSPORTS", "RMW_IMPLEMENTATION"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_system.importlib.util, "find_spec", lambda name: object())

    def told() -> Finding:
        return next(f for f in doctor_system.check_transport() if f.name == "shared memory")

    monkeypatch.setattr(transport, "_NEEDED_BYTES", 0)
    assert told().status == "ok"
    assert "64 MiB" in told().value
    mine = tmp_path / "mine.xml"
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", str(mine))
    assert "cannot be read" in told().value
    mine.write_text("<dds><profiles/></dds>")
    assert told().status == "warning"
    assert "segment of 512 KiB, less than a 640x480 image" in told().value
    mine.write_text("<dds><useBuiltinTransports>false</useBuiltinTransports></dds>")
    assert "leaves it out" in told().value
    mine.write_text("<dds")
    assert "no XML" in told().value
    monkeypatch.delenv("FASTRTPS_DEFAULT_PROFILES_FILE")
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")
    assert "switched off" in told().value
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_cyclonedds_cpp")
    assert [f.name for f in doctor_system.check_transport()] == ["/dev/shm"]
    monkeypatch.delenv("RMW_IMPLEMENTATION")
    monkeypatch.setattr(doctor_system.importlib.util, "find_spec", lambda name: None)
    assert [f.name for f in doctor_system.check_transport()] == ["/dev/shm"]  # nothing is sent


def test_too_little_shared_memory_is_told_with_the_flag_for_containers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_system, "_NEEDED_BYTES", 2**60)
    found = {f.name: f for f in doctor_system.check_transport()}["/dev/shm"]
    assert found.status == "warning"
    assert "--shm-size" in found.fix


def test_people_see_lines_with_the_fix_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Finding("a", "ok", "fine"), Finding("b", "problem", "bad", "mend it")]
    monkeypatch.setattr("librobot_vlm_ros.doctor.examine", lambda *_, **__: rows)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "ok      a: fine\nPROBLEM b: bad\n        -> mend it\n"
    assert "1 problem, 0 warnings" in shown.err
    monkeypatch.setattr("librobot_vlm_ros.doctor.examine", lambda *_, **__: rows[:1])
    assert main(["doctor"]) == 0
    assert main(["doctor", "--model", "no-such"]) == 1
    assert "UNKNOWN_MODEL(300)" in capsys.readouterr().err
