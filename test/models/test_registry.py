"""Names to models, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from librobot_vlm_ros.core import TASKS, ErrorCode, ModelError
from librobot_vlm_ros.models import (
    ModelInfo,
    create_vlm,
    get_vlm,
    list_vlms,
    model_info,
    models_with_task,
    register_vlm,
    registry,
)
from librobot_vlm_ros.models.catalog import CATALOG


def test_importing_the_models_and_using_the_fake_imports_no_torch() -> None:
    code = (
        "import sys, librobot_vlm_ros.models as m; m.list_vlms(); m.create_vlm('fake');"
        "m.model_info('florence-2-base'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_row_of_the_catalogue_has_a_class_that_answers_for_it() -> None:
    for info in CATALOG:
        assert isinstance(get_vlm(info.name), type), info.name


def test_tasks_of_the_catalogue_are_common_names() -> None:
    for info in CATALOG:
        assert set(info.tasks) <= set(TASKS), info.name
        assert list(info.tasks) == sorted(info.tasks), info.name


def test_names_and_aliases_are_unique() -> None:
    names = [name for info in CATALOG for name in (info.name, *info.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() for name in names)


def test_a_downloadable_model_is_pinned_to_a_commit() -> None:
    for info in CATALOG:
        if info.default_pretrained:
            assert len(info.pinned_revision or "") == 40, info.name


def test_an_unknown_name_gives_the_nearest_ones() -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm("florense-2-base")
    assert caught.value.code == ErrorCode.UNKNOWN_MODEL
    assert "florence-2-base" in caught.value.hint


def test_an_alias_in_any_case_finds_its_model() -> None:
    assert model_info("microsoft/Florence-2-base").name == "florence-2-base"


def test_the_fake_model_is_never_offered_as_a_way_to_do_a_task() -> None:
    assert models_with_task("caption")
    assert "fake" not in models_with_task("caption")


def test_memory_follows_from_parameters_and_dtype() -> None:
    info = model_info("florence-2-base")
    assert info.memory_bytes("float32") == 4 * info.parameters
    assert info.memory_bytes("float16") == 2 * info.parameters
    assert info.memory_bytes("nf4") == info.parameters // 2


@pytest.fixture
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.mark.usefixtures("_clean_registry")
def test_a_class_from_elsewhere_registers_with_a_row_of_its_own() -> None:
    info = ModelInfo("mine", "elsewhere.mine", "mine", 1, ("caption",), "MIT", requires=())

    @register_vlm(info=info)
    class Mine:
        @classmethod
        def create(cls, name: str, **options: object) -> str:
            return name

    assert "mine" in list_vlms()
    assert create_vlm("mine") == "mine"


@pytest.mark.usefixtures("_clean_registry")
def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="belongs to"):

        @register_vlm("fake")
        class Other: ...


def test_a_name_without_a_row_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="no catalogue row"):
        register_vlm("nothing-of-the-kind")


@pytest.mark.usefixtures("_clean_registry")
def test_a_missing_package_is_named() -> None:
    info = ModelInfo(
        "needy", "no_such_package.inside", "x", 1, (), "MIT", requires=("no_such_package",)
    )
    registry._rows["needy"] = info
    with pytest.raises(ModelError, match="no_such_package") as caught:
        create_vlm("needy")
    assert caught.value.code == ErrorCode.MISSING_DEPENDENCY


def test_models_and_processors_are_at_most_three_classes_of_ours_deep() -> None:
    from librobot_vlm_ros.models.processor import Processor

    found = {get_vlm(info.name) for info in CATALOG}
    bases = [Processor]
    while bases:  # the families' modules are imported now, and so their processors are known
        found.update(bases)
        bases = [below for base in bases for below in base.__subclasses__()]
    assert len(found) > 8
    for cls in found:
        ours = [base for base in cls.__mro__ if base.__module__.startswith("librobot_vlm_ros.")]
        assert len(ours) <= 3, ours
