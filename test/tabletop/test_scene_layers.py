"""Composing scenes from layers, jittering them, turning them into targets: no renderer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from librobot_vlm_ros.tabletop.labels import KINDS
from librobot_vlm_ros.tabletop.layers import Layer, compose, load_view, save_view
from librobot_vlm_ros.tabletop.network import CELLS, IMAGE_SIZE
from librobot_vlm_ros.tabletop.samples import jitter, kind_and_colour
from librobot_vlm_ros.tabletop.scenes import visible_objects
from librobot_vlm_ros.tabletop.train_text import (
    cells_to_keep,
    location_basis,
    random_layout,
    truth_features,
)
from librobot_vlm_ros.tabletop.train_tower import KIND, owner_targets


def layer(label: str, left: int, depth: float, x: float, colour: int) -> Layer:
    """A 40x40 square at (50, left) at a depth, on the table at (x, 0)."""
    side = (40, 40)
    return Layer(
        label, 50, left, np.full((*side, 3), colour, np.uint8), np.ones(side, bool),
        np.full(side, depth, np.float32), np.ones(side, np.float16), x, 0.0, 0.05,
    )  # fmt: skip


PLATE = np.full((240, 320, 3), 90, np.uint8)


def test_the_nearer_object_hides_the_farther_and_its_box_is_what_is_seen() -> None:
    near, far = layer("red cube", 60, 0.5, 0.0, 200), layer("duck", 90, 0.7, 0.2, 40)
    rng = np.random.default_rng(0)
    scenes = [compose(PLATE, [near, far], rng) for _ in range(20)]
    both = next(s for s in scenes if s is not None and len(s.objects) == 2)
    boxes = {item.label: item.box for item in both.objects}
    assert boxes == {"red cube": (60, 50, 100, 90), "duck": (100, 50, 130, 90)}
    assert both.rgb[70, 95, 0] == 200
    assert both.rgb[70, 120, 0] == 40
    assert both.rgb[0, 0, 0] == 90


def test_objects_that_would_stand_in_each_other_are_never_in_one_scene() -> None:
    layers = [layer("red cube", 60, 0.5, 0.0, 200), layer("duck", 120, 0.7, 0.05, 40)]
    rng = np.random.default_rng(0)
    scenes = [compose(PLATE, layers, rng) for _ in range(30)]
    assert all(scene is not None and len(scene.objects) == 1 for scene in scenes)


def test_a_scene_with_an_object_mostly_hidden_is_drawn_anew() -> None:
    mask = np.zeros((240, 320), bool)
    mask[10:40, 10:40] = True
    assert visible_objects(["duck"], [mask], [900]) is not None
    assert visible_objects(["duck"], [mask], [1600]) is None


def test_a_view_is_written_and_read_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "view_00001.npz"
    save_view(path, PLATE, [layer("duck", 90, 0.7, 0.2, 40)])
    plate, (back,) = load_view(path)
    assert (plate == PLATE).all()
    assert (back.label, back.top, back.left, back.x) == ("duck", 50, 90, 0.2)
    assert back.mask.all()


def test_jitter_keeps_boxes_on_their_objects() -> None:
    rgb = np.zeros((240, 320, 3), np.uint8)
    rgb[60:120, 100:160] = 255
    mask = rgb[..., 0] > 0
    rng = np.random.default_rng(3)
    for _ in range(20):
        sample = jitter(rgb, ["duck"], np.array([[100, 60, 160, 120.0]]), [mask], rng)
        bright = np.nonzero(sample.pixels.mean(-1) > 110)
        seen = [bright[1].min(), bright[0].min(), bright[1].max() + 1, bright[0].max() + 1]
        assert np.abs(sample.boxes[0] * IMAGE_SIZE - seen).max() < 2.5


def test_every_object_owns_a_cell_and_its_target_is_its_own_box() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        layout = random_layout(rng)
        kind, colour, ltrb = owner_targets(layout, layout.owner)
        for number in np.unique(layout.owner[layout.owner >= 0]):
            row, column = (int(i[0]) for i in np.nonzero(layout.owner == number))
            assert (kind[row, column], colour[row, column]) == (
                kind_and_colour(layout.labels[number])[0],
                kind_and_colour(layout.labels[number])[1] if " " in layout.labels[number] and
                kind_and_colour(layout.labels[number])[1] >= 0 else -100,
            )  # fmt: skip
            centre = (np.array([column, row]) + 0.5) / CELLS
            left_top = centre - ltrb[row, column, :2] / CELLS
            assert np.allclose(left_top, layout.boxes[number, :2], atol=1e-5)


def test_truth_features_say_the_kind_of_each_cell() -> None:
    rng = np.random.default_rng(5)
    layouts = [random_layout(rng) for _ in range(8)]
    said = truth_features(layouts, 224, rng)[:, KIND].argmax(1).numpy()
    for layout, kinds in zip(layouts, said, strict=True):
        kind, _, _ = owner_targets(layout, layout.owner)
        assert (kinds == kind).mean() > 0.9


def test_cells_with_objects_are_always_kept() -> None:
    rng = np.random.default_rng(6)
    owners = [random_layout(rng).owner for _ in range(20)]
    keep = cells_to_keep(owners, rng, 60).numpy()
    for owner, kept in zip(owners, keep, strict=True):
        on = np.flatnonzero(owner.ravel() >= 0)
        assert len(on) > 60 or set(on) <= set(kept)
        assert (np.diff(kept) > 0).all()


def test_neighbouring_bins_have_neighbouring_codes() -> None:
    basis = location_basis()
    step = (basis[1:] - basis[:-1]).norm(dim=1)
    assert step.max() < 0.1 * basis.norm(dim=1).mean()
    assert len(KINDS) + 1 == KIND.stop
