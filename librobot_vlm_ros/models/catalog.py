"""The models that this package knows: one row a name, free of torch.

What all sizes of a family have in common stands once, above the rows. Parameter counts are those
of the published checkpoints, tied weights counted once and buffers not; tests build each
configuration on the meta device, or load the shipped weights, and compare.
"""

from __future__ import annotations

from functools import partial

from librobot_vlm_ros.models.backend import ModelInfo


def _tasks(names: str) -> tuple[str, ...]:
    return tuple(sorted(names.split()))


_FLORENCE_TASKS = _tasks(
    "caption detailed_caption more_detailed_caption dense_region_caption detect ground "
    "open_vocabulary_detect segment ocr ocr_with_region region_proposal region_caption "
    "region_category region_ocr region_segment embed"
)

_FLORENCE_2 = partial(
    ModelInfo,
    module="families.florence2.model",
    family="florence-2",
    licence="MIT",
    tasks=_FLORENCE_TASKS,
)

_INTERNVL2 = partial(
    ModelInfo,
    module="families.internvl2.model",
    family="internvl2",
    licence="MIT",
    tasks=_tasks(
        "answer caption detailed_caption detect ground open_vocabulary_detect ocr region_caption "
        "embed"
    ),
)

_LLAVA = partial(
    ModelInfo,
    module="families.llava.model",
    family="llava-1.5",
    licence="Llama 2 Community License",
    tasks=_tasks("answer caption detailed_caption ground region_caption embed"),
)

_PALIGEMMA = partial(
    ModelInfo,
    module="families.paligemma.model",
    family="paligemma",
    licence="Gemma Terms of Use",
    tasks=_tasks("answer caption detailed_caption ground open_vocabulary_detect segment ocr embed"),
)

_QWEN_VL = partial(
    ModelInfo,
    module="families.qwen_vl.model",
    licence="Apache-2.0",
    tasks=_tasks("answer caption detailed_caption detect ground open_vocabulary_detect ocr embed"),
)

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
    _FLORENCE_2(
        name="florence-2-tabletop",
        parameters=8_540_112,
        tasks=_tasks("caption detect ground embed"),
        shipped_folder="florence_2_tabletop",
        aliases=("tabletop",),
        embedding_dim=256,
        description="Florence-2 architecture, trained by this project on a rendered tabletop.",
    ),
    _FLORENCE_2(
        name="florence-2-base",
        parameters=231_414_016,
        default_pretrained="microsoft/Florence-2-base",
        pinned_revision="5ca5edf5bd017b9919c05d08aebef5e4c7ac3bac",
        aliases=("microsoft/florence-2-base", "florence-2"),
        embedding_dim=768,
        description="Microsoft Florence-2 base: captions, detection, grounding, masks, OCR.",
    ),
    _FLORENCE_2(
        name="florence-2-large",
        parameters=776_465_408,
        default_pretrained="microsoft/Florence-2-large",
        pinned_revision="21a599d414c4d928c9032694c424fb94458e3594",
        aliases=("microsoft/florence-2-large",),
        embedding_dim=1024,
        description="Microsoft Florence-2 large: as base, stronger and slower.",
    ),
    _INTERNVL2(
        name="internvl2-2b",
        parameters=2_205_754_368,
        default_pretrained="OpenGVLab/InternVL2-2B",
        pinned_revision="e4f6747bd20f139e637642c6a058c6bd00b36919",
        aliases=("opengvlab/internvl2-2b", "internvl2"),
        embedding_dim=2048,
        description="InternVL2 2B: questions, captions, boxes, OCR, images of any size in tiles.",
    ),
    _INTERNVL2(
        name="internvl2-8b",
        parameters=8_075_365_376,
        default_pretrained="OpenGVLab/InternVL2-8B",
        pinned_revision="6fb9ad6924f69424e57fab2ab061d707688f0296",
        aliases=("opengvlab/internvl2-8b",),
        embedding_dim=4096,
        description="InternVL2 8B: as 2b, stronger and slower.",
    ),
    _LLAVA(
        name="llava-v1.5-7b",
        parameters=7_063_427_072,
        default_pretrained="liuhaotian/llava-v1.5-7b",
        pinned_revision="4481d270cc22fd5c4d1bb5df129622006ccd9234",
        aliases=("liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        embedding_dim=4096,
        description="LLaVA-1.5 on Vicuna 7B: questions, captions, boxes of what is described.",
    ),
    _LLAVA(
        name="llava-v1.5-13b",
        parameters=13_351_494_656,
        default_pretrained="liuhaotian/llava-v1.5-13b",
        pinned_revision="d64eb781be6876a5facc160ab1899281f59ef684",
        aliases=("liuhaotian/llava-v1.5-13b", "llava-1.5-13b"),
        embedding_dim=5120,
        description="LLaVA-1.5 on Vicuna 13B: as 7b, stronger and slower.",
    ),
    _PALIGEMMA(
        name="paligemma-3b",
        parameters=2_923_466_480,
        default_pretrained="google/paligemma-3b-pt-224",
        pinned_revision="35e4f46485b4d07967e7e9935bc3786aad50687c",
        aliases=("google/paligemma-3b-pt-224", "paligemma"),
        embedding_dim=2048,
        description="Google PaliGemma 3B at 224 pixels: captions, boxes and masks of things, OCR.",
    ),
    _QWEN_VL(
        name="qwen2-vl-2b",
        family="qwen2-vl",
        parameters=2_208_985_600,
        default_pretrained="Qwen/Qwen2-VL-2B-Instruct",
        pinned_revision="895c3a49bc3fa70a340399125c650a463535e71c",
        aliases=("qwen/qwen2-vl-2b-instruct",),
        embedding_dim=1536,
        description="Qwen2-VL 2B: questions, captions, boxes, OCR, images of any size.",
    ),
    _QWEN_VL(
        name="qwen2-vl-7b",
        family="qwen2-vl",
        parameters=8_291_375_616,
        default_pretrained="Qwen/Qwen2-VL-7B-Instruct",
        pinned_revision="eed13092ef92e448dd6875b2a00151bd3f7db0ac",
        aliases=("qwen/qwen2-vl-7b-instruct",),
        embedding_dim=3584,
        description="Qwen2-VL 7B: as 2b, stronger and slower.",
    ),
    _QWEN_VL(
        name="qwen3-vl-4b",
        family="qwen3-vl",
        parameters=4_437_815_808,
        default_pretrained="Qwen/Qwen3-VL-4B-Instruct",
        pinned_revision="ebb281ec70b05090aa6165b016eac8ec08e71b17",
        aliases=("qwen/qwen3-vl-4b-instruct",),
        embedding_dim=2560,
        description="Qwen3-VL 4B: questions, captions, boxes, OCR, images of any size.",
    ),
    _QWEN_VL(
        name="qwen3-vl-8b",
        family="qwen3-vl",
        parameters=8_767_123_696,
        default_pretrained="Qwen/Qwen3-VL-8B-Instruct",
        pinned_revision="0c351dd01ed87e9c1b53cbc748cba10e6187ff3b",
        aliases=("qwen/qwen3-vl-8b-instruct", "qwen3-vl-7b"),
        embedding_dim=4096,
        description="Qwen3-VL 8B: as 4b, stronger and slower. qwen3-vl-7b is an alias of this 8B.",
    ),
)
