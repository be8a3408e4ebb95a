"""A row about answers in a notation: the same engine with a grammar and without."""

from __future__ import annotations

import json
from typing import Any

from librobot_vlm_ros.bench.frames import noise
from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.bench.models import TINY, qwen_words
from librobot_vlm_ros.bench.scripted import Scripted
from librobot_vlm_ros.bench.tabletop import ask
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.generation.loop import generate

__all__ = ["structured"]

#: Its output layer has the share of all weights that Qwen3-VL-4B's has, a tenth.
_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1300,
    "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]},
}


def _model(device: str) -> Any:
    """A Qwen3-VL of random weights with a tokenizer of letters."""
    from librobot_vlm_ros.models.testing.qwen_vl import IDS, THIRD

    tokenizer, marks = qwen_words("qwen3-vl-4b", THIRD)
    ends = {"eos_token_id": IDS["<|im_end|>"], "bos_token_id": IDS["<|endoftext|>"]}
    vision = TINY["qwen3-vl-4b"]["vision_config"]
    config = {"text_config": {**_TEXT, **ends}, "vision_config": vision, **marks}
    vlm = create_vlm("qwen3-vl-4b", config=config, device=device, dtype="float32").eval()
    vlm.tokenizer = tokenizer
    return vlm


def structured(bench: Bench) -> None:
    """Three boxes in JSON, which the model is led to write; prompts are read outside the clock."""
    vlm = _model(bench.device)
    listed = [
        {"bbox_2d": [102, 348, 391, 702], "label": "red cube"},
        {"bbox_2d": [455, 120, 618, 377], "label": "ball"},
        {"bbox_2d": [700, 515, 1000, 948], "label": "green cup"},
    ]
    script = [*vlm.tokenizer.words(json.dumps(listed)), vlm._ends()[0]]
    given = []
    for number in range(bench.pairs + 1):
        frame = noise(number, 96, 96)
        given.append(ask(frame, "detect", "", max_new_tokens=len(script) + 8))
    counted: dict[bool, Scripted] = {}

    def answers(request: Any, *, bound: bool) -> tuple[float, tuple[int, ...]]:
        with vlm._answering():
            decoder, history = vlm.start([vlm._job(0, request)])
            counted[bound] = scripted = Scripted(decoder, [script])
            rules = vlm.rules(request.params)
            grammars = [vlm.grammar(request)] if bound else []
            scripted.prefill = _held(scripted.prefill())  # type: ignore[method-assign]
            spent, (row,) = bench.seconds(
                lambda: generate(scripted, rules, history, grammars=grammars)
            )
        assert isinstance(row, Generated)
        return spent, row.ids

    times, same = [], True
    for number, request in enumerate(given):
        a, free = answers(request, bound=False)
        b, kept = answers(request, bound=True)
        same = same and free == kept == tuple(script)
        if number:
            times.append((a, b))
    saved = 1 - counted[True].columns / counted[False].columns
    bench.add(
        "structured answer",
        times,
        same,
        note=f"{len(script)} tokens of boxes in JSON, tiny qwen3-vl, a grammar against none: "
        f"{100 * saved:.0f} % less of the output layer",
    )


def _held(logits: Any) -> Any:
    """Gives what was computed before."""
    return lambda: logits
