"""`librobot-vlm models` lists the registry, and checks it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from librobot_vlm_ros.cli.main import main
from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.checkpoints.hub import shipped_folder
from librobot_vlm_ros.models.testing import conformance


def test_every_model_is_listed_with_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for name in list_vlms():
        assert f"{name}: {', '.join(model_info(name).tasks)}" in shown
        assert model_info(name).licence in shown


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(listed) == list_vlms()
    base = listed["florence-2-base"]
    assert base["parameters"] == model_info("florence-2-base").parameters > 0
    memory = base["memory_bytes"]
    assert memory["float32"] == 2 * memory["float16"] == 4 * memory["int8"] == 8 * memory["nf4"]


def test_the_check_as_json_is_one_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = conformance.check_model

    def chatty(name: str) -> object:
        print("a library says something")
        return right(name)

    monkeypatch.setattr(conformance, "check_model", chatty)
    assert main(["models", "--check", "fake", "tabletop", "--json"]) == 0
    fake, tabletop = json.loads(capsys.readouterr().out)
    assert fake["tasks"] == list(model_info("fake").tasks)
    assert (fake["conversion_max_abs_diff"], fake["preprocess_max_abs_diff"]) == (None, None)
    assert tabletop["name"] == "florence-2-tabletop"
    assert tabletop["parameters"] == model_info("tabletop").parameters
    assert tabletop["preprocess_max_abs_diff"] <= tabletop["preprocess_tolerance"]
    assert fake["ok"] is tabletop["ok"] is True


def test_a_model_that_is_not_ok_gives_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = conformance.check_model
    monkeypatch.setattr(
        conformance,
        "check_model",
        lambda name: dataclasses.replace(right(name), ok=False, error="something is off"),
    )
    assert main(["models", "--check", "fake"]) == 1
    shown = capsys.readouterr()
    assert "NOT OK" in shown.out
    assert "fake: something is off" in shown.err


def test_an_unknown_model_is_a_coded_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--check", "florence-3"]) == 1
    assert "UNKNOWN_MODEL(300)" in capsys.readouterr().err


def test_memory_source_and_presence_stand_in_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["models", "florence-2-tabletop", "qwen2-vl-2b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["model", "parameters"]
    tabletop, qwen = lines[2], lines[3]
    assert "ships with the package" in tabletop
    assert tabletop.endswith("yes")
    for words in ("2.21 G", "8.2 GiB", "4.1 GiB", "Apache-2.0", "Qwen/Qwen2-VL-2B-Instruct"):
        assert words in qwen


def test_the_alias_7b_of_qwen3_says_that_it_is_the_8b(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "qwen3-vl-7b"]) == 0
    assert "qwen3-vl-7b is qwen3-vl-8b" in capsys.readouterr().out
    assert main(["models"]) == 0
    assert "qwen3-vl-7b is qwen3-vl-8b" in capsys.readouterr().out
    assert main(["models", "qwen3-vl-7b", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], "qwen3-vl-7b" in row["aliases"]) == ("qwen3-vl-8b", True)
    assert "8B" in row["description"]


def test_the_digest_of_a_folder_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    folder = shipped_folder() / "florence_2_tabletop"
    assert main(["models", "--sha256", str(folder)]) == 0
    data = (folder / "model.safetensors").read_bytes()
    assert capsys.readouterr().out.strip() == hashlib.sha256(data).hexdigest()
    assert main(["models", "--sha256", str(tmp_path)]) == 1
    assert "WEIGHTS_NOT_FOUND(301)" in capsys.readouterr().err
