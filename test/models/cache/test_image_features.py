"""What is known of a frame is shared by all that ask about it, and may be made ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from librobot_vlm_ros.core import Frame, ModelAnswer
from librobot_vlm_ros.models import local_backend
from librobot_vlm_ros.models.cache.image_features import FrameCache


def test_pixels_are_made_once_though_two_threads_want_them(frame):
    entry, made, go = FrameCache().lookup(frame), [], threading.Event()

    def slowly(pixels):
        made.append(threading.current_thread().name)
        assert go.wait(10)
        return pixels[:2]

    ahead = threading.Thread(target=entry.prepare, args=(slowly,), name="ahead")
    ahead.start()
    while not made:
        go.wait(0.001)
    threading.Timer(0.05, go.set).start()
    assert entry.ready(slowly).shape[0] == 2
    ahead.join(10)
    assert made == ["ahead"]


def test_what_failed_ahead_is_tried_again_and_tells_the_request(frame):
    entry = FrameCache().lookup(frame)

    def broken(pixels):
        raise ValueError("too narrow")

    for make in (entry.prepare, entry.ready):
        with pytest.raises(ValueError, match="too narrow"):
            make(broken)
    assert entry.ready(lambda pixels: 5) == 5


def test_the_frames_used_last_are_kept(make_frame):
    cache = FrameCache(capacity=2)
    first, second, third = (make_frame(seed) for seed in range(3))
    entry = cache.lookup(first)
    cache.lookup(second)
    assert cache.lookup(first) is entry
    cache.lookup(third)
    assert cache.lookup(first) is entry
    assert len(cache) == 2


def test_features_of_a_dtype_that_was_given_up_are_no_hit(frame):
    cache = FrameCache()
    for dtype in (torch.float16, torch.float16, torch.float32, torch.float32):
        cache.entry(frame, dtype)
    assert (cache.hits, cache.misses) == (2, 2)


def test_tasks_and_queries_on_a_frame_see_it_once(vlm, ask, monkeypatch):
    looked = []
    see = vlm.see
    monkeypatch.setattr(vlm, "see", lambda pixels: looked.append(len(pixels)) or see(pixels))
    batch = [ask("caption", name="a"), ask("detect", name="b"), ask("embed", name="c")]
    assert all(isinstance(answer, ModelAnswer) for answer in vlm.run(batch))
    assert all(isinstance(vlm.run([ask(task)])[0], ModelAnswer) for task in ("ocr", "caption"))
    assert looked == [1]
    assert dict(vlm.backend.frame_counts()) == {"hits": 4, "misses": 1, "ahead": 0}


def test_a_frame_prepared_ahead_gives_the_same_answer(vlm, ask, make_frame):
    (plain,) = vlm.run([ask("detect", on=make_frame(3))])
    frame = make_frame(3)
    threads = [threading.Thread(target=vlm.backend.prepare_frame, args=(frame,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    (ahead,) = vlm.run([ask("detect", on=frame)])
    assert (ahead.text, ahead.regions) == (plain.text, plain.regions)
    assert vlm.backend.frame_counts()["ahead"] == 1
    vlm.backend.prepare_frame(frame)  # its features are there: nothing to do
    assert vlm.backend.frames.lookup(frame).pixels is None


def test_a_closed_model_prepares_nothing(vlm, frame):
    vlm.backend.close()
    with pytest.raises(Exception, match="closed"):
        vlm.backend.prepare_frame(frame)
    assert len(vlm.backend.frames) == 0


def test_frames_are_told_apart_though_their_numbers_are_equal():
    cache, pixels = FrameCache(), np.zeros((2, 2, 3), np.uint8)
    one, other = (Frame(pixels, "c", 1, sequence=1) for _ in range(2))
    assert cache.lookup(one) is not cache.lookup(other)


def test_frames_are_prepared_ahead_where_a_core_is_left_for_it(vlm, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(local_backend, "usable_cores", lambda: threads)
    assert not vlm.backend.prepares_ahead
    monkeypatch.setattr(local_backend, "usable_cores", lambda: threads + 1)
    assert vlm.backend.prepares_ahead
    monkeypatch.setattr(local_backend, "usable_cores", lambda: threads)
    monkeypatch.setattr(type(vlm), "torch_device", torch.device("cuda", 0))
    assert vlm.backend.prepares_ahead


def test_input_size_is_that_of_the_prepared_pixels(vlm, frame):
    vlm.backend.prepare_frame(frame)
    height, width = vlm.backend.frames.lookup(frame).pixels.shape[:2]
    assert vlm.backend.input_size(frame.width, frame.height) == (width, height)
