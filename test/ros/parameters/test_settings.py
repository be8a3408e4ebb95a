"""Parameters: declared once, validated before applied, the same for every way in. No ROS needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError, VlmError
from librobot_vlm_ros.ros.inputs.instruction import Instruction, standing_tasks
from librobot_vlm_ros.ros.model_loading import load_options, required_bytes
from librobot_vlm_ros.ros.parameters.arguments import (
    LAUNCH_PARAMETERS,
    arguments,
    given_arguments,
    logger_name,
    parse_values,
    ros_arguments,
    split_arguments,
)
from librobot_vlm_ros.ros.parameters.declaration import parameter_table
from librobot_vlm_ros.ros.parameters.parameter_syntax import parse_cameras, parse_tasks
from librobot_vlm_ros.ros.parameters.settings import PARAMETERS, Settings


def test_a_switch_asks_for_the_memory_of_the_model_that_is_wanted() -> None:
    from librobot_vlm_ros.models import model_info

    info = model_info("florence-2-base")
    wanted = Settings(model="florence-2-base")
    assert required_bytes(wanted, None) == info.memory_bytes("float32")
    assert required_bytes(wanted.changed(dtype="float16"), None) == info.memory_bytes("float16")
    assert required_bytes(Settings(model="fake"), None) is None  # as much as the present one


@pytest.mark.parametrize(
    ("model", "own"), [("florence-2-base", "microsoft/Florence-2-base"), ("fake", None)]
)
def test_a_model_config_without_weights_never_means_random_weights(
    model: str, own: str | None
) -> None:
    settings = Settings(model=model, model_config='{"use_flash_attn": true}')
    assert load_options(settings)["pretrained"] == own
    assert load_options(settings.changed(weights="a/b"))["pretrained"] == "a/b"
    shipped = load_options(settings.changed(model="tabletop"))["pretrained"]
    assert (Path(shipped) / "config.json").is_file()


def code_of(**values: Any) -> ErrorCode:
    with pytest.raises(VlmError) as caught:
        Settings(**values)
    return caught.value.code


def test_every_field_is_a_parameter_and_its_own_default_is_valid() -> None:
    assert list(PARAMETERS) == [field.name for field in dataclasses.fields(Settings)]
    defaults = Settings()
    for name, item in PARAMETERS.items():
        assert getattr(defaults, name) == item.default
        assert item.description.endswith(".")


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"queue_size": 0}, ErrorCode.BAD_PARAMETER),
        ({"queue_size": True}, ErrorCode.BAD_PARAMETER),
        ({"queue_size": 2.0}, ErrorCode.BAD_PARAMETER),
        ({"camera_timeout_s": float("nan")}, ErrorCode.BAD_PARAMETER),
        ({"camera_timeout_s": -1.0}, ErrorCode.BAD_PARAMETER),
        ({"min_score": 1.1}, ErrorCode.BAD_PARAMETER),
        ({"dtype": "fp8"}, ErrorCode.BAD_PARAMETER),
        ({"device": "gpu"}, ErrorCode.BAD_PARAMETER),
        ({"device": "mps"}, ErrorCode.BAD_PARAMETER),
        ({"device": "xpu:0"}, ErrorCode.BAD_PARAMETER),
        ({"image_topic": "/a//b"}, ErrorCode.BAD_PARAMETER),
        ({"image_topic": "/a b"}, ErrorCode.BAD_PARAMETER),
        ({"model_config": "["}, ErrorCode.BAD_PARAMETER),
        ({"model_config": "[]"}, ErrorCode.BAD_PARAMETER),
        ({"instruction": "x" * 5000}, ErrorCode.PROMPT_TOO_LONG),
        ({"tasks": "caption"}, ErrorCode.BAD_PARAMETER),
        ({"tasks": [1]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["capton"]}, ErrorCode.UNKNOWN_TASK),
        ({"tasks": ["caption@0"]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["caption@-1"]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["caption@fast"]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["caption@inf"]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["caption", "<CAPTION>@2"]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["rear:caption"]}, ErrorCode.UNKNOWN_CAMERA),
        ({"tasks": ["region_caption"]}, ErrorCode.BAD_PARAMETER),
        ({"tasks": ["caption"] * 65}, ErrorCode.BAD_PARAMETER),
        ({"cameras": ["front"]}, ErrorCode.BAD_PARAMETER),
        ({"cameras": ["a=/x", "a=/y"]}, ErrorCode.BAD_PARAMETER),
        ({"cameras": ["a=/x", "b=/x"]}, ErrorCode.BAD_PARAMETER),
        ({"cameras": ["a=/x:jpeg"]}, ErrorCode.BAD_PARAMETER),
    ],
)
def test_a_wrong_value_is_refused_with_its_code(values: dict[str, Any], code: ErrorCode) -> None:
    assert code_of(**values) == code


def test_an_integer_is_taken_for_a_number_and_blank_entries_are_left_out() -> None:
    settings = Settings(camera_timeout_s=3, tasks=["", " caption@2 "])
    assert settings.camera_timeout_s == 3.0
    assert isinstance(settings.camera_timeout_s, float)
    assert settings.tasks == ("caption@2",)


def test_tasks_are_read() -> None:
    tasks = parse_tasks(["<OD>@2.5", "front : ground @ 5 = a cup: red, @ home", "embed"], ["front"])
    assert [(t.task, t.rate_hz, t.camera, t.prompt) for t in tasks] == [
        ("detect", 2.5, "", ""),
        ("ground", 5.0, "front", "a cup: red, @ home"),
        ("embed", 0.0, "", ""),
    ]


def test_cameras_are_read() -> None:
    cameras = parse_cameras(["a=/a/image", "b = b/image:compressed"], "/unused", "raw")
    assert [(c.name, c.topic, c.compressed) for c in cameras] == [
        ("a", "/a/image", False),
        ("b", "b/image/compressed", True),
    ]
    (only,) = parse_cameras([], "/cam/compressed", "compressed")
    assert (only.name, only.topic) == ("camera", "/cam/compressed")


def test_a_task_that_needs_text_gets_its_own_prompt_or_the_instruction() -> None:
    settings = Settings(tasks=["caption", "ground", "ground=duck"])
    instruction = Instruction("red cube")
    tasks = standing_tasks(settings, instruction)
    assert [(t.prompt, t.instruction_id) for t in tasks] == [("", 0), ("red cube", 1), ("duck", 0)]
    assert len({task.name for task in tasks}) == 3


def test_an_instruction_keeps_its_number_until_the_text_changes() -> None:
    instruction = Instruction()
    assert instruction.number == 0
    assert [instruction.set(text) for text in ("a", "a", " a\n", "b", "", "a")] == [
        1,
        1,
        1,
        2,
        3,
        4,
    ]


def test_the_engine_is_told_what_the_parameters_say() -> None:
    config = Settings(queue_size=3, max_frame_age_s=0.5, lock_step=True).engine_config()
    assert (config.queue_size, config.max_frame_age_s, config.lock_step) == (3, 0.5, True)


def test_every_default_can_be_typed_as_an_argument() -> None:
    for item in arguments():
        if item.name in PARAMETERS and item.name != "autostart":
            assert parse_values({item.name: item.default}) == {
                item.name: PARAMETERS[item.name].default
            }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tasks", "caption@2, detect", ("caption@2", "detect")),
        ("tasks", "['ground=a, b', caption]", ("ground=a, b", "caption")),
        ("tasks", "", ()),
        ("tasks", "[]", ()),
        ("autostart", "False", False),
        ("queue_size", "4", 4),
        ("camera_timeout_s", "2", 2.0),
        ("instruction", "5", "5"),
    ],
)
def test_arguments_are_read_as_people_write_them(name: str, text: str, value: Any) -> None:
    assert parse_values({name: text}) == {name: value}


@pytest.mark.parametrize(
    ("name", "text"),
    [("queue_size", "4.5"), ("autostart", "yes"), ("camera_timeout_s", "soon"), ("tasks", "[")],
)
def test_an_argument_of_another_type_is_refused(name: str, text: str) -> None:
    with pytest.raises(VlmError) as caught:
        parse_values({name: text})
    assert name in caught.value.message


def test_words_are_split_and_unknown_names_get_the_nearest() -> None:
    assert split_arguments(["model:=a:=b"], ["model"]) == {"model": "a:=b"}
    with pytest.raises(VlmError, match="Did you mean model"):
        split_arguments(["modle:=a"], ["model"])


def test_a_device_that_is_refused_is_told_why() -> None:
    with pytest.raises(RequestError, match=r"expected auto, .* \(on mps, .* no model was tested\)"):
        Settings(device="mps")


def test_an_arguments_description_tells_its_bounds_and_its_examples_can_be_typed() -> None:
    described = {item.name: item.description for item in arguments()}
    assert "Expected: auto, cpu, cuda or cuda:N." in described["device"]
    assert "Expected: 1 to 1024." in described["queue_size"]
    assert "cameras:='front=/front/image_raw, wrist=" in described["cameras"]
    for name, item in PARAMETERS.items():
        for text in item.examples:
            values = {name: text, "cameras": "front=/front/image_raw"} | {name: text}
            assert name in parse_values(values)


def test_only_what_was_asked_for_is_passed_on() -> None:
    known = arguments(LAUNCH_PARAMETERS)
    texts = {item.name: item.default for item in known} | {"model": "fake"}
    assert given_arguments(texts, [], known) == {"model": "fake"}
    assert given_arguments(texts, ["dtype"], known) == {"model": "fake", "dtype": "auto"}


def test_the_name_space_is_part_of_the_loggers_name() -> None:
    assert logger_name("") == "vlm"
    assert logger_name("/a/b/") == "a.b.vlm"
    assert "__ns:=/a/b" in ros_arguments({"namespace": "a/b/"})


def test_the_documentation_holds_the_table_as_it_is_declared() -> None:
    text = (Path(__file__).parents[3] / "docs/parameters.md").read_text(encoding="utf-8")
    assert parameter_table(PARAMETERS) in text, "run: tools/run python tools/docs_tables.py"


def test_the_table_names_every_parameter_once() -> None:
    lines = parameter_table(PARAMETERS).splitlines()
    assert len(lines) == len(PARAMETERS) + 2
    assert {line.count(" | ") for line in lines[2:]} == {5}
