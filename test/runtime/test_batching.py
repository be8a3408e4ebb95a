"""What goes to the model together."""

from __future__ import annotations

import pytest

from librobot_vlm_ros.core import GenerationParams
from librobot_vlm_ros.runtime.batching import BatchPlanner, companions
from librobot_vlm_ros.runtime.pending_request import PendingRequest


def run(planner, seconds_of, rounds, clock, most=4, kind="caption"):
    """Batches of the size that the planner says; how many frames each had."""
    sizes = []
    for _ in range(rounds):
        frames = planner.frames(kind, most, clock.ns)
        planner.took(kind, frames, seconds_of(frames), clock.ns)
        clock.advance(0.05)
        sizes.append(frames)
    return sizes


def test_frames_go_alone_until_times_are_known(clock):
    assert run(BatchPlanner(), lambda frames: 0.05, 5, clock) == [1] * 5


def test_where_a_batch_costs_as_much_as_one_frame_batches_grow_to_the_limit(clock):
    sizes = run(BatchPlanner(), lambda frames: 0.05, 20, clock)
    assert sizes[-10:] == [4] * 10
    assert sizes == sorted(sizes)


def test_where_batching_pays_nothing_one_trial_is_made_and_then_seldom(clock):
    planner = BatchPlanner()
    sizes = run(planner, lambda frames: 0.05 * frames, 190, clock)
    assert sizes.count(2) == 1
    assert set(sizes) == {1, 2}
    clock.advance(10.0)
    assert 2 in run(planner, lambda frames: 0.05 * frames, 3, clock)
    clock.advance(10.0)  # the pause has doubled
    assert 2 not in run(planner, lambda frames: 0.05 * frames, 3, clock)


def test_growth_stops_where_it_no_longer_pays(clock):
    # Up to 2 frames come for the price of one, beyond that each costs as if alone.
    sizes = run(BatchPlanner(), lambda frames: 0.05 if frames < 3 else 0.05 * frames, 60, clock)
    assert sizes[-20:] == [2] * 20
    assert sizes.count(3) == 1


def test_when_batching_stops_paying_frames_go_alone_again(clock):
    planner = BatchPlanner()
    run(planner, lambda frames: 0.05, 20, clock)
    sizes = run(planner, lambda frames: 0.05 * frames, 20, clock)
    assert sizes[-10:] == [1] * 10


def test_a_batch_that_did_not_fit_in_memory_is_not_tried_again_soon(clock):
    planner = BatchPlanner()
    run(planner, lambda frames: 0.05, 20, clock)
    planner.ran_out_of_memory("caption", 4, clock.ns)
    assert max(run(planner, lambda frames: 0.05, 20, clock)) == 3


def test_kinds_of_work_are_measured_apart_and_not_remembered_without_bound(clock):
    planner = BatchPlanner()
    run(planner, lambda frames: 0.05, 20, clock)
    assert planner.frames("detect", 4, clock.ns) == 1
    for number in range(1000):
        planner.frames(f"kind {number}", 4, clock.ns)
    assert len(planner._kinds) <= 32


@pytest.fixture
def requests(ask):
    def make(*asked):
        return [PendingRequest(ask(**fields)) for fields in asked]

    return make


def test_all_requests_on_one_frame_go_together(requests, make_frame):
    frame = make_frame()
    waiting = requests(
        {"frame": frame},
        {"task": "detect"},
        {"frame": frame, "task": "answer", "prompt": "what?"},
    )
    assert companions(waiting, frames=1, most=8) == [waiting[0], waiting[2]]


def test_requests_of_one_kind_go_together_as_far_as_frames_may(requests):
    waiting = requests({}, {"task": "detect"}, {}, {})
    assert companions(waiting, frames=1, most=8) == [waiting[0]]
    assert companions(waiting, frames=2, most=8) == [waiting[0], waiting[2]]
    assert companions(waiting, frames=8, most=8) == [waiting[0], waiting[2], waiting[3]]


def test_requests_that_decode_differently_do_not_share_a_batch(requests):
    waiting = requests({}, {"params": GenerationParams(num_beams=3)})
    assert companions(waiting, frames=8, most=8) == [waiting[0]]


def test_no_batch_is_larger_than_allowed_and_the_oldest_is_always_in_it(requests, make_frame):
    frame = make_frame()
    waiting = requests(*[{"frame": frame} for _ in range(5)])
    assert companions(waiting, frames=1, most=3) == waiting[:3]
    assert companions([], frames=1, most=3) == []


def test_a_batch_that_is_slower_a_frame_than_a_smaller_one_is_not_kept(clock):
    # 4 frames are still much cheaper than alone, but dearer a frame than 3.
    times = {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.2}
    sizes = run(BatchPlanner(), times.__getitem__, 60, clock)
    assert sizes[-20:] == [3] * 20
    assert sizes.count(4) == 1
