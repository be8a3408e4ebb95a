"""A camera's mailbox: newest wins, drops are counted, history is short."""

from __future__ import annotations

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.runtime import DropReason, mailbox
from librobot_vlm_ros.runtime.mailbox import Mailbox


@pytest.fixture
def box():
    return Mailbox("front", history_frames=3)


def use_best(box):
    """Give the model what the mailbox would give it, preparing it taking no time."""
    frame = box.best(0, prepare_ns=0)
    box.use(frame)
    return frame


def test_newest_frame_wins_and_the_older_is_counted_as_replaced(box, make_frame):
    first, second = make_frame(), make_frame()
    box.offer(first, wanted=True)
    box.offer(second, wanted=True)
    assert use_best(box) is second
    assert box.dropped == {DropReason.REPLACED: 1}
    assert (box.received, box.processed) == (2, 1)


def test_a_frame_that_no_task_wanted_is_counted_as_not_due(box, make_frame):
    box.offer(make_frame(), wanted=False)
    box.offer(make_frame(), wanted=False)
    assert box.dropped == {DropReason.NOT_DUE: 1}


def test_a_frame_that_was_processed_is_not_counted_as_dropped_when_the_next_comes(box, make_frame):
    box.offer(make_frame(), wanted=True)
    use_best(box)
    use_best(box)
    box.offer(make_frame(), wanted=True)
    assert not box.dropped
    assert box.processed == 1


def test_a_frame_too_old_is_dropped_once(box, make_frame, clock):
    box.offer(make_frame(), wanted=True)
    clock.advance(1.0)
    assert not box.expire(clock.ns, 1.0)
    clock.advance(0.001)
    assert box.expire(clock.ns, 1.0)
    assert box.expire(clock.ns, 1.0)
    assert box.dropped == {DropReason.TOO_OLD: 1}


def test_without_a_limit_no_frame_is_too_old(box, make_frame, clock):
    box.offer(make_frame(), wanted=True)
    clock.advance(10_000.0)
    assert not box.expire(clock.ns, 0.0)
    assert box.latest(clock.ns, 0.0) is box.newest


@pytest.mark.parametrize("stamp_jump_ns", [-10_000_000_000, 3_600_000_000_000])
def test_a_jump_of_the_stamps_makes_no_frame_old(box, make_frame, clock, stamp_jump_ns):
    box.offer(make_frame(), wanted=True)
    use_best(box)
    jumped = make_frame(stamp_ns=50_000_000_000 + stamp_jump_ns)
    box.offer(jumped, wanted=True)
    assert not box.expire(clock.ns, 0.5)
    assert use_best(box) is jumped
    assert box.latest(clock.ns, 0.5).age_s(clock.ns) == 0.0


def test_latest_says_that_no_frame_came(box, clock):
    with pytest.raises(RequestError, match="has arrived yet") as caught:
        box.latest(clock.ns, 1.0)
    assert caught.value.code == ErrorCode.NO_FRAME


def test_latest_refuses_a_frame_beyond_the_limit_and_says_both_ages(box, make_frame, clock):
    box.offer(make_frame(), wanted=True)
    clock.advance(2.5)
    with pytest.raises(RequestError, match=r"2\.50 s old, the limit is 1\.00 s") as caught:
        box.latest(clock.ns, 1.0)
    assert caught.value.code == ErrorCode.FRAME_TOO_OLD


def test_history_gives_the_frame_of_a_stamp(box, make_frame):
    frames = [make_frame() for _ in range(3)]
    for frame in frames:
        box.offer(frame, wanted=True)
    assert box.at(200_000_000) is frames[1]


def test_history_says_what_it_holds_when_a_stamp_is_missing(box, make_frame):
    box.offer(make_frame(), wanted=True)
    with pytest.raises(RequestError, match=r"1 frames stamped 100000000 to 100000000") as caught:
        box.at(900_000_000)
    assert caught.value.code == ErrorCode.NO_FRAME


def test_history_keeps_only_so_many_frames(box, make_frame):
    for _ in range(5):
        box.offer(make_frame(), wanted=True)
    with pytest.raises(RequestError, match="3 frames stamped 300000000 to 500000000"):
        box.at(100_000_000)


def test_history_keeps_only_so_many_bytes(make_frame, monkeypatch):
    one = make_frame()
    monkeypatch.setattr(mailbox, "HISTORY_BYTES", 2 * one.pixels.nbytes)
    box = Mailbox("front", history_frames=100)
    for frame in (one, make_frame(), make_frame()):
        box.offer(frame, wanted=True)
    with pytest.raises(RequestError, match="2 frames"):
        box.at(one.stamp_ns)


def test_where_nothing_came_the_history_says_that_it_holds_nothing(box):
    with pytest.raises(RequestError, match="no frame is held"):
        box.at(100_000_000)


MS = 1_000_000


@pytest.fixture
def prepared(make_frame):
    """A mailbox whose first frame, received at 0 ms, is being prepared since 0 ms; and the two."""

    def make(newer_ms):
        box = Mailbox("front", history_frames=8)
        first = make_frame(received_ns=1)
        box.offer(first, wanted=True)
        box.prefetching(first, 1)
        newer = make_frame(received_ns=newer_ms * MS)
        box.offer(newer, wanted=True)
        return box, first, newer

    return make


def test_a_ready_frame_goes_before_a_newer_one_that_would_keep_the_model_waiting(prepared):
    box, first, _newer = prepared(newer_ms=30)
    assert box.best(35 * MS, prepare_ns=30 * MS) is first


def test_the_newest_frame_goes_first_when_preparing_it_takes_next_to_no_time(prepared):
    box, _first, newer = prepared(newer_ms=30)
    assert box.best(35 * MS, prepare_ns=2 * MS) is newer


def test_a_frame_that_was_hardly_begun_gives_way_to_a_newer_one(prepared):
    box, first, newer = prepared(newer_ms=30)
    assert box.best(31 * MS, prepare_ns=500 * MS) is first
    assert box.best(5 * MS, prepare_ns=500 * MS) is newer


def test_a_ready_frame_counts_as_processed_and_no_more_as_replaced(prepared):
    box, first, newer = prepared(newer_ms=30)
    assert box.dropped[DropReason.REPLACED] == 1
    box.use(first)
    assert (box.received, box.processed, box.dropped[DropReason.REPLACED]) == (2, 1, 0)
    assert use_best(box) is newer
    assert (box.processed, sum(box.dropped.values())) == (2, 0)


def test_no_frame_is_chosen_that_came_before_one_that_was_taken(prepared):
    box, _first, newer = prepared(newer_ms=30)
    box.use(newer)
    assert box.best(40 * MS, prepare_ns=100 * MS) is newer
    assert box.dropped[DropReason.REPLACED] == 1


def test_a_pause_forgets_what_was_begun(prepared):
    box, _first, newer = prepared(newer_ms=30)
    box.discard(DropReason.NOT_ACTIVE)
    assert box.best(40 * MS, prepare_ns=100 * MS) is newer
