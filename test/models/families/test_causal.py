"""What LLaVA and PaliGemma share: built from a config, used as the specification's examples do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError
from librobot_vlm_ros.models import create_vlm, get_vlm
from librobot_vlm_ros.models.generation.causal_decoder import merge_order

_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 1200}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
TINY: dict[str, dict[str, Any]] = {
    "llava-v1.5-7b": {"vision_config": _VISION, "text_config": _TEXT},
    "paligemma-3b": {"vision_config": _VISION, "text_config": _TEXT, "image_token_id": 1100},
}


@pytest.fixture(params=sorted(TINY))
def vlm(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return create_vlm(request.param, config=TINY[request.param], device="cpu")


def test_the_usage_examples_run(vlm) -> None:
    for parameter in vlm.vision_encoder.parameters():
        parameter.requires_grad = False
    images = torch.randn(2, 3, 28, 28)
    input_ids, labels = torch.randint(3, 1000, (2, 20)), torch.randint(3, 1000, (2, 20))
    vlm.gradient_checkpointing_enable()
    vlm.train()
    outputs = vlm(images=images, input_ids=input_ids, labels=labels)
    outputs["loss"].backward()
    assert outputs["logits"].shape[:2] == outputs["embeddings"].shape[:2] == (2, 24)
    assert vlm.language_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert next(vlm.vision_encoder.parameters()).grad is None
    options = {"max_new_tokens": 5, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    generated = vlm.generate(images=images, input_ids=input_ids[:, :10], **options)
    assert generated.shape[0] == 2
    assert generated.shape[1] <= 5
    assert torch.equal(generated, vlm.generate(images, input_ids[:, :10], **options))
    assert vlm.encode_image(images).shape == (2, 4, vlm.get_embedding_dim())
    assert vlm.encode_text(input_ids).shape == (2, 20, vlm.get_embedding_dim())


def test_freezing(vlm) -> None:
    vlm.freeze()
    assert vlm.get_num_parameters(trainable_only=True) == 0
    vlm.unfreeze()
    vlm.freeze_language()
    vlm.freeze_vision()
    left = {name.split(".")[1] for name, p in vlm.module.named_parameters() if p.requires_grad}
    assert left == {"multi_modal_projector"}


def test_beams_find_what_is_at_least_as_likely_as_greedy(vlm) -> None:
    image, ids = torch.randn(1, 3, 28, 28), torch.tensor([[5, 6, 7]])

    def likelihood(new: torch.Tensor) -> float:
        whole = torch.cat([ids, new], dim=1)
        labels = whole.clone()
        labels[:, :3] = -100
        with torch.no_grad():
            return -float(vlm(images=image, input_ids=whole, labels=labels)["loss"])

    greedy = vlm.generate(image, ids, max_new_tokens=3)
    beams = vlm.generate(image, ids, max_new_tokens=3, num_beams=4)
    assert likelihood(beams) >= likelihood(greedy) - 1e-5


def test_words_need_a_tokenizer_and_a_config_known_fields(vlm) -> None:
    with pytest.raises(ModelError) as caught:
        vlm.generate(torch.randn(1, 3, 28, 28), ["what is it?"])
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH
    with pytest.raises(ModelError, match="no_such_field") as caught:
        create_vlm(vlm.name, config={"no_such_field": 1})
    assert caught.value.code == ErrorCode.BAD_CONFIG
    assert get_vlm(vlm.name) is type(vlm)


@pytest.mark.parametrize(
    ("ids", "count", "expected"),
    [
        ([1, 5, 9, 6], 2, [0, 1, -1, -1, 3]),
        ([1, 9, 9, 6], 2, [0, -1, -1, 3]),
        ([1, 5, 6], 2, [0, -1, -1, 1, 2]),
        ([5, 6], 2, [-1, -1, 0, 1]),
        ([1, 5], 0, [0, 1]),
        ([], 1, [-1]),
    ],
)
def test_the_image_has_its_place(ids: list[int], count: int, expected: list[int]) -> None:
    assert merge_order(ids, (count,) if count else (), image_token=9, begin_token=1) == expected


@pytest.mark.parametrize(("ids", "count"), [([9, 5, 9], 2), ([9, 9, 9], 2), ([1, 9], 0)])
def test_an_image_that_does_not_fit_its_tokens_is_refused(ids: list[int], count: int) -> None:
    with pytest.raises(RequestError) as caught:
        merge_order(ids, (count,) if count else (), image_token=9, begin_token=1)
    assert caught.value.code == ErrorCode.BAD_PARAMETER
