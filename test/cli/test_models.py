"""`librobot-vlm models` lists the registry."""

from __future__ import annotations

import json

import pytest

from librobot_vlm_ros.cli.main import main
from librobot_vlm_ros.models import list_vlms, model_info


def test_every_model_is_listed_with_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for name in list_vlms():
        assert f"{name}: {', '.join(model_info(name).tasks)}" in shown


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(listed) == list_vlms()
    base = listed["florence-2-base"]
    assert base["parameters"] == model_info("florence-2-base").parameters > 0
    assert base["memory_bytes"]["float32"] == 2 * base["memory_bytes"]["float16"]
