"""Images brought to the model's size: exactly, or nearly so and faster."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.inputs.preprocess import (
    EXACT,
    ImageSettings,
    Resizing,
    normalise,
    on_device,
    resize,
    resizing,
    squash,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FAST = Resizing(fast=True)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR

#: Height and width before and after: smaller, larger, one way each, hardly changed, a line.
SIZES = [
    ((480, 640), (192, 192)),
    ((48, 64), (96, 96)),
    ((97, 53), (96, 96)),
    ((53, 97), (96, 96)),
    ((480, 640), (448, 644)),
    ((96, 128), (96, 64)),
    ((3, 500), (96, 96)),
    ((1, 1), (8, 8)),
]


def noise(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as a frame's
    return pixels


def difference(one: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """Largest difference in levels, and the part of values that differ."""
    return int(np.abs(one.astype(int) - other).max()), float((one != other).mean())


@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_fast_on_a_cpu_differs_by_two_levels_at_most_and_seldom(before, after, resample):
    pixels = noise(*before)
    found = resize(pixels, *after, resample, FAST)
    assert (found.shape, found.dtype) == ((*after, 3), np.uint8)
    most, part = difference(found, resize(pixels, *after, resample))
    assert most <= 2
    assert part < 0.05


@pytest.mark.parametrize(("resample", "mode"), [(BICUBIC, "bicubic"), (BILINEAR, "bilinear")])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_the_arithmetic_of_the_device_differs_by_two_levels_at_most(before, after, resample, mode):
    pixels = noise(*before)
    found = on_device(torch.from_numpy(pixels.copy()), *after, mode)
    assert found.dtype == torch.uint8
    most, part = difference(found.numpy(), resize(pixels, *after, resample))
    assert most <= 2
    assert part < 0.07


def test_exact_is_pillow_bit_for_bit():
    pixels = noise(97, 130)
    expected = Image.fromarray(pixels).resize((96, 64), BICUBIC)
    assert np.array_equal(resize(pixels, 64, 96), np.asarray(expected))


def test_a_strided_view_of_a_message_is_read_right_and_not_written_to():
    wide = noise(40, 80)
    part, copy = wide[::2, 3:63, ::-1], wide.copy()
    for how in (EXACT, FAST):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = resize(part, 30, 30, BICUBIC, how)
        assert np.array_equal(found, resize(part.copy(), 30, 30, BICUBIC, how))
    assert np.array_equal(wide, copy)


def test_auto_is_exact_on_a_cpu_and_on_the_device_with_cuda():
    assert resizing("auto", CPU) == EXACT
    assert resizing("exact", CUDA) == EXACT
    assert resizing("auto", CUDA) == Resizing(fast=True, device=CUDA)
    assert resizing("fast", CPU) == Resizing(fast=True, device=CPU)


def test_a_filter_that_only_pillow_has_is_never_replaced():
    assert resizing("auto", CUDA, Image.Resampling.LANCZOS) == EXACT
    with pytest.raises(RequestError, match="lanczos") as caught:
        resizing("fast", CPU, Image.Resampling.LANCZOS)
    assert caught.value.code == ErrorCode.BAD_PARAMETER


def test_an_unknown_way_to_resize_is_refused_when_the_model_is_made(tiny_folder):
    with pytest.raises(RequestError, match="'quick'"):
        create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu", resize="quick")


@pytest.mark.parametrize("how", [EXACT, FAST])
def test_normalising_in_place_equals_the_arithmetic_in_one_line(how):
    settings = ImageSettings(40, 50)
    squashed = [squash(noise(60, 70 + n), settings, how) for n in range(2)]
    found = normalise(squashed, settings, CPU, torch.float32)
    stacked = torch.from_numpy(np.stack(squashed)).to(torch.float32)
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    expected = ((stacked * (1 / 255) - mean) / std).permute(0, 3, 1, 2)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    half = normalise(squashed, settings, CPU, torch.bfloat16)
    assert torch.equal(half, expected.to(torch.bfloat16))


def test_a_model_resizes_as_it_was_told(tiny_folder, frame):
    found = {}
    for how in ("exact", "fast"):
        vlm = create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu", resize=how)
        vlm.backend.prepare_frame(frame)
        found[how] = vlm.backend.frames.lookup(frame).pixels
    assert np.array_equal(found["exact"], squash(frame.pixels, vlm.images))
    assert np.array_equal(found["fast"], squash(frame.pixels, vlm.images, FAST))
    assert 0 < difference(found["fast"], found["exact"])[1] < 0.05
