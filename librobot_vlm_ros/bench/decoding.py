"""Rows about decoding alone.

On any device: small models of every family, both ways. On a GPU also models of full size with
random weights in half precision, and how near they come to the roofline of its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.bench.models import TINY, Pair, build, pair_of, search


def deep_decoder(bench: Bench) -> None:
    """A decoder of 24 layers, as deep as a 2B model's, small enough that only overhead counts."""
    text = {**TINY["llava-v1.5-7b"]["text_config"], "num_hidden_layers": 24}
    pair = pair_of("llava-v1.5-7b", bench.device, 64, text_config=text)
    note = "64 tokens, greedy, batch 1, hidden size 128"
    pair.compare(bench, "24-layer decoder", bench.pairs, note=note, target=2.5)


def families(bench: Bench) -> None:
    """Eight layers of each family."""
    for name in sorted(set(TINY) - {"florence-2-base"}):
        pair = pair_of(name, bench.device, 48)
        note = "48 tokens, greedy, batch 1, 8 layers"
        pair.compare(bench, f"{name}, tiny", max(3, bench.pairs // 2), note=note)


def florence(bench: Bench) -> None:
    """A small Florence-2, greedy and with three beams."""
    pair = pair_of("florence-2-base", bench.device, 48)
    for beams in (1, 3):
        pair.beams = beams
        note = "48 tokens, batch 1, 6 decoder layers, the published rules"
        name = f"florence-2, tiny, {search(beams)}"
        pair.compare(bench, name, max(3, bench.pairs // 2), note=note)


def florence_base(bench: Bench) -> None:
    """Florence-2-base, 100 tokens, greedy and with its published three beams."""
    pair = Pair(build("florence-2-base", bench.device, "float16"), 100, 768)
    for beams, target in ((1, 10.0), (3, None)):
        pair.beams = beams
        _decode_row(bench, f"florence-2-base, decode, {search(beams)}", pair, target)
    _free(pair)


def qwen_2b(bench: Bench) -> None:
    """Qwen2-VL-2B on a 448x448 image."""
    pair = Pair(build("qwen2-vl-2b", bench.device, "float16"), 128, 448, words=32)
    _decode_row(bench, "qwen2-vl-2b, decode", pair, 10.0)
    _roofline(bench, "qwen2-vl-2b", pair, None)
    _free(pair)


def seven_b(bench: Bench) -> None:
    """LLaVA-1.5-7B."""
    pair = Pair(build("llava-v1.5-7b", bench.device, "float16"), 96, 336, words=32)
    _decode_row(bench, "llava-v1.5-7b, decode", pair, 4.0)
    _roofline(bench, "llava-v1.5-7b", pair, 0.6)
    _free(pair)


def _seconds_a_token(
    bench: Bench, pair: Pair, side: Callable[..., list[int]], given: Any
) -> tuple[float, list[int]]:
    """Behind the first: a whole answer less one of a single token; and the answer."""
    short, _ = bench.seconds(side, given, 1)
    long, row = bench.seconds(side, given)
    return (long - short) / (pair.new_tokens - 1), row


def _decode_row(bench: Bench, name: str, pair: Pair, target: float | None) -> None:
    """Seconds a token of both sides."""
    times: list[tuple[float, float]] = []
    agreed, same = [], True
    for given in pair.inputs(bench.pairs + 1):
        a, expected = _seconds_a_token(bench, pair, pair.theirs, given)
        b, found = _seconds_a_token(bench, pair, pair.ours, given)
        times.append((a, b))
        same = same and expected == found
        agreed.append(_common_prefix(expected, found))
    note = f"seconds a token, {pair.new_tokens} tokens, float16, batch 1"
    if not same:
        # Random weights leave the best two tokens close: one rounding ends the likeness.
        note += f"; the first {min(agreed)} to {max(agreed)} tokens are the same"
    bench.add(name, times[1:], same, note=note, target=target)


def _common_prefix(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _copy_bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes, the best of several."""
    size = 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * size / (begin.elapsed_time(end) / 1e3))
    return best


def _roofline(bench: Bench, name: str, pair: Pair, target: float | None) -> None:
    """What a token takes at least, by the bytes it reads, against what it takes."""
    vlm, given = pair.vlm, pair.inputs(1)[0]
    bandwidth = _copy_bandwidth(bench.device)
    text, head = vlm.language_model, vlm.module.lm_head
    table = text.get_input_embeddings().weight
    weights = sum(weight.nbytes for weight in text.parameters()) - table.nbytes
    weights += head.weight.nbytes
    config = vlm.config.text_config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = pair.image_vectors(given[0]) + pair.words + pair.new_tokens / 2
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * size * length * 2
    least = (weights + kept) / bandwidth
    times = [
        (least, _seconds_a_token(bench, pair, pair.ours, given)[0]) for _ in range(bench.pairs + 1)
    ]
    bench.add(
        f"{name}, share of the memory roofline",
        times[1:],
        note=f"weights and KV at a measured copy's {bandwidth / 1e12:.2f} TB/s; 1 is the limit",
        target=target,
    )


def _free(pair: Pair) -> None:
    pair.vlm.close()
    torch.cuda.empty_cache()
