"""DaViT's tower as arithmetic: what the module would have seen, or the module itself."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.generation.fast.davit import FastDavit, make_fast_davit
from librobot_vlm_ros.models.generation.fast.weights import UnsupportedError
from librobot_vlm_ros.models.testing.florence2 import TINY_VISION

VISION = {**TINY_VISION, "drop_path_rate": 0.3}


def tower(**vision: Any) -> Any:
    from transformers import Florence2VisionConfig
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    torch.manual_seed(2)
    config = Florence2VisionConfig(**{**VISION, **vision})
    config._attn_implementation = "sdpa"
    module = Florence2VisionBackbone(config).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would prove little
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return module


def same(module: Any, height: int, width: int, batch: int = 1) -> None:
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = module(pixels).last_hidden_state
        found = FastDavit(module)(pixels)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-5


@pytest.mark.parametrize(
    ("vision", "height", "width", "batch"),
    [
        ({}, 64, 64, 1),
        ({}, 64, 96, 3),
        ({}, 72, 40, 2),  # no multiple of the windows
        ({"window_size": 16}, 64, 64, 1),  # the window is larger than the image
        ({"depths": [0, 1, 3, 0], "patch_prenorm": [True, False, True, False]}, 64, 64, 2),
        ({"qkv_bias": False}, 64, 64, 1),
    ],
)
def test_it_sees_what_the_module_sees(
    vision: dict[str, Any], height: int, width: int, batch: int
) -> None:
    same(tower(**vision), height, width, batch)


def hooked(module: Any) -> None:
    module.blocks[0][0].spatial_block.norm1.register_forward_hook(lambda *_: None)


def replaced(module: Any) -> None:
    class Adapted(nn.Linear):
        pass

    module.blocks[0][0].spatial_block.ffn.fc1 = Adapted(8, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module: module.train(), "training"),
        (lambda module: module.half(), "float32"),
        (hooked, "hooks"),
        (replaced, "Adapted"),
        (lambda module: setattr(module.config, "_attn_implementation", "eager"), "eager"),
        (lambda module: setattr(module.config, "activation_function", "relu"), "relu"),
    ],
)
def test_what_it_does_not_know_is_left_to_the_module(change: Any, reason: str) -> None:
    module = tower()
    change(module)
    with pytest.raises(UnsupportedError, match=reason):
        FastDavit(module)
    assert make_fast_davit(module) is None


def test_answers_see_through_it_and_learners_through_the_module(
    vlm: Any, frame: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    usual = FastDavit.__call__

    def counted(self: FastDavit, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return usual(self, pixels)

    monkeypatch.setattr(FastDavit, "__call__", counted)
    expected = vlm.encode_image(frame)
    assert not calls
    (answer,) = vlm.run([ask("embed")])
    assert calls == [1]
    found = torch.from_numpy(answer.embedding.array)
    assert (found - expected[0].float().mean(dim=0)).abs().max() < 1e-4
    vlm.generator.kind = "module"
    vlm.backend.frames.clear()
    vlm.run([ask("embed")])
    assert calls == [1]


def test_weights_that_change_are_the_ones_it_sees_with(vlm: Any, frame: Any, ask: Any) -> None:
    vlm.run([ask("embed")])
    with torch.no_grad():
        for weight in vlm.vision_encoder.parameters():
            weight.mul_(1.1)
    (answer,) = vlm.run([ask("embed")])
    expected = vlm.encode_image(frame)[0].detach().float().mean(dim=0)
    assert (torch.from_numpy(answer.embedding.array) - expected).abs().max() < 1e-4


def test_a_hook_is_called_whenever_it_was_registered(vlm: Any, ask: Any) -> None:
    vlm.run([ask("embed")])
    seen: list[torch.Size] = []
    first = vlm.vision_encoder.convs[0]
    hook = first.register_forward_hook(lambda _module, _given, found: seen.append(found.shape))
    vlm.backend.frames.clear()
    vlm.run([ask("embed")])
    assert len(seen) == 1
    hook.remove()
    vlm.backend.frames.clear()
    vlm.run([ask("embed")])
    assert len(seen) == 1


def test_a_closed_model_leaves_nothing_of_it(tiny_folder: Any, ask: Any) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu")
    vlm.run([ask("embed")])
    weight = weakref.ref(vlm.vision_encoder.convs[0].conv.weight)
    made = weakref.ref(vlm._tower[1])
    vlm.backend.close()
    gc.collect()
    assert made() is None
    assert weight() is None
