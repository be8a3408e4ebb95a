"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242) on transformers' own Florence-2 class.

One image, one sentence that names the task, one answer in words and location tokens. The
published base and large models and the tabletop model of this package are all this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError, get_task
from librobot_vlm_ros.models.cache.image_features import ImageFeatures
from librobot_vlm_ros.models.checkpoints.loading import build_random, load_module
from librobot_vlm_ros.models.checkpoints.shards import read_config, read_json
from librobot_vlm_ros.models.configuration import section
from librobot_vlm_ros.models.families.florence2.checkpoint import plan_for
from librobot_vlm_ros.models.families.florence2.configuration import (
    FlorenceConfig,
    image_tokens,
    is_original,
)
from librobot_vlm_ros.models.families.florence2.processor import (
    PUBLISHED,
    FlorenceProcessor,
    FlorenceTokenizer,
    published_settings,
)
from librobot_vlm_ros.models.generation.causal_decoder import pad_rows
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.bart import FastBart, FastBartDecoder
from librobot_vlm_ros.models.generation.fast.davit import FastDavit, make_fast_davit
from librobot_vlm_ros.models.generation.sampler import columns
from librobot_vlm_ros.models.inputs.input_ids import IGNORED, token_rows
from librobot_vlm_ros.models.inputs.preprocess import (
    ImageSettings,
    image_settings,
    normalise,
    to_views,
)
from librobot_vlm_ros.models.placement import Placement
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.vlm import AbstractVLM, Loading, Parts, Prefixes


@register_vlm()
class FlorenceVLM(AbstractVLM):
    """Florence-2 of any size. `FlorenceVLM(config)` has random weights; see `create_vlm`."""

    config_class = FlorenceConfig
    default_name = "florence-2-base"
    processor: FlorenceProcessor
    #: For which `weights` the tower was made arithmetic of, and that; None where it could not be.
    _tower: tuple[Any, FastDavit | None] | None = None

    @classmethod
    def build(cls, config: FlorenceConfig, name: str, where: Placement) -> Parts:
        """See `AbstractVLM`."""
        module = build_random(plan_for(config.to_transformers()), where)
        images = ImageSettings(config.image_size, config.image_size)
        return Parts(module, FlorenceProcessor(name, module.config, images))

    @classmethod
    def read_folder(cls, folder: Path, name: str, loading: Loading) -> Parts:
        """See `AbstractVLM`; a folder in either layout.

        The cheap files are read first, so that a wrong folder is refused before its weights are.
        """
        config = read_config(folder)
        images = _image_settings(folder / "preprocessor_config.json")
        settings, stated = published_settings(name), folder / "generation_config.json"
        if is_original(config):
            # There the settings stand in text_config; its max_length is BART's and means nothing.
            text = {**section(config, "text_config"), "max_length": None}
            settings = PUBLISHED.overlaid(text, "config.json")
        settings = settings.overlaid(read_json(stated) if stated.is_file() else {})
        module = load_module(folder, **vars(loading))
        settings.check_vocabulary(module.config.text_config.vocab_size)
        tokenizer = FlorenceTokenizer.from_folder(folder, module.config)
        return Parts(module, FlorenceProcessor(name, module.config, images, tokenizer, settings))

    def _take(self, parts: Parts) -> None:
        super()._take(parts)
        self._tower = None
        # Its blocks go over to channels last and back: convolutions that have them so save 7 %.
        self.vision_encoder.to(memory_format=torch.channels_last)

    def free_caches(self) -> None:
        """See `AbstractVLM`."""
        self._tower = None
        super().free_caches()

    # Images.

    def image_features(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        """See `AbstractVLM`."""
        images = self.processor.images
        pixels = normalise(prepared, images, self.torch_device, self.torch_dtype)
        return [ImageFeatures(vectors, (len(vectors),)) for vectors in self.see(pixels)]

    def look(self, images: Any) -> list[ImageFeatures]:
        """See `AbstractVLM`; float images may have any size that the tower takes."""
        settings = self.processor.images
        views = to_views(images, settings, self.torch_device, self.torch_dtype)
        image_tokens(self.config.vision_config, *views.shape[-2:])
        features = self.see(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return [ImageFeatures(row.flatten(0, 1), (row.shape[1],) * len(row)) for row in features]

    def see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D]."""
        model = self.loaded().model
        if self._answers_now and (tower := self._davit()) is not None:
            found: Tensor = model.multi_modal_projector(tower(pixels))
            return found
        features: Tensor = model.get_image_features(pixels).pooler_output
        return features

    def _davit(self) -> FastDavit | None:
        """The tower as arithmetic, over the weights as they are now; None where it cannot be."""
        if self.generator.kind == "module" or self.torch_device.type != "cpu":
            return None
        if self._tower is None or self._tower[0] is not self.weights:
            self._tower = self.weights, make_fast_davit(self.vision_encoder)
        found = self._tower[1]
        return None if found is None or found.hooked else found

    # Tokens in, tokens out.

    def prompt_rows(
        self,
        words: Any,
        task: str | None,
        attention_mask: Tensor | None,
        features: Sequence[ImageFeatures] | None,
    ) -> list[list[int]]:
        """See `AbstractVLM`. With a `task`, ids stand in its sentence's place for input, or behind
        a sentence that has none.
        """
        if task is None:
            return self.processor.ids(words, attention_mask)
        if words is not None and not isinstance(words, str) and not isinstance(words[0], str):
            return self.processor.ids_in_sentence(get_task(task).name, words, attention_mask)
        count = len(words or ()) if features is None else len(features)
        return self.processor.task_ids(task, words, [1] * count)

    def start(
        self,
        features: Sequence[ImageFeatures] | None,
        prompts: Sequence[Sequence[int]],
        new_tokens: int = 0,
        prefixes: Prefixes | None = None,
    ) -> tuple[Decoder, Tensor]:
        """See `AbstractVLM`; the encoder reads everything, so no prefix is kept."""
        hidden, mask = self._encode(features, prompts)
        begin = self.config.text_config.decoder_start_token_id
        history = torch.full((len(prompts), 1), begin, dtype=torch.int64, device=self.torch_device)
        text = self.loaded().model.language_model.decoder
        pool = self.generator.steps(FastBart, text, self.module.lm_head)
        if pool is not None:
            return FastBartDecoder(pool, hidden, mask, begin), history
        return FlorenceDecoder(self.module, hidden, mask, begin), history

    def encode_text(self, text: Any) -> Tensor:
        """The encoder's view of words alone, [B, T, D]; shorter rows are padded at the end."""
        return self._encode(None, self.processor.ids(text, None))[0]

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
        module = self.loaded()
        rows = self.processor.ids(text if text is not None else input_ids, attention_mask)
        features = self.look(images) if images is not None else None
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
            result["loss"] = self.token_loss(logits, labels)
        return result

    def _encode(
        self, features: Sequence[ImageFeatures] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """Run the encoder over each row's image vectors followed by its words: hidden states
        [B, T, D] and the mask int64 [B, T], None when no row is padded.
        """
        if features is not None and len(features) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(features)} images for {len(rows)} prompts"
            )
        module = self.loaded()
        table = module.get_input_embeddings()
        vectors = []
        for number, row in enumerate(rows):
            image = None if features is None else features[number].vectors
            self.processor.refuse_too_long(0 if image is None else len(image), len(row), 0)
            if not row and image is None:
                raise RequestError(
                    ErrorCode.EMPTY_PROMPT, "there is a row with neither words nor an image"
                )
            words = table(torch.tensor(row, dtype=torch.int64, device=self.torch_device))
            vectors.append(words if image is None else torch.cat([image, words]))
        inputs, mask = pad_rows(vectors, "right")
        padded = mask if len({len(row) for row in vectors}) > 1 else None
        encoder = module.model.language_model.encoder
        states = encoder(inputs_embeds=inputs, attention_mask=padded).last_hidden_state
        return states, padded

    def _decoder_input(self, labels: Tensor | None, rows: int) -> Tensor:
        """The start token, and behind it the labels without their last one."""
        text = self.config.text_config
        start = torch.full((rows, 1), text.decoder_start_token_id, device=self.torch_device)
        if labels is None:
            return start
        token_rows(labels, None, int(text.vocab_size), (IGNORED,))
        shifted = labels[:, :-1].to(self.torch_device)
        shifted = shifted.masked_fill(shifted == IGNORED, text.pad_token_id)
        return torch.cat([start, shifted], dim=1)


class FlorenceDecoder:
    """A `Decoder` over encoder states `hidden` [B, T, D], `mask` [B, T] or None."""

    def __init__(self, module: Any, hidden: Tensor, mask: Tensor | None, start_token: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self._decoder = module.model.language_model.decoder
        self._head = module.lm_head
        self._hidden = hidden
        self._mask = mask
        self._start = start_token
        self._begun = False
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        #: Which prompt each row belongs to.
        self._prompt = torch.arange(hidden.shape[0], device=hidden.device)

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self.append(self._prompt.new_empty((len(self._prompt), 0)))

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        return self.append(tokens[:, None], allowed)

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`."""
        if not self._begun:
            start = torch.full_like(self._prompt, self._start)
            tokens, self._begun = torch.cat([start[:, None], tokens], dim=1), True
        output = self._decoder(
            input_ids=tokens,
            encoder_hidden_states=self._hidden,
            encoder_attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = self._head(output.last_hidden_state[:, -1])
        return columns(logits, allowed)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        self._cache.self_attention_cache.reorder_cache(rows)
        # Rows of one prompt see the same encoder states: there is nothing to move among them.
        if within or torch.equal(prompt := self._prompt[rows], self._prompt):
            return
        self._prompt = prompt
        self._cache.cross_attention_cache.reorder_cache(rows)
        self._hidden = self._hidden.index_select(0, rows)
        if self._mask is not None:
            self._mask = self._mask.index_select(0, rows)


def _image_settings(path: Path) -> ImageSettings:
    if not path.is_file():
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"{path.parent} holds no {path.name}",
            "copy it from the model's repository into the folder",
        )
    return image_settings(read_json(path))
