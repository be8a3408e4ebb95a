"""Quantised language models, where bitsandbytes is installed; a clear refusal where it is not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import ErrorCode, GenerationParams, ModelAnswer, ModelError
from librobot_vlm_ros.models import AbstractVLM, create_vlm
from librobot_vlm_ros.models.testing.florence2 import tiny_florence_folder
from librobot_vlm_ros.models.training.lora import adapter_parameters

HERE = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that the 4-bit kernels of a CPU can do."""
    return tiny_florence_folder(
        tmp_path_factory.mktemp("wide") / "tiny",
        init_std=0.1,
        d_model=64,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
    )


@pytest.mark.parametrize(
    "options", [{"quantization": "int8"}, {"quantization": "nf4"}, {"config": {"use_qlora": True}}]
)
def test_without_bitsandbytes_it_is_refused(
    tiny_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="bitsandbytes") as caught:
        create_vlm("florence-2-base", pretrained=str(tiny_folder), **options)
    assert caught.value.code == ErrorCode.MISSING_DEPENDENCY


def test_settings_that_exclude_each_other_are_refused(tiny_folder: Path) -> None:
    for options in ({"config": {"use_qlora": True}, "quantization": "int8"}, {"quantization": "x"}):
        with pytest.raises(ModelError) as caught:
            create_vlm("florence-2-base", pretrained=str(tiny_folder), **options)
        assert caught.value.code == ErrorCode.BAD_CONFIG


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.05), ("nf4", 0.3)])
def test_the_text_model_is_quantised_and_stays_close(
    wide_folder: Path, ask, frame, kind: str, tolerance: float
) -> None:
    full = create_vlm("florence-2-base", pretrained=str(wide_folder), device="cpu")
    small = create_vlm(
        "florence-2-base", pretrained=str(wide_folder), device="cpu", quantization=kind
    )
    assert small.memory_bytes() < full.memory_bytes()
    assert {p.dtype for p in small.vision_encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        ids = torch.tensor([full.tokenizer.prompt(["a red cube"])])
        one, other = (vlm.forward(frame, input_ids=ids)["embeddings"] for vlm in (full, small))
    assert (one - other).abs().mean() < tolerance * one.abs().mean()
    (answer,) = small.run([ask("caption")])
    assert isinstance(answer, ModelAnswer)


def _narrow_is_refused() -> bool:
    """Whether this CPU's 4-bit kernels do not take the sizes of the tiny checkpoints."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@pytest.fixture(params=["int8", "nf4"])
def small(
    request: pytest.FixtureRequest, load_family: Callable[..., AbstractVLM]
) -> Callable[..., AbstractVLM]:
    """`small(**options)`: a tiny model of each family with a quantised language model."""
    if request.param == "nf4" and _narrow_is_refused():
        pytest.skip("the tiny sizes are no multiples of what this CPU's 4-bit kernels take")

    def load(**options: Any) -> AbstractVLM:
        return load_family(quantization=request.param, **options)

    load.kind = request.param  # type: ignore[attr-defined]
    return load


@needs_bitsandbytes
def test_every_family_is_quantised_but_for_its_vision_tower_and_stays_close(
    small, load_family, batch: dict[str, Any], ask
) -> None:
    full, vlm = load_family(), small()
    layers = [part for part in vlm.language_model.modules() if isinstance(part, torch.nn.Linear)]
    expected = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[small.kind]
    assert {type(layer).__name__ for layer in layers} == {expected}
    assert {p.dtype for p in vlm.vision_encoder.parameters()} == {torch.float32}
    assert vlm.memory_bytes() < full.memory_bytes()
    assert vlm.get_num_parameters() == full.get_num_parameters()
    assert torch.equal(vlm.encode_image(batch["images"]), full.encode_image(batch["images"]))
    with torch.no_grad():
        one, other = (model(**batch)["logits"].flatten() for model in (full, vlm))
    alike = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert alike > {"int8": 0.98, "nf4": 0.85}[small.kind]
    (answer,) = vlm.run([ask("caption", params=GenerationParams(max_new_tokens=3))])
    assert isinstance(answer, ModelAnswer), answer


@needs_bitsandbytes
def test_an_adapter_learns_on_a_quantised_model(
    small, batch: dict[str, Any], tmp_path: Path, ask
) -> None:
    torch.manual_seed(0)
    config = {"lora_rank": 4, "use_qlora" if small.kind == "nf4" else "use_lora": True}
    vlm = small(config=config)
    vlm.run([ask("caption", params=GenerationParams(max_new_tokens=2))])  # trained after answering
    vlm.train()
    own = adapter_parameters(vlm.module)
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert vlm.get_num_parameters(trainable_only=True) == sum(p.numel() for p in own.values())
    optimiser = torch.optim.Adam([p for p in vlm.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(8):
        loss = vlm(**batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    vlm.eval()
    vlm.save_adapter(tmp_path)
    again = small(adapter=tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch)["logits"], vlm(**batch)["logits"])
    with pytest.raises(ModelError, match="without loss") as caught:
        vlm.merge_adapter()
    assert caught.value.code == ErrorCode.BAD_CONFIG
    vlm.remove_adapter()
    vlm.unfreeze()  # all that can learn: what is not quantised
    with pytest.raises(ModelError, match="not written") as caught:
        vlm.save_pretrained(tmp_path / "whole")
    assert caught.value.code == ErrorCode.BAD_CONFIG


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_hardware_that_cannot_is_said_to(
    tiny_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.nn.Int8Params, "__new__", refuse)
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "__new__", refuse)
    with pytest.raises(ModelError, match="no kernel") as caught:
        create_vlm("tabletop", pretrained=str(tiny_folder), device="cpu", quantization=kind)
    assert caught.value.code == ErrorCode.DTYPE_UNSUPPORTED


@needs_bitsandbytes
def test_quantised_layers_do_not_flood_the_log(
    wide_folder: Path, ask, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = create_vlm("tabletop", pretrained=str(wide_folder), device="cpu", quantization="int8")
    vlm.run([ask("caption")])
    assert not [r for r in caplog.records if r.name.startswith("bitsandbytes")]
