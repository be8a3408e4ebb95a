"""`librobot-vlm convert`: every family's official layout into transformers' own, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402  needs torch

from librobot_vlm_ros.cli.main import main  # noqa: E402
from librobot_vlm_ros.core import ErrorCode, VlmError  # noqa: E402
from librobot_vlm_ros.models import create_vlm, load_module, model_info  # noqa: E402
from librobot_vlm_ros.models.catalog import CATALOG  # noqa: E402
from librobot_vlm_ros.models.checkpoints import conversion as converting  # noqa: E402
from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256  # noqa: E402
from librobot_vlm_ros.models.checkpoints.conversion import convert_folder  # noqa: E402
from librobot_vlm_ros.models.testing.conformance import hooks_of  # noqa: E402

#: One model of each family that has a published checkpoint.
MODELS = sorted({row.family: row.name for row in CATALOG if row.default_pretrained}.values())


def hooks(name: str) -> Any:
    return hooks_of(model_info(name))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny folder in a model's official layout; tests do not write to it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name.replace(".", "-")) / "official"
            hooks(name).write_official(made[name])
        return made[name]

    return make


def code_of(action: Callable[[], object]) -> ErrorCode:
    with pytest.raises(VlmError) as caught:
        action()
    return caught.value.code


@pytest.mark.parametrize("name", MODELS)
def test_the_native_folder_computes_what_the_official_one_does(
    name: str, official: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = official(name), tmp_path / "native"
    assert main(["convert", str(source), str(out), "--model", name, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == name
    assert said["sha256"] == weights_sha256(out)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]  # no partial folder stays
    before, after = (load_module(folder, "float32", "cpu") for folder in (source, out))
    for (key, one), (other, two) in zip(
        sorted(before.state_dict().items()), sorted(after.state_dict().items()), strict=True
    ):
        assert key == other
        assert torch.equal(one, two), key
    # Against the original arithmetic on the official folder's tensors.
    assert hooks(name).difference(source, after) <= 1e-4
    vlm = create_vlm(name, pretrained=str(out), device="cpu")
    assert vlm.tokenizer is not None

    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    assert hooks(name).difference(source, theirs) <= 1e-4
    assert AutoImageProcessor.from_pretrained(out) is not None


def test_the_tokenizer_of_the_folder_is_transformers_own_too(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    convert_folder(str(official("paligemma-3b")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    vlm = create_vlm("paligemma-3b", pretrained=str(tmp_path / "out"), device="cpu")
    assert tokenizer("a", add_special_tokens=False).input_ids == list(vlm.tokenizer.words("a"))


def test_the_family_is_known_by_the_folder(official: Callable[[str], Path], tmp_path: Path) -> None:
    for number, name in enumerate(MODELS):
        info, folder = converting._source(str(official(name)), "")
        assert (number, info.family) == (number, model_info(name).family)
        assert folder == official(name)


def test_weights_keep_their_dtype_unless_another_is_asked_for(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "half"
    shutil.copytree(official("paligemma-3b"), source)
    state = load_file(source / "model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, source / "model.safetensors")
    assert convert_folder(str(source), tmp_path / "a").dtype == "bfloat16"
    done = convert_folder(str(source), tmp_path / "b", dtype="float16")
    assert done.dtype == "float16"
    assert next(iter(load_file(tmp_path / "b" / "model.safetensors").values())).dtype == torch.half
    assert done.parameters == sum(value.numel() for value in state.values())


def test_what_is_there_is_not_replaced_unless_it_is_said(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = str(official("florence-2-base")), tmp_path / "out"
    convert_folder(source, out)
    (out / "mine").write_text("x")
    assert code_of(lambda: convert_folder(source, out)) == ErrorCode.PATH_NOT_ALLOWED
    assert (out / "mine").exists()
    convert_folder(source, out, overwrite=True)
    assert not (out / "mine").exists()
    other = tmp_path / "papers"
    other.mkdir()
    (other / "thesis").write_text("x")
    refused = code_of(lambda: convert_folder(source, other, overwrite=True))
    assert refused == ErrorCode.PATH_NOT_ALLOWED  # no checkpoint: not ours to delete
    assert (other / "thesis").exists()


def test_room_on_the_disk_is_checked_before_anything_is_loaded(
    official: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "create_vlm", lambda *a, **o: pytest.fail("loaded"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage)
    source = str(official("llava-v1.5-7b"))
    assert code_of(lambda: convert_folder(source, tmp_path / "out")) == ErrorCode.DISK_FULL
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_what_was_written_is_not_kept(
    official: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_along = converting._take_along

    def damage(folder: Path, partial: Path) -> None:
        take_along(folder, partial)
        state = load_file(partial / "model.safetensors")
        key = sorted(state)[0]
        save_file({**state, key: state[key] + 1}, partial / "model.safetensors")

    monkeypatch.setattr(converting, "_take_along", damage)
    source = str(official("florence-2-base"))
    assert code_of(lambda: convert_folder(source, tmp_path / "out")) == ErrorCode.WEIGHTS_CORRUPT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_is_merged_into_the_weights(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    source = official("paligemma-3b")
    module = load_module(source, "float32", "cpu")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    learnt = peft.get_peft_model(module, settings)
    learnt.save_pretrained(tmp_path / "lora")
    convert_folder(str(source), tmp_path / "out", adapter=tmp_path / "lora")
    found = load_module(tmp_path / "out", "float32", "cpu").state_dict()
    plain = load_module(source, "float32", "cpu").state_dict()
    for key, value in learnt.merge_and_unload().state_dict().items():
        assert torch.allclose(found[key], value, atol=1e-6), key
    changed = [key for key in plain if not torch.equal(plain[key], found[key])]
    assert changed
    assert all("q_proj" in key for key in changed)
    missing = code_of(lambda: convert_folder(str(source), tmp_path / "b", adapter=tmp_path))
    assert missing == ErrorCode.WEIGHTS_NOT_FOUND


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/no/such/folder", "WEIGHTS_NOT_FOUND(301)"),
        ("florence-2-bass", "WEIGHTS_NOT_FOUND(301)"),
        (".", "WEIGHTS_NOT_FOUND(301)"),
    ],
)
def test_a_source_without_weights_is_said(
    source: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["convert", source, str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err


def test_the_shipped_model_can_be_converted_by_its_name(tmp_path: Path) -> None:
    done = convert_folder("florence-2-tabletop", tmp_path / "out")
    assert done.model == "florence-2-tabletop"
    assert done.parameters == model_info("florence-2-tabletop").parameters
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["num_beams"] == 1
