"""Quantised language models, where bitsandbytes is installed; a clear refusal where it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from librobot_vlm_ros.core import ErrorCode, ModelAnswer, ModelError
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.tiny import tiny_florence_folder

HERE = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that the 4-bit kernels of a CPU can do."""
    return tiny_florence_folder(
        tmp_path_factory.mktemp("wide") / "tiny",
        init_std=0.1,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
    )


@pytest.mark.skipif(HERE, reason="bitsandbytes is installed")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_without_bitsandbytes_it_is_refused(tiny_folder: Path, kind: str) -> None:
    with pytest.raises(ModelError, match="bitsandbytes") as caught:
        create_vlm("florence-2-base", pretrained=str(tiny_folder), quantization=kind)
    assert caught.value.code == ErrorCode.MISSING_DEPENDENCY


@pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
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
