"""Pixels for the model, against the published image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from librobot_vlm_ros.core import ErrorCode, Frame, ImageError
from librobot_vlm_ros.models.inputs.preprocess import (
    ImageSettings,
    as_pixels,
    image_settings,
    squash,
    to_views,
)

SETTINGS = ImageSettings(96, 96)
CPU = torch.device("cpu")


def noise(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def views(images: object, settings: ImageSettings = SETTINGS) -> torch.Tensor:
    return to_views(images, settings, CPU, torch.float32)


@pytest.mark.parametrize(
    "size", [(480, 640), (240, 320), (97, 53), (96, 96), (1, 1), (3, 500), (721, 1279)]
)
def test_pixels_equal_those_of_the_published_processor(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    reference = CLIPImageProcessorPil(
        size={"height": 96, "width": 96},
        do_center_crop=False,
        image_mean=list(SETTINGS.mean),
        image_std=list(SETTINGS.std),
    )
    expected = reference(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(views(pixels)[0], expected, atol=2e-6, rtol=0)


def test_a_frame_that_is_a_strided_view_is_read_right() -> None:
    wide = noise(20, 40)
    part = wide[::2, 3:33]
    assert np.array_equal(squash(part, SETTINGS), squash(part.copy(), SETTINGS))


def test_every_kind_of_image_gives_the_same_pixels() -> None:
    pixels = noise(20, 30)
    expected = views(pixels)
    assert expected.shape == (1, 1, 3, 96, 96)
    for image in (
        Frame(pixels, "c", 0),
        Image.fromarray(pixels),
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        [pixels],
        [[pixels]],
        pixels[None],
        pixels[None, None],
        torch.from_numpy(pixels)[None],
    ):
        assert torch.equal(views(image), expected)


def test_frames_of_different_sizes_make_one_batch() -> None:
    assert views([noise(20, 30), noise(50, 10)]).shape == (2, 1, 3, 96, 96)


def test_views_of_a_robot_stay_apart() -> None:
    batch = [[noise(20, 30), noise(21, 30)], [noise(22, 30), noise(23, 30)]]
    found = views(batch)
    assert found.shape == (2, 2, 3, 96, 96)
    assert torch.equal(found[1, 0], views(batch[1][0])[0, 0])


def test_float_tensors_count_as_normalised_and_keep_their_size() -> None:
    images = torch.randn(2, 3, 32, 64)
    assert torch.equal(views(images)[:, 0], images)
    assert torch.equal(views(list(images))[:, 0], images)
    assert views(images[0]).shape == (1, 1, 3, 32, 64)
    assert views(torch.randn(2, 4, 3, 32, 32)).shape == (2, 4, 3, 32, 32)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        "picture.png",
        None,
        torch.zeros(2, 4, 8, 8),
        [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)],
        [torch.zeros(3, 8, 8), noise(8, 8)],
        [],
        [[], []],
        [[noise(4, 4)], [noise(4, 4), noise(4, 4)]],
    ],
)
def test_what_is_no_image_is_refused(image: object) -> None:
    with pytest.raises(ImageError) as caught:
        views(image)
    assert caught.value.code == ErrorCode.BAD_IMAGE


def test_settings_survive_the_way_through_json() -> None:
    assert image_settings(SETTINGS.to_json()) == SETTINGS
    assert as_pixels(noise(3, 4)).shape == (3, 4, 3)
