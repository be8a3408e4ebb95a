"""What collections leave out, and that a model is freed all the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from librobot_vlm_ros.runtime import collect, settle


class Thing:
    """Sits in a reference cycle with itself."""

    def __init__(self) -> None:
        self.myself: Any = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_there_is_left_out_of_collections_until_one_asks_for_all() -> None:
    loaded = Thing()
    there = weakref.ref(loaded)
    settle()
    assert gc.get_freeze_count() > 1000
    del loaded
    gc.collect()
    assert there() is not None
    collect()
    assert there() is None
    assert gc.get_freeze_count() > 1000  # the rest is left out again


def test_what_came_since_is_collected_as_ever() -> None:
    settle()
    since = weakref.ref(Thing())
    assert since() is not None
    gc.collect()
    assert since() is None


def test_a_process_that_has_not_asked_for_it_is_left_as_it_is() -> None:
    gc.unfreeze()
    collect()
    assert gc.get_freeze_count() == 0
