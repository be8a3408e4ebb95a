"""Loading folders: the whole ones, and the broken ones, each with a code of its own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Florence2ForConditionalGeneration

from librobot_vlm_ros.core import ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.models import create_vlm, load_module
from librobot_vlm_ros.models.catalog import CATALOG
from librobot_vlm_ros.models.checkpoints.shards import tensor_names
from librobot_vlm_ros.models.families.florence2.configuration import FlorenceConfig
from librobot_vlm_ros.models.testing.florence2 import edit_json


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder, to be broken."""
    target = tmp_path / "model"
    shutil.copytree(tiny_folder, target)
    return target


def load(folder: Path, dtype: str = "float32", **options):
    return load_module(folder, dtype, "cpu", **options)


def code_of_loading(folder: Path, **options) -> ErrorCode:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the code is compared)
        load(folder, **options)
    return as_vlm_error(caught.value).code


def rewrite(folder: Path, change) -> None:
    """Change the tensors of model.safetensors in place."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_a_native_folder_gives_what_transformers_loads_from_it(folder: Path) -> None:
    ours = load(folder)
    theirs = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not ours.training


def test_no_tokenizer_is_needed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert load(folder).config.model_type == "florence2"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp32"])
def test_all_of_it_is_held_in_the_dtype_that_was_asked_for(folder: Path, dtype: str) -> None:
    module = load(folder, dtype)
    expected = getattr(torch, {"fp32": "float32"}.get(dtype, dtype))
    held = [*module.parameters(), *module.buffers()]
    assert {tensor.dtype for tensor in held if tensor.is_floating_point()} == {expected}


def test_tied_weights_are_one_tensor(folder: Path) -> None:
    module = load(folder)
    bart = module.model.language_model
    assert module.lm_head.weight is bart.shared.weight is bart.decoder.embed_tokens.weight


def test_several_shards_by_their_index(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    expected = load(folder).state_dict()
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number in range(3):
        shard = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in names[number::3]}, folder / shard)
        index |= dict.fromkeys(names[number::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = load(folder).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    (folder / "model-1.safetensors").unlink()
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_NOT_FOUND


def test_the_names_are_those_of_the_files_that_are_read(folder: Path) -> None:
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"strange": "pytorch_model-1.bin"}}))
    names = tensor_names(folder)
    assert sorted(names) == sorted(load_file(folder / "model.safetensors"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert sorted(tensor_names(folder)) == sorted(names)


def test_an_index_cannot_name_files_elsewhere(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_CORRUPT


def test_no_folder_and_no_weights(folder: Path) -> None:
    assert code_of_loading(folder / "nowhere") == ErrorCode.WEIGHTS_NOT_FOUND
    (folder / "model.safetensors").unlink()
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_NOT_FOUND


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_CORRUPT


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
def test_a_file_of_something_else(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_CORRUPT


def test_a_tensor_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({NORM: torch.zeros(33)}))
    assert code_of_loading(folder) == ErrorCode.SHAPE_MISMATCH


NORM = "model.multi_modal_projector.image_proj_norm.weight"


def test_a_missing_and_an_extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda w: w.pop(NORM))
    with pytest.raises(ModelError, match="image_proj_norm") as caught:
        load(folder)
    assert caught.value.code == ErrorCode.KEY_MISMATCH
    rewrite(folder, lambda w: w.update({NORM: torch.ones(32), "what.is.this": torch.ones(1)}))
    with pytest.raises(ModelError, match=r"what\.is\.this") as caught:
        load(folder)
    assert caught.value.code == ErrorCode.KEY_MISMATCH


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    rewrite(folder, lambda w: w[NORM].__setitem__(3, value))
    assert code_of_loading(folder) == ErrorCode.NAN_WEIGHTS


def test_weights_beyond_the_range_of_the_dtype(folder: Path) -> None:
    rewrite(folder, lambda w: w[NORM].__setitem__(3, 1e6))
    assert code_of_loading(folder, dtype="float16") == ErrorCode.DTYPE_UNSUPPORTED
    load(folder, "bfloat16")


def test_numbers_that_no_dtype_here_has_are_not_sent_to_another_one(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({NORM: w[NORM].double() + 1e300}))
    with pytest.raises(ModelError, match="range of float32") as caught:
        load(folder)
    assert caught.value.code == ErrorCode.DTYPE_UNSUPPORTED
    assert "use bfloat16" not in caught.value.hint


def test_a_tensor_that_differs_between_two_shards_is_said_to_be_there_twice(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = dict.fromkeys(weights, "model-1.safetensors") | {"again": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({NORM: weights[NORM]}, folder / "model-2.safetensors")
    load(folder)
    save_file({NORM: weights[NORM] + 1}, folder / "model-2.safetensors")
    with pytest.raises(ModelError, match=rf"{NORM} is in the checkpoint twice") as caught:
        load(folder)
    assert caught.value.code == ErrorCode.KEY_MISMATCH


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_stored_in_a_dtype_that_needs_scales(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda w: w.update({NORM: w[NORM].to(dtype)}))
    with pytest.raises(ModelError, match=f"{NORM} is stored as .*8") as caught:
        load(folder)
    assert caught.value.code == ErrorCode.DTYPE_UNSUPPORTED


def test_packed_weights_are_told_from_those_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({NORM: torch.zeros(3, 1, dtype=torch.uint8)}))
    assert code_of_loading(folder) == ErrorCode.DTYPE_UNSUPPORTED


@pytest.mark.parametrize(
    "content", ["", "no json", "[]", '{"model_type": "bert"}', '{"model_type": 3}']
)
def test_a_config_of_no_use(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert code_of_loading(folder) == ErrorCode.BAD_CONFIG


@pytest.mark.parametrize("field", ["depths", "num_heads", "embed_dim"])
def test_a_config_that_contradicts_itself(folder: Path, field: str) -> None:
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, field: [1]})
    assert code_of_loading(folder) == ErrorCode.BAD_CONFIG


def test_a_config_of_another_size(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "encoder_ffn_dim": 48})
    assert code_of_loading(folder) == ErrorCode.SHAPE_MISMATCH


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_pickle_with_code_in_it_is_refused_and_the_code_not_run(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    proof = folder / "it-ran"
    torch.save({**weights, "code": _Code(proof)}, folder / "pytorch_model.bin")
    assert code_of_loading(folder) == ErrorCode.UNSAFE_CHECKPOINT
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(_Code(proof), file)
    assert code_of_loading(folder) == ErrorCode.UNSAFE_CHECKPOINT
    assert not proof.exists()


def test_a_truncated_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_CORRUPT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    assert code_of_loading(folder) == ErrorCode.PERMISSION_DENIED


def test_loading_can_be_cancelled_between_tensors(folder: Path) -> None:
    asked = []

    def should_cancel() -> bool:
        asked.append(1)
        return len(asked) == 5

    with pytest.raises(ModelError) as caught:
        load(folder, should_cancel=should_cancel)
    assert caught.value.code == ErrorCode.LOAD_CANCELLED
    assert len(asked) == 5


def test_a_failed_load_leaves_a_good_one_possible(folder: Path) -> None:
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:1000])
    assert code_of_loading(folder) == ErrorCode.WEIGHTS_CORRUPT
    (folder / "model.safetensors").write_bytes(good)
    load(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("preprocessor_config.json", None),
        ("preprocessor_config.json", {"size": None}),
        ("preprocessor_config.json", {"size": {"height": 0, "width": 64}}),
        ("preprocessor_config.json", {"image_std": [0.1, 0, 0.1]}),
        ("preprocessor_config.json", {"size": {"height": 4096, "width": 4096}}),
        ("generation_config.json", {"num_beams": 0}),
        ("generation_config.json", {"max_new_tokens": "many"}),
    ],
)
def test_settings_of_no_use(folder: Path, name: str, change: dict | None) -> None:
    if change is None:
        (folder / name).unlink()
    else:
        edit_json(folder / name, **change)
    with pytest.raises(ModelError) as caught:
        create_vlm("florence-2-tabletop", pretrained=str(folder), device="cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.mark.parametrize("name", FlorenceConfig.variants)
def test_the_true_configuration_has_as_many_parameters_as_the_published_model(name: str) -> None:
    config = FlorenceConfig(name).to_transformers()
    with torch.device("meta"):
        module = Florence2ForConditionalGeneration(config)
    module.tie_weights()
    count = sum(parameter.numel() for parameter in module.parameters())
    # transformers' place holder for the image is one row that the published model has not.
    (info,) = (info for info in CATALOG if info.name == name)
    assert count - config.text_config.d_model == info.parameters
    assert info.embedding_dim == config.text_config.d_model
