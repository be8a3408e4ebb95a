"""Rows about what a frame costs: its pixels, and further questions about it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.bench.models import chatty_qwen
from librobot_vlm_ros.bench.tabletop import again, answer, ask
from librobot_vlm_ros.core import Frame
from librobot_vlm_ros.models.families.preprocess import (
    ImageSettings,
    Resizing,
    normalise,
    resizing,
    squash,
)

__all__ = ["noise", "one_frame", "preprocessing"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(seed: int, height: int = 480, width: int = 640) -> Frame:
    """A frame of noise by its seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Frame(pixels, "camera", seed, sequence=seed)


def one_frame(bench: Bench) -> None:
    """A causal model asked several things about a frame: what was read of it is gone on from."""
    vlm = chatty_qwen(bench.device)
    asked = ("is there a cube?", "what lies on the table?", "which way is free?")
    seconds, together = [], []
    for number in range(bench.pairs + 1):
        frame = noise(number)
        first, second = (ask(frame, "answer", text, max_new_tokens=1) for text in asked[:2])
        a, _ = bench.seconds(lambda r=first: answer(vlm, r))
        b, _ = bench.seconds(lambda r=second: answer(vlm, r))
        seconds.append((a, b))
        alone = []
        for text in asked:
            request = ask(again(frame), "answer", text, max_new_tokens=32)
            alone.append(bench.seconds(lambda r=request: answer(vlm, r))[0])
        fresh = again(frame)
        three = [ask(fresh, "answer", text, max_new_tokens=32) for text in asked]
        spent, _ = bench.seconds(lambda r=three: answer(vlm, *r))
        together.append((max(alone), spent))
    bench.add(
        "qwen2-vl, tiny, second question on a frame",
        seconds[1:],
        share=True,
        note="time to the first token, the image is read once",
        target=0.2,
    )
    bench.add(
        "qwen2-vl, tiny, three standing tasks on a frame",
        together[1:],
        share=True,
        note="32 tokens each in one batch, against the dearest alone",
        target=1.4,
    )


def preprocessing(bench: Bench) -> None:
    """A frame of 1920x1080 to the normalised 768x768 that the models read."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = ImageSettings(768, 768, _MEAN, _STD)
    processor = CLIPImageProcessorPil(
        size={"height": 768, "width": 768},
        do_center_crop=False,
        image_mean=list(_MEAN),
        image_std=list(_STD),
    )
    device = torch.device(bench.device)

    def theirs(frame: Frame) -> None:
        image = Image.fromarray(frame.pixels)
        processor(image, return_tensors="pt")["pixel_values"].to(device)

    for how, note in (
        ("exact", "antialiased bicubic as published, float32"),
        ("fast", "the same filter by torch, at most two of 255 levels away"),
    ):
        way = resizing(how, device)

        def ours(frame: Frame, way: Resizing = way) -> None:
            normalise([squash(frame.pixels, settings, way)], settings, device, torch.float32)

        bench.paired(
            f"preprocessing 1920x1080 to 768x768, {how}",
            theirs,
            ours,
            [noise(seed, 1080, 1920) for seed in range(bench.pairs + 1)],
            note=note,
            target=8.0 if how == "fast" and device.type == "cpu" else None,
        )
