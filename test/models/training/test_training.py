"""Training any family: where gradients go, what the loss counts, a policy on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot_vlm_ros.models import AbstractVLM

Load = Callable[..., AbstractVLM]


def parts(vlm: AbstractVLM) -> dict[str, set[str]]:
    """Parameter names of vision, of language (with the output layer), and of what joins them."""
    names: dict[str, set[str]] = {"vision": set(), "language": set(), "joint": set()}
    vision = {id(p) for p in vlm.vision_encoder.parameters()}
    language = {id(p) for p in vlm.language_model.parameters()}
    language |= {id(p) for p in vlm.module.lm_head.parameters()}
    for name, parameter in vlm.named_parameters():
        # Qwen's towers hold the layers that join them to the language model.
        inside = id(parameter) in vision and "merger" not in name
        part = "vision" if inside else "language" if id(parameter) in language else "joint"
        names[part].add(name)
    return names


def learning(vlm: AbstractVLM, batch: dict[str, Any]) -> dict[str, float]:
    """Largest gradient of each parameter that has one, after one backward pass."""
    vlm.train()
    vlm(**batch)["loss"].backward()
    return {n: float(p.grad.abs().max()) for n, p in vlm.named_parameters() if p.grad is not None}


def test_gradients_reach_vision_language_and_what_joins_them(load_family: Load, batch) -> None:
    vlm = load_family()
    found = learning(vlm, batch)
    for part, names in parts(vlm).items():
        reached = {name for name in names if found.get(name, 0.0) > 0}
        assert len(reached) > 0.6 * len(names), f"{part}: {sorted(names - reached)}"
        assert all(torch.isfinite(torch.tensor(found[name])) for name in reached)


@pytest.mark.parametrize("frozen", ["vision", "language"])
def test_a_frozen_part_gets_no_gradient_and_the_others_do(
    load_family: Load, batch, frozen: str
) -> None:
    vlm = load_family(**{f"freeze_{frozen}": True})
    found = learning(vlm, batch)
    names = parts(vlm)
    assert not names[frozen] & set(found)
    for part in {"vision", "language", "joint"} - {frozen}:
        assert max(found.get(name, 0.0) for name in names[part]) > 0, part


@pytest.mark.parametrize("config", [{}, {"use_lora": True, "lora_rank": 2}], ids=["whole", "lora"])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(
    load_family: Load, batch, config: dict[str, Any]
) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vlm = load_family(config={**config, "gradient_checkpointing": checkpointing}).train()
        again = 0

        def count(*_: Any) -> None:
            nonlocal again
            again += 1

        linear = [m for m in vlm.language_model.modules() if isinstance(m, nn.Linear)]
        linear[0].register_forward_hook(count)
        torch.manual_seed(1)  # of dropout
        loss = vlm(**batch)["loss"]
        forward = again
        loss.backward()
        assert (again > forward) == checkpointing
        grads = {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (loss, grads), (other_loss, other_grads) = results
    torch.testing.assert_close(other_loss, loss)
    assert grads
    assert grads.keys() == other_grads.keys()
    for name, value in grads.items():
        torch.testing.assert_close(other_grads[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_counts_the_learnt_words_and_never_the_image(load_family: Load, batch) -> None:
    vlm = load_family()
    out = vlm(**batch)
    out["logits"].retain_grad()
    out["loss"].backward()
    counted = out["logits"].grad.abs().amax(dim=-1) > 0
    assert counted.sum(dim=1).tolist() == [3, 3]
    # The three last places but one, or of a decoder that reads labels alone the last three.
    wanted = batch["labels"][:, 3:]
    rows = out["logits"].detach()[counted].unflatten(0, (2, 3)).float()
    device = [torch.device("cpu")] if vlm.family == "florence-2" else []
    suppressed = torch.as_tensor(vlm._suppressed(*device))
    rows[..., suppressed] = -torch.inf
    expected = functional.cross_entropy(rows.flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(out["loss"].detach(), expected)


def test_image_tokens_among_the_labels_are_not_learnt(load_family: Load, batch) -> None:
    vlm = load_family()
    if vlm.family == "florence-2":
        pytest.skip("its labels are the decoder's, where no image stands")
    ids = batch["input_ids"].clone()
    ids[:, 1] = vlm.config.image_token_id
    out = vlm(batch["images"], input_ids=ids, labels=ids)
    out["logits"].retain_grad()
    out["loss"].backward()
    counted = (out["logits"].grad.abs().amax(dim=-1) > 0).sum(dim=1)
    # Six tokens: nothing comes before the first, and one is the image.
    assert counted.tolist() == [4, 4]


def test_an_answer_is_not_seen_before_it_is_predicted(load_family: Load, batch) -> None:
    vlm = load_family()
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    other = {**batch, "input_ids": ids.clone(), "labels": labels.clone()}
    other["input_ids"][:, -1] = other["labels"][:, -1] = 61
    if vlm.family == "florence-2":
        other["input_ids"] = ids  # there the prompt is no part of the answer
    with torch.no_grad():
        one, two = vlm(**batch)["logits"], vlm(**other)["logits"]
    torch.testing.assert_close(one[:, :-1], two[:, :-1], atol=1e-5, rtol=1e-5)


def test_answers_between_steps_of_training_are_those_of_the_new_weights(
    load_family: Load, ask
) -> None:
    vlm = load_family().train()
    request = ask("embed")
    (before,) = vlm.run([request])
    with torch.no_grad():
        next(vlm.vision_encoder.parameters()).mul_(2.0)
    (after,) = vlm.run([request])  # of the same frame
    assert (before.embedding.array != after.embedding.array).any()
    assert vlm.training


class Policy(nn.Module):
    """A head of seven actions on a backbone, as in the specification's vision-language-action
    example.
    """

    def __init__(self, vlm_backbone: AbstractVLM, action_dim: int, freeze_vlm: bool) -> None:
        super().__init__()
        self.vlm = vlm_backbone
        if freeze_vlm:
            self.vlm.freeze()
        width = self.vlm.get_embedding_dim()
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, action_dim))

    def forward(self, images: Any, text: Any, actions: Tensor) -> dict[str, Tensor]:
        embeddings = self.vlm(images=images, text=text)["embeddings"]
        found = self.head(embeddings.mean(dim=1))
        return {"actions": found, "loss": functional.mse_loss(found, actions)}


@pytest.mark.parametrize("training", ["head", "all", "adapter"])
def test_a_policy_learns_on_top_of_it(load_family: Load, batch, training: str) -> None:
    torch.manual_seed(0)
    config = {"use_lora": True, "lora_rank": 2} if training == "adapter" else None
    vlm = load_family(config=config)
    vla = Policy(vlm_backbone=vlm, action_dim=7, freeze_vlm=training == "head")
    before = {name: value.clone() for name, value in vlm.named_parameters()}
    learnt = [p for p in vla.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learnt, lr=0.02 if training == "head" else 0.005)
    actions = torch.randn(2, 7)
    losses = []
    for _ in range(4 if vlm.family == "florence-2" else 10):
        images, instructions = batch["images"], ["cab", "bag"]
        outputs = vla(images=images, text=instructions, actions=actions)
        loss = outputs["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, value in vlm.named_parameters() if not value.equal(before[name])}
    if training == "all":
        for part, names in parts(vlm).items():
            assert changed & names, part
    else:
        assert all(".lora_" in name for name in changed)
        assert bool(changed) == (training == "adapter")
