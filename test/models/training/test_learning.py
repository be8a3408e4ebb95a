"""The learner's side: tensors, loss, gradients, freezing, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from librobot_vlm_ros.core import ErrorCode, Frame, ModelError, RequestError
from librobot_vlm_ros.models import AbstractVLM, create_vlm, get_vlm, list_vlms
from librobot_vlm_ros.models.families.florence2.model import FlorenceConfig, FlorenceVLM
from librobot_vlm_ros.models.testing.florence2 import TINY_TEXT, TINY_VISION

#: As in the specification's examples: random ids below 1000.
TINY = {
    "image_size": 64,
    "vision_config": TINY_VISION,
    "text_config": {**TINY_TEXT, "vocab_size": 1001, "dropout": 0.0, "init_std": 0.02},
}


@pytest.fixture
def random_vlm() -> FlorenceVLM:
    torch.manual_seed(0)
    return create_vlm("florence-2-base", config=TINY, device="cpu")


def test_the_specifications_basic_usage_runs_as_written() -> None:
    config = {**TINY, "text_config": {**TINY["text_config"], "max_position_embeddings": 256}}
    assert "florence-2-base" in list_vlms()
    model = create_vlm("florence-2-base", config=config)

    # Freeze vision encoder
    for param in model.vision_encoder.parameters():
        param.requires_grad = False

    # Prepare inputs
    images = torch.randn(2, 3, 224, 224)  # Batch of 2 images
    input_ids = torch.randint(0, 1000, (2, 50))  # Text tokens
    labels = torch.randint(0, 1000, (2, 50))  # Target tokens

    # Forward pass
    outputs = model(images=images, input_ids=input_ids, labels=labels)
    assert outputs["loss"].item() > 0
    outputs["loss"].backward()

    # Generation
    generated_ids = model.generate(
        images=images,
        input_ids=input_ids[:, :10],  # Prompt
        max_new_tokens=100,
        temperature=0.8,
        top_p=0.95,
    )
    assert generated_ids.shape[0] == 2
    assert generated_ids.shape[1] <= 100


def test_the_specifications_custom_configuration_runs_as_written() -> None:
    config = FlorenceConfig(variant="florence-2-large", **TINY)
    VLMClass = get_vlm("florence-2-large")  # noqa: N806 (as written there)
    model = VLMClass(config=config, freeze_vision=True)
    assert isinstance(model, AbstractVLM)
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    assert any(p.requires_grad for p in model.parameters())


def test_a_backbone_inside_a_small_policy_learns(vlm: FlorenceVLM, frame: Frame) -> None:
    class Policy(nn.Module):
        def __init__(self, vlm_backbone: AbstractVLM, action_dim: int, freeze_vlm: bool) -> None:
            super().__init__()
            self.vlm = vlm_backbone
            if freeze_vlm:
                self.vlm.freeze()
            self.head = nn.Linear(self.vlm.get_embedding_dim(), action_dim)

        def forward(self, images, text, actions) -> dict[str, torch.Tensor]:
            embeddings = self.vlm(images=images, text=text)["embeddings"]
            found = self.head(embeddings.mean(dim=1))
            return {"actions": found, "loss": functional.mse_loss(found, actions)}

    torch.manual_seed(0)
    policy = Policy(vlm, action_dim=7, freeze_vlm=True)
    before = {name: value.clone() for name, value in vlm.named_parameters()}
    optimiser = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    images, text = [frame, frame], ["pick the red cube", "push the blue ball"]
    actions = torch.randn(2, 7)
    losses = []
    for _ in range(30):
        loss = policy(images=images, text=text, actions=actions)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    assert all(torch.equal(value, before[name]) for name, value in vlm.named_parameters())


def test_shapes_of_forward(random_vlm: FlorenceVLM) -> None:
    ids = torch.randint(4, 1000, (2, 6))
    out = random_vlm(images=torch.randn(2, 3, 64, 64), input_ids=ids, labels=ids[:, :4])
    assert out["embeddings"].shape == (2, 17 + 6, 32)
    assert out["logits"].shape == (2, 4, 1001)
    without = random_vlm(images=torch.randn(2, 3, 64, 64), input_ids=ids)
    assert without["logits"].shape == (2, 1, 1001)
    assert "loss" not in without


def test_logits_and_loss_equal_those_of_transformers(random_vlm: FlorenceVLM) -> None:
    ids, labels = torch.randint(4, 1000, (2, 6)), torch.randint(4, 1000, (2, 5))
    labels[0, 3:] = -100
    pixels = torch.randn(2, 3, 64, 64)
    image = torch.full((2, 17), random_vlm.config.image_token_id)
    with torch.no_grad():
        theirs = random_vlm.module(
            input_ids=torch.cat([image, ids], dim=1), pixel_values=pixels, labels=labels
        )
        ours = random_vlm(images=pixels, input_ids=ids, labels=labels)
    torch.testing.assert_close(ours["logits"], theirs.logits, atol=1e-5, rtol=1e-5)
    # Theirs gives the image token, which is no word, a share of the probability.
    words = theirs.logits[..., :1000]
    expected = functional.cross_entropy(words.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours["loss"], expected)


def test_image_tokens_already_in_the_prompt_are_not_doubled(random_vlm: FlorenceVLM) -> None:
    ids, pixels = torch.randint(4, 1000, (1, 6)), torch.randn(1, 3, 64, 64)
    image = torch.full((1, 17), random_vlm.config.image_token_id)
    with torch.no_grad():
        one = random_vlm(images=pixels, input_ids=ids)
        other = random_vlm(images=pixels, input_ids=torch.cat([image, ids], dim=1))
    assert torch.equal(one["embeddings"], other["embeddings"])


def test_padding_changes_nothing(random_vlm: FlorenceVLM) -> None:
    ids, pixels = torch.randint(4, 1000, (2, 6)), torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with torch.no_grad():
        both = random_vlm(images=pixels, input_ids=ids, attention_mask=mask, labels=ids)
        alone = random_vlm(images=pixels[1:], input_ids=ids[1:, :3], labels=ids[1:])
    torch.testing.assert_close(both["logits"][1:], alone["logits"], atol=1e-5, rtol=1e-5)


def test_gradients_reach_vision_projection_and_language(random_vlm: FlorenceVLM) -> None:
    random_vlm.train()
    ids = torch.randint(4, 1000, (2, 6))
    random_vlm(images=torch.randn(2, 3, 64, 64), input_ids=ids, labels=ids)["loss"].backward()
    missing = [name for name, p in random_vlm.named_parameters() if p.grad is None]
    assert missing == []


def test_a_few_steps_of_training_lower_the_loss(random_vlm: FlorenceVLM) -> None:
    torch.manual_seed(0)
    random_vlm.train()
    optimiser = torch.optim.Adam(random_vlm.parameters(), lr=1e-2)
    ids, pixels = torch.randint(4, 1000, (2, 6)), torch.randn(2, 3, 64, 64)
    losses = []
    for _ in range(20):
        loss = random_vlm(images=pixels, input_ids=ids, labels=ids)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_frozen_part_gets_no_gradient_and_the_rest_does(part: str) -> None:
    options = {f"freeze_{part}": True}
    vlm = create_vlm("florence-2-base", config=TINY, device="cpu", **options)
    frozen = {"vision": vlm.vision_encoder, "language": vlm.language_model}[part]
    other = {"vision": vlm.language_model, "language": vlm.vision_encoder}[part]
    ids = torch.randint(4, 1000, (1, 6))
    vlm(images=torch.randn(1, 3, 64, 64), input_ids=ids, labels=ids)["loss"].backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in other.parameters())
    assert vlm.get_num_parameters(trainable_only=True) < vlm.get_num_parameters()
    vlm.unfreeze()
    assert vlm.get_num_parameters(trainable_only=True) == vlm.get_num_parameters()
    vlm.freeze()
    assert vlm.get_num_parameters(trainable_only=True) == 0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    ids, pixels = torch.randint(4, 1000, (1, 6)), torch.randn(1, 3, 64, 64)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = {**TINY, "gradient_checkpointing": checkpointing}
        vlm = create_vlm("florence-2-base", config=config, device="cpu").train()
        assert vlm.language_model.encoder.layers[0].gradient_checkpointing == checkpointing
        vlm(images=pixels, input_ids=ids, labels=ids)["loss"].backward()
        grads.append(vlm.module.lm_head.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_several_views_stand_one_after_the_other(random_vlm: FlorenceVLM) -> None:
    views = torch.randn(2, 3, 3, 64, 64)
    with torch.no_grad():
        found = random_vlm.encode_image(views)
        second = random_vlm.encode_image(views[:, 1])
    assert found.shape == (2, 3 * 17, 32)
    torch.testing.assert_close(found[:, 17:34], second, atol=1e-5, rtol=1e-5)


def test_text_is_encoded_from_words_or_ids(vlm: FlorenceVLM) -> None:
    with torch.no_grad():
        words = vlm.encode_text(["a red cube", "a ball"])
        ids = vlm.encode_text(torch.tensor([vlm.tokenizer.prompt(["a red cube"])]))
    assert words.shape == (2, 5, 32)
    torch.testing.assert_close(words[:1], ids, atol=1e-5, rtol=1e-5)


def test_a_task_by_name_takes_words_or_ids(vlm: FlorenceVLM, frame: Frame) -> None:
    ids = vlm.tokenizer.words("a red cube")
    expected = vlm.generate(frame, text="Locate the phrases in the caption: a red cube")
    assert torch.equal(vlm.generate(frame, text="a red cube", task="grounding"), expected)
    assert torch.equal(vlm.generate(frame, torch.tensor([ids]), task="ground"), expected)
    assert torch.equal(
        vlm.generate(frame, task="<OD>"),
        vlm.generate(frame, text="Locate the objects with category name in the image."),
    )
    with pytest.raises(RequestError) as caught:
        vlm.generate(frame, task="answer", text="why?")
    assert caught.value.code == ErrorCode.TASK_NOT_SUPPORTED


def test_sampling_by_seed(random_vlm: FlorenceVLM) -> None:
    ids, pixels = torch.randint(4, 1000, (2, 6)), torch.randn(2, 3, 64, 64)

    def sample(seed: int) -> list[list[int]]:
        return random_vlm.generate(
            pixels, ids, temperature=1.5, seed=seed, max_new_tokens=20
        ).tolist()

    assert sample(4) == sample(4) != sample(5)


def test_without_a_tokenizer_words_are_refused_and_ids_are_not(random_vlm: FlorenceVLM) -> None:
    with pytest.raises(ModelError) as caught:
        random_vlm.encode_text(["a cup"])
    assert caught.value.code == ErrorCode.TOKENIZER_MISMATCH
    assert random_vlm.encode_text(torch.tensor([[0, 5, 2]])).shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("config", "pretrained"),
    [
        ({"variant": "florence-3"}, None),
        ({"image_size": 3}, None),
        ({"colour": "red"}, None),
        ({"vision_config": {"depths": [1]}}, None),
        ({"text_config": {"d_model": 33}}, None),
        (TINY, "here"),
    ],
)
def test_a_config_of_no_use_is_refused(
    tiny_folder: Path, config: dict, pretrained: str | None
) -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm(
            "florence-2-base", config=config, pretrained=str(tiny_folder) if pretrained else None
        )
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("ids", "code"),
    [
        (torch.ones((1, 120), dtype=torch.int64), ErrorCode.PROMPT_TOO_LONG),
        (torch.tensor([[5, 1001]]), ErrorCode.BAD_PARAMETER),
        (torch.tensor([[5, -1]]), ErrorCode.BAD_PARAMETER),
        (None, ErrorCode.EMPTY_PROMPT),
    ],
)
def test_ids_beyond_the_model_are_refused(
    random_vlm: FlorenceVLM, ids: torch.Tensor | None, code: ErrorCode
) -> None:
    for call in (random_vlm.generate, random_vlm):
        with pytest.raises(RequestError) as caught:
            call(torch.randn(1, 3, 64, 64), input_ids=ids)
        assert caught.value.code == code


def test_mismatched_batches_are_refused(random_vlm: FlorenceVLM) -> None:
    ids = torch.randint(4, 1000, (3, 6))
    for call in (random_vlm.generate, random_vlm):
        with pytest.raises(RequestError):
            call(torch.randn(2, 3, 64, 64), input_ids=ids)


def test_saved_and_loaded_it_answers_the_same(
    vlm: FlorenceVLM, frame: Frame, tmp_path: Path, ask: Callable[..., object]
) -> None:
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.mul_(1.01)
    vlm.save_pretrained(tmp_path / "saved")
    again = create_vlm("florence-2-base", pretrained=str(tmp_path / "saved"), device="cpu")
    (one,), (other,) = vlm.run([ask("detect")]), again.run([ask("detect")])
    assert (one.text, one.score) == (other.text, other.score)


def test_weights_are_replaced_in_place(
    vlm: FlorenceVLM, tmp_path: Path, ask: Callable[..., object]
) -> None:
    from librobot_vlm_ros.models.testing.florence2 import tiny_florence_folder

    other = tiny_florence_folder(tmp_path / "other", seed=5)
    (before,) = vlm.run([ask("detect")])
    revision = vlm.revision
    vlm.load_pretrained(str(other))
    (after,) = vlm.run([ask("detect")])
    assert vlm.revision != revision
    assert before.text != after.text
