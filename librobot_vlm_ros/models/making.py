"""How a model of any family comes to be: with random weights, or with those of a folder."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.abstract import AbstractVLM
from librobot_vlm_ros.models.checkpoints.checksum import check_sha256
from librobot_vlm_ros.models.checkpoints.hub import find_weights
from librobot_vlm_ros.models.checkpoints.size_limits import refuse_endless
from librobot_vlm_ros.models.placement import Placement, resolve_placement
from librobot_vlm_ros.models.registry import model_info
from librobot_vlm_ros.models.training.quantization import quantization_for

__all__ = ["Loading", "Making"]


@dataclasses.dataclass(frozen=True)
class Loading:
    """What `checkpoint.load_module` is to be told beside the folder; the fields have its names."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    should_cancel: Callable[[], bool] = lambda: False


class Making(AbstractVLM):
    """The part of `AbstractVLM` that makes a model, on the methods that a family fills in.

    Such a class called by itself, `Family(config)`, has random weights; see `create_vlm`.
    """

    #: The family's own `ModelConfig`: variant, vision_config, text_config and `to_transformers()`.
    config_class: ClassVar[type[Any]]
    #: The registered name of a model that is built by its class.
    default_name: ClassVar[str]

    def __init__(
        self,
        config: Any = None,
        *,
        name: str = "",
        parts: Any = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        freeze_vision: bool = False,
        freeze_language: bool = False,
        adapter: str | Path | None = None,
        **options: Any,
    ) -> None:
        name = name or self.default_name
        config = self._checked_config(config, name)
        if parts is None:
            quantization_for(config, quantization)  # refused before the work, not after it
            asked = {"vision": config.vision_config or {}, "text": config.text_config or {}}
            refuse_endless(asked, f"the config of {name}")
            parts = self._random_parts(config, name, resolve_placement(device, dtype, attention))
        super().__init__(parts.module, name=name, **options)
        self._take(parts)
        self._finish(
            config,
            quantization=quantization,
            freeze_vision=freeze_vision,
            freeze_language=freeze_language,
            adapter=adapter,
        )

    # What a family fills in. Its parts are a dataclass that has at least a `module`.

    @classmethod
    @abstractmethod
    def _random_parts(cls, config: Any, name: str, where: Placement) -> Any:
        """Parts with random weights."""

    @classmethod
    @abstractmethod
    def _read_folder(cls, folder: Path, name: str, loading: Loading) -> Any:
        """The parts of a checkpoint folder, the tokenizer among them."""

    @abstractmethod
    def _take(self, parts: Any) -> None:
        """Have these parts from here on."""

    @classmethod
    def _checked_config(cls, config: Any, name: str) -> Any:
        """The family's config from what was given. Raises ModelError BAD_CONFIG."""
        if isinstance(config, cls.config_class):
            return config
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        given = dict(config or {})
        if strange := sorted(set(given) - known):
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"a {cls.config_class.__name__} has no {', '.join(map(repr, strange))}",
                f"fields: {', '.join(sorted(known))}",
            )
        given.setdefault("variant", name)
        return cls.config_class(**given)

    # What follows from it.

    @classmethod
    def create(
        cls,
        name: str,
        *,
        config: Any = None,
        pretrained: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        should_cancel: Callable[[], bool] | None = None,
        revision: str | None = None,
        weights_sha256: Sequence[str] = (),
        **options: Any,
    ) -> Making:
        """See `registry.create_vlm`. `revision`: hub commit or branch."""
        checked = cls._checked_config(config, name)
        quantization_for(checked, quantization)
        options |= {"name": name, "quantization": quantization}
        if config is not None and pretrained is None:
            return cls(checked, device=device, dtype=dtype, attention=attention, **options)
        if checked.vision_config or checked.text_config:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                "config changes the architecture, but the weights decide it",
                "leave out vision_config and text_config, or leave out pretrained",
            )
        weights = find_weights(model_info(name), pretrained, revision)
        check_sha256(weights.folder, weights_sha256, should_cancel)
        loading = Loading(device, dtype, attention, should_cancel or (lambda: False))
        parts = cls._read_folder(weights.folder, name, loading)
        return cls(checked, parts=parts, revision=weights.revision, **options)

    def load_pretrained(self, source: str, **options: Any) -> None:
        """Replace weights, configuration and tokenizer; device and dtype stay.

        An adapter goes with the weights that it was made for, and the new ones are not quantised.
        `options`: `revision`, `attention` and `should_cancel`, as `create_vlm` has them.
        """
        weights = find_weights(model_info(self.name), source, options.pop("revision", None))
        loading = Loading(device=self.device, dtype=self.dtype, **options)
        parts = self._read_folder(weights.folder, self.name, loading)
        self.revision = weights.revision
        self.frames.clear()
        self._take(parts)
        self.module.train(self.training)
