"""Rows about the embedded model on the frames of the shipped bag, from image to boxes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.core import Frame, GenerationParams, InferenceRequest, ModelAnswer
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.families.florence2.processor import FLORENCE_TASKS, build_prompt

__all__ = ["Transformers", "ask", "shipped_frames", "tabletop"]


def shipped_frames(count: int) -> list[Frame]:
    """Frames of the shipped bag, spread over it."""
    from librobot_vlm_ros.bags import BagReader, shipped_bag

    with BagReader(shipped_bag()) as bag:
        found = [bag.deserialize(message) for message in bag.messages(["/camera/image_raw"])]
    step = max(1, len(found) // count)
    frames = []
    for number, message in enumerate(found[::step][:count]):
        pixels = np.asarray(message.data, dtype=np.uint8).reshape(message.height, -1)
        rgb = pixels[:, : 3 * message.width].reshape(message.height, message.width, 3)
        if message.encoding == "bgr8":
            rgb = rgb[..., ::-1]
        frames.append(Frame(np.ascontiguousarray(rgb), "camera", number, sequence=number))
    return frames


def again(frame: Frame) -> Frame:
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


class Transformers:
    """What a user would write instead: processor, `generate`, and words of the tokens.

    The processor is transformers' own for images (its PIL path, which needs no torchvision) and the
    same tokenizer file through `tokenizers`.
    """

    def __init__(self, vlm: Any) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.vlm, images = vlm, vlm.images
        # As `from_pretrained` lays its weights out.
        self.module = copy.deepcopy(vlm.module).to(memory_format=torch.contiguous_format)
        self.module.generation_config = GenerationConfig()
        self.processor = CLIPImageProcessorPil(
            size={"height": images.height, "width": images.width},
            do_center_crop=False,
            image_mean=list(images.mean),
            image_std=list(images.std),
        )

    def tokens(self, frame: Frame, task: str, text: str = "", beams: int = 1) -> list[int]:
        """Token ids of the answer, without those that end and fill it."""
        vlm = self.vlm
        image = Image.fromarray(frame.pixels)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        spec = FLORENCE_TASKS[task]
        pieces = build_prompt(spec, text, None, frame.width, frame.height)
        words = vlm.tokenizer.prompt(pieces)
        config, settings = vlm.config, vlm.settings
        ids = torch.tensor([[*[config.image_token_id] * vlm.image_tokens, *words]])
        room = min(config.text_config.max_position_embeddings, vlm.limits.max_new_tokens)
        generation = GenerationConfig(
            do_sample=False,
            num_beams=beams,
            max_length=min(settings.max_new_tokens, room) + 1,
            decoder_start_token_id=config.text_config.decoder_start_token_id,
            bos_token_id=config.text_config.bos_token_id,
            eos_token_id=config.text_config.eos_token_id,
            pad_token_id=config.text_config.pad_token_id,
            forced_bos_token_id=settings.forced_bos_token_id,
            forced_eos_token_id=settings.forced_eos_token_id,
            no_repeat_ngram_size=settings.no_repeat_ngram_size or None,
            early_stopping=settings.early_stopping,
            length_penalty=settings.length_penalty,
            suppress_tokens=vlm._suppressed(torch.device("cpu")).tolist(),
        )
        device = vlm.torch_device
        with torch.inference_mode():
            out = self.module.generate(
                input_ids=ids.to(device),
                attention_mask=torch.ones_like(ids, device=device),
                pixel_values=pixels.to(device, vlm.torch_dtype),
                generation_config=generation,
            )
        row = out[0, 1:].tolist()
        vlm.tokenizer.decode(row)
        return row


class _Recorder:
    """Keeps the tokens that `read` is given."""

    def __init__(self, vlm: Any) -> None:
        self.rows: list[list[int]] = []
        usual = vlm.read

        def read(request: InferenceRequest, generated: Any) -> ModelAnswer:
            self.rows.append(list(generated.ids))
            answered: ModelAnswer = usual(request, generated)
            return answered

        vlm.read = read

    def take(self) -> list[list[int]]:
        """Rows since the last time."""
        rows, self.rows = self.rows, []
        return rows


def tabletop(bench: Bench) -> None:
    """From a frame of 640x480 to boxes, and what several questions on one frame cost."""
    frames = shipped_frames(2 * bench.pairs + 2)
    vlm = create_vlm("florence-2-tabletop", device=bench.device)
    reference, recorder = Transformers(vlm), _Recorder(vlm)
    for beams in (1, 3):

        def ours(frame: Frame, beams: int = beams) -> list[int]:
            answer(vlm, ask(frame, "detect", num_beams=beams))
            return recorder.take()[0]

        def theirs(frame: Frame, beams: int = beams) -> list[int]:
            return reference.tokens(frame, "detect", beams=beams)

        usual = " (as shipped)" if beams == vlm.settings.num_beams else ""
        bench.paired(
            f"tabletop, detect, {'greedy' if beams == 1 else f'{beams} beams'}{usual}",
            theirs,
            ours,
            [again(frame) for frame in frames[: bench.pairs + 1]],
            note="a 640x480 frame to boxes",
            target=2.0,
        )
    _on_one_frame(bench, vlm, [again(frame) for frame in frames[: bench.pairs + 1]])
    _together(bench, vlm, recorder, [again(frame) for frame in frames])


def _on_one_frame(bench: Bench, vlm: Any, frames: Sequence[Frame]) -> None:
    """A second question, and three standing tasks against the dearest of them alone."""
    times = []
    for frame in frames:
        first, _ = bench.seconds(lambda f=frame: answer(vlm, ask(f, "caption", max_new_tokens=1)))
        second, _ = bench.seconds(lambda f=frame: answer(vlm, ask(f, "detect", max_new_tokens=1)))
        times.append((first, second))
    bench.add(
        "tabletop, second question on a frame",
        times[1:],
        share=True,
        note="time to the first token; the encoder reads image and words together, every time",
    )
    tasks = (("caption", ""), ("detect", ""), ("ground", "the red cube"))
    times = []
    for frame in frames:
        alone = []
        for task in tasks:
            fresh = again(frame)
            alone.append(bench.seconds(lambda f=fresh, t=task: answer(vlm, ask(f, *t))))
        fresh = again(frame)
        together, _ = bench.seconds(lambda f=fresh: answer(vlm, *(ask(f, *t) for t in tasks)))
        times.append((max(spent for spent, _ in alone), together))
    bench.add(
        "tabletop, three standing tasks on a frame",
        times[1:],
        share=True,
        note="caption, detect and ground together, against the dearest alone",
        target=1.4,
    )


def _together(bench: Bench, vlm: Any, recorder: _Recorder, frames: Sequence[Frame]) -> None:
    """Eight frames one at a time and in one batch."""

    def one_at_a_time(batch: Sequence[Frame]) -> list[list[int]]:
        for frame in batch:
            answer(vlm, ask(again(frame), "detect"))
        return recorder.take()

    def at_once(batch: Sequence[Frame]) -> list[list[int]]:
        answer(vlm, *(ask(again(frame), "detect") for frame in batch))
        return recorder.take()

    recorder.take()
    eight = [(frames * 8)[start : start + 8] for start in range(max(3, bench.pairs // 2))]
    bench.paired(
        "tabletop, eight frames in a batch",
        one_at_a_time,
        at_once,
        eight,
        note="against one at a time",
        target=4.0 if bench.cuda else None,
    )
