"""The models that this package knows: one row a name, free of torch.

Parameter counts are those of the published checkpoints, tied weights counted once and buffers
not; tests build each configuration on the meta device, or load the shipped weights, and compare.
"""

from __future__ import annotations

from librobot_vlm_ros.models.base import ModelInfo

__all__ = ["CATALOG"]

_FLORENCE_TASKS = (
    "caption",
    "dense_region_caption",
    "detailed_caption",
    "detect",
    "embed",
    "ground",
    "more_detailed_caption",
    "ocr",
    "ocr_with_region",
    "open_vocabulary_detect",
    "region_caption",
    "region_category",
    "region_ocr",
    "region_proposal",
    "region_segment",
    "segment",
)

_LLAVA_TASKS = ("answer", "caption", "detailed_caption", "embed", "ground", "region_caption")

CATALOG: tuple[ModelInfo, ...] = (
    ModelInfo(
        name="fake",
        module="fake",
        family="fake",
        parameters=0,
        tasks=tuple(sorted((*_FLORENCE_TASKS, "answer"))),
        licence="MIT",
        embedding_dim=16,
        description="Deterministic stand-in for tests: answers follow from pixels and prompt.",
        requires=(),
    ),
    ModelInfo(
        name="florence-2-tabletop",
        module="florence",
        family="florence-2",
        parameters=8_540_112,
        tasks=("caption", "detect", "embed", "ground"),
        licence="MIT",
        shipped_folder="florence_2_tabletop",
        aliases=("tabletop",),
        embedding_dim=256,
        description="Florence-2 architecture, trained by this project on a rendered tabletop.",
    ),
    ModelInfo(
        name="florence-2-base",
        module="florence",
        family="florence-2",
        parameters=231_414_016,
        tasks=_FLORENCE_TASKS,
        licence="MIT",
        default_pretrained="microsoft/Florence-2-base",
        pinned_revision="5ca5edf5bd017b9919c05d08aebef5e4c7ac3bac",
        aliases=("microsoft/florence-2-base", "florence-2"),
        embedding_dim=768,
        description="Microsoft Florence-2 base: captions, detection, grounding, masks, OCR.",
    ),
    ModelInfo(
        name="florence-2-large",
        module="florence",
        family="florence-2",
        parameters=776_465_408,
        tasks=_FLORENCE_TASKS,
        licence="MIT",
        default_pretrained="microsoft/Florence-2-large",
        pinned_revision="21a599d414c4d928c9032694c424fb94458e3594",
        aliases=("microsoft/florence-2-large",),
        embedding_dim=1024,
        description="Microsoft Florence-2 large: as base, stronger and slower.",
    ),
    ModelInfo(
        name="llava-v1.5-7b",
        module="llava",
        family="llava-1.5",
        parameters=7_063_427_072,
        tasks=_LLAVA_TASKS,
        licence="Llama 2 Community License",
        default_pretrained="liuhaotian/llava-v1.5-7b",
        pinned_revision="4481d270cc22fd5c4d1bb5df129622006ccd9234",
        aliases=("liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        embedding_dim=4096,
        description="LLaVA-1.5 on Vicuna 7B: questions, captions, boxes of what is described.",
    ),
    ModelInfo(
        name="llava-v1.5-13b",
        module="llava",
        family="llava-1.5",
        parameters=13_351_494_656,
        tasks=_LLAVA_TASKS,
        licence="Llama 2 Community License",
        default_pretrained="liuhaotian/llava-v1.5-13b",
        pinned_revision="d64eb781be6876a5facc160ab1899281f59ef684",
        aliases=("liuhaotian/llava-v1.5-13b", "llava-1.5-13b"),
        embedding_dim=5120,
        description="LLaVA-1.5 on Vicuna 13B: as 7b, stronger and slower.",
    ),
    ModelInfo(
        name="paligemma-3b",
        module="paligemma",
        family="paligemma",
        parameters=2_923_466_480,
        tasks=(
            "answer",
            "caption",
            "detailed_caption",
            "embed",
            "ground",
            "ocr",
            "open_vocabulary_detect",
        ),
        licence="Gemma Terms of Use",
        default_pretrained="google/paligemma-3b-pt-224",
        pinned_revision="35e4f46485b4d07967e7e9935bc3786aad50687c",
        aliases=("google/paligemma-3b-pt-224", "paligemma"),
        embedding_dim=2048,
        description="Google PaliGemma 3B at 224 pixels: captions, boxes of named things, OCR.",
    ),
)
