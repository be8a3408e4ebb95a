"""Rows about whole frames: what pixels cost, a frame to boxes, and several questions on one frame.

The embedded model is asked about frames of the shipped bag; a causal model, and preprocessing
alone, about noise.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from librobot_vlm_ros.bags import BagReader, shipped_bag
from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.bench.models import (
    generate_by_transformers,
    published_settings,
    qwen_with_tokenizer,
    search,
)
from librobot_vlm_ros.core import (
    Frame,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    decode_message,
)
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.families.florence2.processor import FLORENCE_TASKS, build_prompt
from librobot_vlm_ros.models.inputs.preprocess import (
    ImageSettings,
    Resizing,
    normalise,
    resizing,
    squash,
)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(seed: int, height: int = 480, width: int = 640) -> Frame:
    """A frame of noise by its seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Frame(pixels, "camera", seed, sequence=seed)


def shipped_frames(count: int) -> list[Frame]:
    """Frames of the shipped bag, spread over it."""
    with BagReader(shipped_bag()) as bag:
        found = [bag.deserialize(message) for message in bag.messages(["/camera/image_raw"])]
    step = max(1, len(found) // count)
    return [
        Frame(decode_message(image), "camera", number, sequence=number)
        for number, image in enumerate(found[::step][:count])
    ]


def fresh(frame: Frame) -> Frame:
    """The same picture as a frame of its own, of which nothing is known."""
    return dataclasses.replace(frame)


def ask(frame: Frame, task: str, text: str = "", **params: Any) -> InferenceRequest:
    """A request as a node makes it."""
    return InferenceRequest("bench", frame, task, prompt=text, params=GenerationParams(**params))


def answer(vlm: Any, *requests: InferenceRequest) -> list[ModelAnswer]:
    """What the model says; an error ends the measurement."""
    entries = vlm.run(list(requests))
    for entry in entries:
        if not isinstance(entry, ModelAnswer):
            raise entry
    return list(entries)


def _transformers_processor(images: ImageSettings) -> Any:
    return CLIPImageProcessorPil(
        size={"height": images.height, "width": images.width},
        do_center_crop=False,
        image_mean=list(images.mean),
        image_std=list(images.std),
    )


class _Transformers:
    """What a user would write instead: processor, `generate`, and words of the tokens.

    The processor is transformers' own for images (its PIL path, which needs no torchvision) and the
    same tokenizer file through `tokenizers`.
    """

    def __init__(self, vlm: Any) -> None:
        self.vlm, images = vlm, vlm.images
        # As `from_pretrained` lays its weights out.
        self.module = copy.deepcopy(vlm.module).to(memory_format=torch.contiguous_format)
        self.module.generation_config = GenerationConfig()
        self.processor = _transformers_processor(images)

    def tokens(self, frame: Frame, task: str, text: str = "", beams: int = 1) -> list[int]:
        """Token ids of the answer, without those that end and fill it."""
        vlm = self.vlm
        image = Image.fromarray(frame.pixels)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        spec = FLORENCE_TASKS[task]
        pieces = build_prompt(spec, text, None, frame.width, frame.height)
        words = vlm.tokenizer.prompt(pieces)
        config = vlm.config
        ids = torch.tensor([[*[config.image_token_id] * vlm.processor.image_tokens, *words]])
        room = min(config.text_config.max_position_embeddings, vlm.limits.max_new_tokens)
        settings = {
            "num_beams": beams,
            "max_length": min(vlm.processor.settings.max_new_tokens, room) + 1,
            "bos_token_id": config.text_config.bos_token_id,
            "eos_token_id": config.text_config.eos_token_id,
            "pad_token_id": config.text_config.pad_token_id,
            "suppress_tokens": vlm.processor.suppressed(),
            **published_settings(vlm),
        }
        pixels = pixels.to(vlm.torch_device, vlm.torch_dtype)
        ids = ids.to(vlm.torch_device)
        row = generate_by_transformers(self.module, ids, settings, pixel_values=pixels)[1:]
        vlm.tokenizer.decode(row)
        return row


class _Recorder:
    """Keeps the tokens that `read` is given."""

    def __init__(self, vlm: Any) -> None:
        self.rows: list[list[int]] = []
        usual = vlm.processor.read

        def read(request: InferenceRequest, generated: Any) -> ModelAnswer:
            self.rows.append(list(generated.ids))
            answered: ModelAnswer = usual(request, generated)
            return answered

        vlm.processor.read = read

    def pop_rows(self) -> list[list[int]]:
        """Rows since the last time."""
        rows, self.rows = self.rows, []
        return rows


def tabletop(bench: Bench) -> None:
    """From a frame of 640x480 to boxes, and what several questions on one frame cost."""
    frames = shipped_frames(2 * bench.pairs + 2)
    vlm = create_vlm("florence-2-tabletop", device=bench.device)
    reference, recorder = _Transformers(vlm), _Recorder(vlm)
    for beams in (1, 3):

        def ours(frame: Frame, beams: int = beams) -> list[int]:
            answer(vlm, ask(frame, "detect", num_beams=beams))
            return recorder.pop_rows()[0]

        def theirs(frame: Frame, beams: int = beams) -> list[int]:
            return reference.tokens(frame, "detect", beams=beams)

        usual = " (as shipped)" if beams == vlm.processor.settings.num_beams else ""
        bench.paired(
            f"tabletop, detect, {search(beams)}{usual}",
            theirs,
            ours,
            [fresh(frame) for frame in frames[: bench.pairs + 1]],
            note="a 640x480 frame to boxes",
            target=2.0,
        )
    _on_one_frame(
        bench,
        "tabletop",
        vlm,
        [fresh(frame) for frame in frames[: bench.pairs + 1]],
        [("caption", ""), ("detect", ""), ("ground", "the red cube")],
        ("time to the first token; the encoder reads image and words together, every time", None),
        ("caption, detect and ground together, against the dearest alone", 1.4),
    )
    _in_a_batch(bench, vlm, recorder, [fresh(frame) for frame in frames])


def _on_one_frame(
    bench: Bench,
    name: str,
    vlm: Any,
    frames: Sequence[Frame],
    asked: Sequence[tuple[str, str]],
    second: tuple[str, float | None],
    together: tuple[str, float | None],
    **params: Any,
) -> None:
    """A second question on a frame, and three against the dearest of them alone.

    `asked`: task and text of each; `second`, `together`: note and target of the two rows.
    """
    after = [_one_after_the_other(bench, vlm, frame, asked[:2]) for frame in frames]
    shared = [_alone_and_together(bench, vlm, frame, asked, **params) for frame in frames]
    for what, times, (note, target) in (
        ("second question", after, second),
        ("three standing tasks", shared, together),
    ):
        row = f"{name}, {what} on a frame"
        bench.add(row, times[1:], share=True, note=note, target=target)


def _one_after_the_other(
    bench: Bench, vlm: Any, frame: Frame, questions: Sequence[tuple[str, str]]
) -> tuple[float, float]:
    """Seconds to the first token of the first question (task, text) on a frame and of the next."""
    first, second = (ask(frame, *question, max_new_tokens=1) for question in questions)
    return bench.seconds(answer, vlm, first)[0], bench.seconds(answer, vlm, second)[0]


def _alone_and_together(
    bench: Bench, vlm: Any, frame: Frame, questions: Sequence[tuple[str, str]], **params: Any
) -> tuple[float, float]:
    """Seconds of the dearest of the questions (task, text) alone, and of all in one batch."""
    alone = [
        bench.seconds(answer, vlm, ask(fresh(frame), *question, **params))[0]
        for question in questions
    ]
    shared = fresh(frame)
    requests = [ask(shared, *question, **params) for question in questions]
    return max(alone), bench.seconds(answer, vlm, *requests)[0]


def _in_a_batch(bench: Bench, vlm: Any, recorder: _Recorder, frames: list[Frame]) -> None:
    """Eight frames one at a time and in one batch."""

    def one_at_a_time(batch: Sequence[Frame]) -> list[list[int]]:
        for frame in batch:
            answer(vlm, ask(fresh(frame), "detect"))
        return recorder.pop_rows()

    def at_once(batch: Sequence[Frame]) -> list[list[int]]:
        answer(vlm, *(ask(fresh(frame), "detect") for frame in batch))
        return recorder.pop_rows()

    recorder.pop_rows()
    eight = [(frames * 8)[start : start + 8] for start in range(max(3, bench.pairs // 2))]
    bench.paired(
        "tabletop, eight frames in a batch",
        one_at_a_time,
        at_once,
        eight,
        note="against one at a time",
        target=4.0 if bench.cuda else None,
    )


def one_frame(bench: Bench) -> None:
    """A causal model asked several things about a frame, whose cached prefix it reuses."""
    vlm = qwen_with_tokenizer(bench.device)
    texts = ("is there a cube?", "what lies on the table?", "which way is free?")
    _on_one_frame(
        bench,
        "qwen2-vl, tiny",
        vlm,
        [noise(number) for number in range(bench.pairs + 1)],
        [("answer", text) for text in texts],
        ("time to the first token, the image is read once", 0.2),
        ("32 tokens each in one batch, against the dearest alone", 1.4),
        max_new_tokens=32,
    )


def preprocessing(bench: Bench) -> None:
    """A frame of 1920x1080 to the normalised 768x768 that the models read."""
    settings = ImageSettings(768, 768, _MEAN, _STD)
    processor = _transformers_processor(settings)
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
