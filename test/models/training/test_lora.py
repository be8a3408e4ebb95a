"""Low-rank adapters in every family: trained, saved, loaded, merged, refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from librobot_vlm_ros.core import ErrorCode, GenerationParams, ModelAnswer, ModelError
from librobot_vlm_ros.models import AbstractVLM, create_vlm, load_module
from librobot_vlm_ros.models.training.lora import adapter_parameters, wrapped_layers

Load = Callable[..., AbstractVLM]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def logits(vlm: AbstractVLM, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return vlm(**batch)["logits"]


def shaken(vlm: AbstractVLM) -> AbstractVLM:
    """With an adapter as after a long training: no weight of it is zero."""
    random = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(vlm.module).values():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
    return vlm


@pytest.fixture
def adapted(load_family: Load) -> AbstractVLM:
    return shaken(load_family(config={"use_lora": True, "lora_rank": 4}))


def test_a_few_steps_lower_the_loss_and_change_the_adapter_alone(
    load_family: Load, batch: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    vlm = load_family(config={"use_lora": True, "lora_rank": 4, "lora_dropout": 0.1})
    vlm.train()
    own = adapter_parameters(vlm.module)
    assert vlm.get_num_parameters(trainable_only=True) == sum(p.numel() for p in own.values())
    before = {name: value.clone() for name, value in vlm.named_parameters()}
    optimiser = torch.optim.Adam([p for p in vlm.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = vlm(**batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, value in vlm.named_parameters() if not value.equal(before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)


def test_a_new_adapter_is_in_the_language_model_and_changes_no_answer(
    load_family: Load, batch: dict[str, Any]
) -> None:
    plain, vlm = load_family(), load_family(config={"use_lora": True})
    assert type(vlm.module) is type(plain.module)
    torch.testing.assert_close(logits(vlm, batch), logits(plain, batch))
    linear = [part for part in plain.language_model.modules() if isinstance(part, nn.Linear)]
    inside = {id(part) for part in vlm.language_model.modules()}
    layers = [layer for _path, _owner, _name, layer in wrapped_layers(vlm.module)]
    assert len(layers) == len(linear)
    assert all(id(layer) in inside for layer in layers)
    assert layers[0].scaling == {"default": 2.0}


def test_dropout_is_at_work_while_training_alone(
    load_family: Load, batch: dict[str, Any], tmp_path: Path
) -> None:
    vlm = shaken(load_family(config={"use_lora": True, "lora_dropout": 0.5}))
    vlm.save_adapter(tmp_path)
    for model in (vlm, load_family(adapter=tmp_path)):
        assert not any(part.training for part in model.module.modules())
        assert torch.equal(logits(model, batch), logits(vlm, batch))
        model.train()
        assert not torch.equal(logits(model, batch), logits(model, batch))
        model.eval()


def test_saved_and_loaded_the_logits_are_identical(
    adapted: AbstractVLM, load_family: Load, batch: dict[str, Any], tmp_path: Path
) -> None:
    adapted.save_adapter(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    again = load_family(adapter=tmp_path)
    expected = logits(adapted, batch)
    assert torch.equal(logits(again, batch), expected)
    assert not torch.allclose(logits(load_family(), batch), expected, atol=1e-3)
    trained = adapted.get_num_parameters(trainable_only=True)
    assert again.get_num_parameters(trainable_only=True) == trained  # and can be trained further


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pefts_own_model_reads_and_writes_the_same_folders(
    adapted: AbstractVLM, load_family: Load, family_folder: Path, batch, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapted.save_adapter(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(
        load_module(family_folder, "float32", "cpu"), tmp_path / "ours"
    )
    wrapped = load_family()
    wrapped.module = theirs.base_model.model
    assert torch.equal(logits(wrapped, batch), logits(adapted, batch))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = load_family(adapter=str(tmp_path / "theirs"))
    assert torch.equal(logits(again, batch), logits(adapted, batch))


def test_names_that_older_versions_of_transformers_wrote_are_known(
    adapted: AbstractVLM, load_family: Load, batch: dict[str, Any], tmp_path: Path
) -> None:
    if adapted.family not in ("qwen2-vl", "llava-1.5", "paligemma"):
        pytest.skip("it has had one set of names only")
    adapted.save_adapter(tmp_path)
    older = "model." if adapted.family == "qwen2-vl" else "language_model.model."
    state = load_file(tmp_path / WEIGHTS)
    renamed = {
        key.replace("base_model.model.model.language_model.", f"base_model.model.{older}"): value
        for key, value in state.items()
    }
    assert not renamed.keys() & state.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    assert torch.equal(logits(load_family(adapter=tmp_path), batch), logits(adapted, batch))


def test_merged_the_logits_are_equal_and_the_model_is_plain_again(
    adapted: AbstractVLM, load_family: Load, batch: dict[str, Any], tmp_path: Path, family: str
) -> None:
    expected = logits(adapted, batch)
    with pytest.raises(ModelError, match="merge_adapter") as caught:
        adapted.save_pretrained(tmp_path / "whole")
    assert caught.value.code == ErrorCode.BAD_CONFIG
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted, batch), expected, atol=2e-5, rtol=1e-4)
    assert not adapted.has_adapter
    assert [name for name, _ in adapted.module.named_parameters()] == [
        name for name, _ in load_family().module.named_parameters()
    ]
    adapted.save_pretrained(tmp_path / "whole")
    again = create_vlm(family, pretrained=str(tmp_path / "whole"), device="cpu", dtype="float32")
    torch.testing.assert_close(logits(again, batch), expected, atol=2e-5, rtol=1e-4)


def test_answers_and_caches_see_the_adapter(adapted: AbstractVLM, ask, batch) -> None:
    greedy = {"max_new_tokens": 4, "num_beams": 1}
    ids, images = batch["input_ids"][:1], batch["images"][:1]
    with_cache = adapted.generate(images, ids, **greedy)
    adapted.merge_adapter()
    assert torch.equal(adapted.generate(images, ids, **greedy), with_cache)
    request = ask("caption", params=GenerationParams(max_new_tokens=3, num_beams=1))
    (answer,) = adapted.run([request])
    assert isinstance(answer, ModelAnswer)


def test_answers_of_run_are_those_of_the_merged_model(
    adapted: AbstractVLM, load_family: Load, ask
) -> None:
    params = GenerationParams(max_new_tokens=5)
    requests = [ask("caption", params=params), ask("embed")]
    plain = load_family().run(requests)
    with_adapter = adapted.run(requests)
    adapted.merge_adapter()
    merged = adapted.run(requests)
    assert with_adapter[0].text == merged[0].text
    assert with_adapter[0].score == pytest.approx(merged[0].score, rel=1e-3)
    assert with_adapter[0].score != pytest.approx(plain[0].score, rel=1e-3)
    # The vision side has no adapter.
    assert (with_adapter[1].embedding.array == plain[1].embedding.array).all()


def test_taken_out_the_model_is_what_it_was(
    adapted: AbstractVLM, load_family: Load, batch: dict[str, Any]
) -> None:
    adapted.remove_adapter()
    assert torch.equal(logits(adapted, batch), logits(load_family(), batch))
    assert adapted.get_num_parameters(trainable_only=True) == 0
    adapted.unfreeze()
    assert adapted.get_num_parameters(trainable_only=True) == adapted.get_num_parameters()


def test_freezing_with_an_adapter(adapted: AbstractVLM) -> None:
    trained = adapted.get_num_parameters(trainable_only=True)
    adapted.freeze()
    assert adapted.get_num_parameters(trainable_only=True) == 0
    adapted.unfreeze()
    assert adapted.get_num_parameters(trainable_only=True) == trained


def test_results_say_that_an_adapter_was_in_place(vlm: AbstractVLM, tmp_path: Path) -> None:
    base = vlm.revision
    vlm.add_adapter(rank=2)
    assert vlm.revision == f"{base}+lora"
    vlm.save_adapter(tmp_path / "one")
    shaken(vlm).save_adapter(tmp_path / "two")
    vlm.load_adapter(tmp_path / "one")
    first = vlm.revision
    vlm.load_adapter(tmp_path / "two")
    assert len({base, first, vlm.revision}) == 3
    assert vlm.revision.startswith(f"{base}+")
    vlm.merge_adapter()
    merged = vlm.revision
    assert merged.startswith(f"{base}+")
    vlm.add_adapter()
    vlm.remove_adapter()
    assert vlm.revision == merged


def test_layers_to_adapt_are_named_by_the_ends_of_their_paths_or_by_an_expression(
    vlm: AbstractVLM, frame, ask
) -> None:
    (before,) = vlm.run([ask("embed")])
    vlm.add_adapter(rank=2, targets=["vision_tower.blocks.0.0.channel_block.ffn.fc1", "q_proj"])
    paths = [path for path, *_ in wrapped_layers(vlm.module)]
    assert "model.vision_tower.blocks.0.0.channel_block.ffn.fc1" in paths
    assert sum(path.endswith(".q_proj") for path in paths) == len(paths) - 1
    shaken(vlm)
    vlm.frames.clear()
    (adapted,) = vlm.run([ask("embed")])
    vlm.remove_adapter()
    (after,) = vlm.run([ask("embed")])  # features of the adapted tower are forgotten with it
    assert (before.embedding.array == after.embedding.array).all()
    assert (before.embedding.array != adapted.embedding.array).any()
    vlm.add_adapter(rank=2, targets=r".*decoder.*\.fc[12]")
    assert all("decoder" in path for path, *_ in wrapped_layers(vlm.module))


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_rank": 0},
        {"lora_rank": 2.5},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.0},
        {"lora_target_modules": []},
        {"lora_target_modules": ["nowhere"]},
        {"lora_target_modules": ["q_proj", "nowhere"]},
        {"lora_target_modules": "("},
        {"lora_target_modules": ["final_layer_norm"]},
    ],
)
def test_settings_of_no_use_are_refused(tiny_folder: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm("tabletop", config={"use_lora": True, **fields}, pretrained=str(tiny_folder))
    assert caught.value.code == ErrorCode.BAD_CONFIG


def test_one_adapter_at_a_time(vlm: AbstractVLM, tmp_path: Path) -> None:
    for step in (vlm.merge_adapter, vlm.remove_adapter, lambda: vlm.save_adapter(tmp_path)):
        with pytest.raises(ModelError, match="no adapter"):
            step()
    vlm.add_adapter()
    with pytest.raises(ModelError, match="already"):
        vlm.add_adapter()


def test_without_peft_it_is_refused(vlm: AbstractVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft") as caught:
        vlm.add_adapter()
    assert caught.value.code == ErrorCode.MISSING_DEPENDENCY


class TestAWrongFolder:
    """Each fault has its code, and the model is afterwards what it was."""

    @pytest.fixture
    def folder(self, vlm: AbstractVLM, tmp_path: Path) -> Path:
        vlm.add_adapter(rank=2)
        shaken(vlm).save_adapter(tmp_path / "adapter")
        return tmp_path / "adapter"

    @pytest.fixture
    def refused(self, vlm: AbstractVLM, folder: Path, batch) -> Callable[..., None]:
        def check(code: ErrorCode, **config: Any) -> None:
            if config:
                stated = json.loads((folder / CONFIG).read_text())
                (folder / CONFIG).write_text(json.dumps({**stated, **config}))
            before = logits(vlm, batch), vlm.revision, vlm.get_num_parameters(trainable_only=True)
            with pytest.raises(ModelError) as caught:
                vlm.load_adapter(folder)
            assert caught.value.code == code
            assert torch.equal(logits(vlm, batch), before[0])
            after = vlm.revision, vlm.get_num_parameters(trainable_only=True)
            assert after == before[1:]
            vlm.save_adapter(folder.parent / "still")

        return check

    def test_that_is_empty(self, vlm: AbstractVLM, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ModelError) as caught:
                vlm.load_adapter(folder)
            assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND

    def test_with_a_pickle(self, folder: Path, refused) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
        refused(ErrorCode.UNSAFE_CHECKPOINT)

    def test_cut_off(self, folder: Path, refused) -> None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
        refused(ErrorCode.WEIGHTS_CORRUPT)

    def test_of_another_rank(self, refused) -> None:
        refused(ErrorCode.SHAPE_MISMATCH, r=3)

    def test_with_other_layers(self, refused) -> None:
        refused(ErrorCode.KEY_MISMATCH, target_modules=["q_proj"])

    def test_with_nan(self, folder: Path, refused) -> None:
        state = load_file(folder / WEIGHTS)
        next(iter(state.values()))[0, 0] = torch.nan
        save_file(state, folder / WEIGHTS)
        refused(ErrorCode.NAN_WEIGHTS)

    @pytest.mark.parametrize(
        "config",
        [
            {"peft_type": "IA3"},
            {"modules_to_save": ["lm_head"]},
            {"bias": "all"},
            {"init_lora_weights": "pissa"},
            {"trick_of_the_future": True},
            {"r": "two"},
            {"target_modules": None},
        ],
    )
    def test_with_settings_that_are_not_taken(self, refused, config: dict[str, Any]) -> None:
        refused(ErrorCode.BAD_CONFIG, **config)

    def test_without_json(self, folder: Path, refused) -> None:
        (folder / CONFIG).write_text("{")
        refused(ErrorCode.BAD_CONFIG)


def test_the_adapter_of_another_model_is_refused(
    adapted: AbstractVLM, family: str, tiny_folder: Path, tmp_path: Path
) -> None:
    adapted.save_adapter(tmp_path)
    other = create_vlm("tabletop", pretrained=str(tiny_folder), device="cpu")
    with pytest.raises(ModelError) as caught:
        other.load_adapter(tmp_path)
    expected = (ErrorCode.BAD_CONFIG, ErrorCode.KEY_MISMATCH, ErrorCode.SHAPE_MISMATCH)
    assert caught.value.code in expected
    assert not other.has_adapter
