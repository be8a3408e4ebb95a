"""Florence-2 as tensors in, tensors out: encoding, forward with a loss, generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    ModelError,
    RequestError,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.models.answering import again_in_safer_dtype
from librobot_vlm_ros.models.davit_pass import DavitPass, make_pass
from librobot_vlm_ros.models.decode import Decoder
from librobot_vlm_ros.models.florence_config import image_tokens
from librobot_vlm_ros.models.florence_decoder import FlorenceDecoder, encode_prompts
from librobot_vlm_ros.models.florence_folder import FlorenceParts
from librobot_vlm_ros.models.florence_prompts import FLORENCE_TASKS, build_prompt
from librobot_vlm_ros.models.florence_tokenizer import FlorenceTokenizer
from librobot_vlm_ros.models.making import Making
from librobot_vlm_ros.models.preprocess import to_views
from librobot_vlm_ros.models.step_bart import BartStep
from librobot_vlm_ros.models.step_decoder import BartStepDecoder
from librobot_vlm_ros.models.token_rows import IGNORED, token_rows

__all__ = ["FlorenceTensors"]


class FlorenceTensors(Making):
    """The learner's side of Florence-2; `FlorenceVLM` adds the robot's."""

    family = "florence-2"

    def _take(self, parts: FlorenceParts) -> None:
        self.module = parts.module
        self._pool = self._tower = None
        # Its blocks go over to channels last and back: convolutions that have them so save 7 %.
        self.module.model.vision_tower.to(memory_format=torch.channels_last)
        self.images = parts.images
        self.settings = parts.settings
        self.tokenizer = parts.tokenizer
        self.config = parts.module.config
        # Fails now, not at the first frame, when images of that size don't fit.
        self.image_tokens = image_tokens(
            self.config.vision_config, self.images.height, self.images.width
        )

    def encode_image(self, images: Any) -> Tensor:
        """[B, N, D]; of several views the tokens stand one view after the other."""
        views = to_views(images, self.images, self.torch_device, self.torch_dtype)
        image_tokens(self.config.vision_config, *views.shape[-2:])
        features = self._see(views.flatten(0, 1))
        return features.unflatten(0, views.shape[:2]).flatten(1, 2)

    def encode_text(self, text: Any) -> Tensor:
        """The encoder's view of words alone, [B, T, D]; shorter rows are padded at the end."""
        rows = self._ids(text, None)
        return self._encode(None, rows)[0]

    def forward(
        self,
        images: Any = None,
        text: Sequence[str] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Encoder over image and words, decoder over the labels.

        `text`: full prompts; or `input_ids` int64 [B, L] with `attention_mask`, without image
        tokens. `labels` int64 [B, T]: the answer, -100 is not learnt. Without labels and
        `decoder_input_ids` the logits are those of the first answer token, [B, 1, V]. The loss
        leaves out the image token, which is no word.
        """
        module = self._loaded()
        rows = self._ids(text if text is not None else input_ids, attention_mask)
        features = list(self.encode_image(images)) if images is not None else None
        hidden, mask = self._encode(features, rows)
        if decoder_input_ids is None:
            decoder_input_ids = self._decoder_input(labels, len(rows))
        output = module.model.language_model.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        logits = module.lm_head(output.last_hidden_state)
        result = {"embeddings": hidden, "logits": logits}
        if labels is not None:
            words = logits.float()
            lowest = torch.finfo(words.dtype).min
            words = words.index_fill(2, self._suppressed(words.device), lowest)
            result["loss"] = functional.cross_entropy(
                words.flatten(0, 1), labels.to(words.device).flatten(), ignore_index=-100
            )
        return result

    @again_in_safer_dtype
    def generate(
        self,
        images: Any = None,
        input_ids: Any = None,
        *,
        text: Any = None,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Answers as token ids int64 [B, L], padded at the end; `decode_text` makes words of them.

        `input_ids` (tensor [B, L] or strings) or `text` is the prompt. With a `task` its sentence
        is the prompt, and what is given as ids or text stands in the sentence's place for input,
        or behind a sentence that has none.
        """
        rules = self.rules(GenerationParams(max_new_tokens, num_beams, temperature, top_p, seed))
        words = text if text is not None else input_ids
        with self._answering():
            features = list(self.encode_image(images)) if images is not None else None
            if task is None:
                rows = self._ids(words, attention_mask)
            else:
                count = len(features) if features is not None else len(words)
                rows = self._task_ids(task, words, attention_mask, count)
            decoder, history = self._start(features, rows)
            return self._written(decoder, history, rules, seed)

    def get_embedding_dim(self) -> int:
        """D of image features and text features alike."""
        return int(self.config.text_config.d_model)

    @property
    def vision_encoder(self) -> nn.Module:
        """The DaViT tower, without the projection."""
        tower: nn.Module = self._loaded().model.vision_tower
        return tower

    @property
    def language_model(self) -> nn.Module:
        """BART's encoder and decoder; the output layer is tied to its word embeddings."""
        bart: nn.Module = self._loaded().model.language_model
        return bart

    # Inside.

    def _words(self) -> FlorenceTokenizer:
        if self.tokenizer is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{self.name} was built from a config and has no tokenizer",
                "pass token ids, or load it from a folder with a tokenizer.json",
            )
        return self.tokenizer

    def _see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D]."""
        model = self._loaded().model
        if self._answers_now and (tower := self._pass()) is not None:
            found: Tensor = model.multi_modal_projector(tower(pixels))
            return found
        features: Tensor = model.get_image_features(pixels).pooler_output
        return features

    def _pass(self) -> DavitPass | None:
        """The tower as arithmetic, over the weights as they are now; None where it cannot be."""
        if self.decoder == "module" or self.torch_device.type != "cpu":
            return None
        if self._tower is None or self._tower[0] is not self._weights:
            self._tower = self._weights, make_pass(self.vision_encoder)
        found: DavitPass | None = self._tower[1]
        return None if found is None or found.hooked else found

    def _start(
        self, features: Sequence[Tensor] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[Decoder, Tensor]:
        hidden, mask = self._encode(features, rows)
        start = self.config.text_config.decoder_start_token_id
        history = torch.full((len(rows), 1), start, dtype=torch.int64, device=self.torch_device)
        text = self.language_model.decoder
        pool = self._step_pool(BartStep, text, self.module.lm_head)
        if pool is not None:
            return BartStepDecoder(pool, hidden, mask, start), history
        return FlorenceDecoder(self.module, hidden, mask, start), history

    def _encode(
        self, features: Sequence[Tensor] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's states and mask of images and prompts, one of each a row."""
        if features is not None and len(features) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(features)} images for {len(rows)} prompts"
            )
        module = self._loaded()
        for number, row in enumerate(rows):
            self._check_length(len(row) + (len(features[number]) if features is not None else 0))
            if not row and features is None:
                raise RequestError(
                    ErrorCode.EMPTY_PROMPT, "there is a row with neither words nor an image"
                )
        table = module.get_input_embeddings()
        words = [
            table(torch.tensor(row, dtype=torch.int64, device=self.torch_device)) for row in rows
        ]
        return encode_prompts(module, features, words)

    def _ids(self, text: Any, attention_mask: Tensor | None) -> list[list[int]]:
        """Prompts as lists of ids: strings between begin and end, ids without image and padding."""
        if isinstance(text, str):
            text = [text]
        if text is None or len(text) == 0:
            raise RequestError(ErrorCode.EMPTY_PROMPT, "neither text nor input_ids were given")
        if isinstance(text[0], str):
            return [self._words().prompt([self._clean(row)]) for row in text]
        image = self.config.image_token_id
        size = int(self.config.text_config.vocab_size)
        rows = token_rows(text, attention_mask, size, (image,))
        return [[token for token in row if token != image] for row in rows]

    def _task_ids(
        self, task: str, words: Any, attention_mask: Tensor | None, count: int
    ) -> list[list[int]]:
        """The task's prompt for each row, with what was given in it."""
        name = get_task(task).name
        if name not in FLORENCE_TASKS or name not in self.tasks:
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r} here, it can: {', '.join(sorted(self.tasks))}",
            )
        spec = FLORENCE_TASKS[name]
        tokenizer = self._words()
        if words is None or isinstance(words, str):
            words = [words or ""] * count
        if isinstance(words[0], str):
            return [
                tokenizer.prompt(build_prompt(spec, self._clean(row), None, 1, 1)) for row in words
            ]
        before, _, after = spec.sentence.partition("{input}")
        if spec.takes != "region":
            before = before.rstrip()  # a word's id holds the space before it, a location's does not
        outer = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
        rows = [[t for t in row if t not in outer] for row in self._ids(words, attention_mask)]
        return [
            [tokenizer.bos, *tokenizer.words(before), *row, *tokenizer.words(after), tokenizer.eos]
            for row in rows
        ]

    def _clean(self, text: str) -> str:
        return clean_prompt(
            text,
            required=False,
            limits=self.limits,
            control_tokens=self._words().control_tokens,
        )

    def _check_length(self, length: int) -> None:
        room = self.config.text_config.max_position_embeddings
        if length > room:
            raise RequestError(
                ErrorCode.PROMPT_TOO_LONG,
                f"image and prompt take {length} tokens, {self.name} has room for {room}",
                "shorten the prompt",
            )

    def _suppressed(self, device: torch.device) -> Tensor:
        """Rows of the vocabulary that are no words: the image token, and padding behind it."""
        size = self.config.text_config.vocab_size
        first = size if self.tokenizer is None else min(size, self.tokenizer.size)
        ids = {self.config.image_token_id, *range(first, size)}
        return torch.tensor(sorted(ids), device=device)

    def _decoder_input(self, labels: Tensor | None, rows: int) -> Tensor:
        """The start token, and behind it the labels without their last one."""
        text = self.config.text_config
        start = torch.full((rows, 1), text.decoder_start_token_id, device=self.torch_device)
        if labels is None:
            return start
        token_rows(labels, None, int(text.vocab_size), (IGNORED,))
        shifted = labels[:, :-1].to(self.torch_device)
        return torch.cat([start, shifted.masked_fill(shifted == -100, text.pad_token_id)], dim=1)
