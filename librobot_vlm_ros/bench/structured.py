"""A row about answers in a notation: a decoder led to an answer, with a grammar and without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from librobot_vlm_ros.bench.frames import ask, noise
from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.bench.models import TINY, qwen_tokenizer
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.generation.loop import generate

#: More than any two logits differ by.
_LEAN = 1.0e4


class Scripted:
    """An `AppendingDecoder` that computes everything by `decoder` and then raises the logit of
    token n of each row's script; behind the script's end, of none.
    """

    def __init__(self, decoder: Any, scripts: Sequence[Sequence[int]]) -> None:
        self._decoder, self._scripts = decoder, list(scripts)
        self._place = 0
        #: Calls of the model, and columns that its output layer computed in them.
        self.calls = self.columns = 0

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self._leant(self._decoder.prefill(), None)

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        self._place += 1
        return self._leant(self._decoder.decode(tokens, allowed), allowed)

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`."""
        self._place += tokens.shape[1]
        return self._leant(self._decoder.append(tokens, allowed), allowed)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        self._decoder.reorder(rows, within)
        self._scripts = [self._scripts[row] for row in rows.tolist()]

    def _leant(self, logits: Tensor, allowed: range | Tensor | None) -> Tensor:
        self.calls += 1
        self.columns += logits.shape[-1]
        for row, script in enumerate(self._scripts):
            if self._place >= len(script):
                continue
            token = script[self._place]
            if isinstance(allowed, Tensor):
                logits[row] += _LEAN * (allowed == token)
            elif allowed is None or token in allowed:
                logits[row, token - (0 if allowed is None else allowed.start)] += _LEAN
        return logits


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

    tokenizer, marks = qwen_tokenizer("qwen3-vl-4b", THIRD)
    ends = {"eos_token_id": IDS["<|im_end|>"], "bos_token_id": IDS["<|endoftext|>"]}
    vision = TINY["qwen3-vl-4b"]["vision_config"]
    config = {"text_config": {**_TEXT, **ends}, "vision_config": vision, **marks}
    vlm = create_vlm("qwen3-vl-4b", config=config, device=device, dtype="float32").eval()
    vlm.processor.tokenizer = tokenizer
    return vlm


def structured(bench: Bench) -> None:
    """Three boxes in JSON, which the model is led to write; prompts are read outside the clock."""
    vlm = _model(bench.device)
    listed = [
        {"bbox_2d": [102, 348, 391, 702], "label": "red cube"},
        {"bbox_2d": [455, 120, 618, 377], "label": "ball"},
        {"bbox_2d": [700, 515, 1000, 948], "label": "green cup"},
    ]
    script = [*vlm.tokenizer.words(json.dumps(listed)), vlm.processor.ends()[0]]
    given = []
    for number in range(bench.pairs + 1):
        frame = noise(number, 96, 96)
        given.append(ask(frame, "detect", "", max_new_tokens=len(script) + 8))
    counted: dict[bool, Scripted] = {}

    def answers(request: Any, *, bound: bool) -> tuple[float, tuple[int, ...]]:
        with vlm.inference():
            decoder, history = vlm.backend.start([vlm.backend.prepare(0, request)])
            counted[bound] = scripted = Scripted(decoder, [script])
            rules = vlm.processor.generation_config(request.params)
            constraints = [vlm.processor.constraint(request.task)] if bound else []
            logits = scripted.prefill()
            scripted.prefill = lambda: logits  # type: ignore[method-assign]
            spent, (row,) = bench.seconds(
                lambda: generate(scripted, rules, history, constraints=constraints)
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
