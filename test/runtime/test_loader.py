"""Loading, switching and rolling back, without a thread."""

from __future__ import annotations

import gc
import weakref

import pytest

from librobot_vlm_ros.core import ErrorCode, InferenceError, ModelError, VlmError
from librobot_vlm_ros.runtime.loader import (
    Loader,
    LoadJob,
    available_memory_bytes,
    collect,
    settle,
)


class Shelf:
    """A factory that remembers what it made, and fails for the names it is told to."""

    def __init__(self, script):
        self.script = script
        self.made = []
        self.failing = {}
        self.alive_when_making = []
        self.free_bytes = None  # as every model that it makes tells

    def __call__(self, name, *, should_cancel, **options):
        self.alive_when_making.append([one.name for one in self.made if not one.closed])
        error = self.failing.get(name)
        if callable(error):
            error = error()
        if error is not None:
            raise error
        backend = self.script(name)
        if self.free_bytes is not None:
            backend.free_memory = lambda: self.free_bytes
        self.made.append(backend)
        return backend

    def kept_the_old_one(self):
        """Whether the model before lived while the last one was made."""
        return self.alive_when_making[-1] != []


@pytest.fixture
def shelf(script):
    return Shelf(script)


def load(loader, name, **fields):
    job = LoadJob(name, {}, **fields)
    return loader.perform(job, lambda: not job.cancelled)


def test_a_model_is_loaded_warm_and_described(shelf):
    loader = Loader(shelf)
    report = load(loader, "a")
    assert (report.model, report.revision, report.device) == ("a", "a-r1", "cpu")
    assert "caption" in report.tasks
    assert loader.backend is shelf.made[0]
    assert shelf.made[0].threads  # warmed up


def test_the_old_model_is_kept_until_the_new_one_is_ready_when_memory_allows(shelf):
    loader, shelf.free_bytes = Loader(shelf), 1300
    load(loader, "a")
    load(loader, "b")
    assert shelf.alive_when_making == [[], ["a"]]
    assert [one.closed for one in shelf.made] == [True, False]


@pytest.mark.parametrize(("free", "required"), [(1100, None), (5000, 5000)])
def test_the_old_model_is_closed_first_when_memory_does_not_allow_both(shelf, free, required):
    loader, shelf.free_bytes = Loader(shelf), free
    load(loader, "a")
    load(loader, "b", required_bytes=required)
    assert shelf.alive_when_making == [[], []]


def test_on_a_device_whose_memory_nobody_knows_the_old_model_is_closed_first(shelf):
    loader = Loader(shelf)
    load(loader, "a")
    shelf.made[0].device = "cuda:0"
    load(loader, "b")
    assert not shelf.kept_the_old_one()


@pytest.mark.parametrize(("free", "beside"), [(1300, True), (1100, False), (None, False)])
def test_a_backend_that_knows_its_devices_memory_decides_it(shelf, free, beside):
    loader = Loader(shelf)
    load(loader, "a")
    shelf.made[0].device = "cuda:0"
    shelf.made[0].free_memory = lambda: free
    load(loader, "b")
    assert shelf.kept_the_old_one() is beside


def test_a_device_that_cannot_tell_after_all_is_one_that_nobody_knows(shelf, caplog):
    loader = Loader(shelf)
    load(loader, "a")
    shelf.made[0].device = "cuda:0"
    shelf.made[0].free_memory = lambda: 1 / 0
    load(loader, "b")
    assert not shelf.kept_the_old_one()
    assert "free memory is not known" in caplog.text


@pytest.mark.parametrize(
    ("present", "asked", "beside"),
    [
        ("cuda:0", "cuda:1", True),
        ("cpu", "cuda", True),
        ("cuda:0", "cuda", False),
        ("cuda:0", "auto", False),
        ("cuda:0", "cpu", True),  # a thousand bytes are always free
    ],
)
def test_a_model_for_another_gpu_leaves_the_old_one_alone(shelf, present, asked, beside):
    loader = Loader(shelf)
    load(loader, "a")
    shelf.made[0].device = present
    shelf.made[0].free_memory = lambda: None
    job = LoadJob("b", {"device": asked})
    loader.perform(job, lambda: True)
    assert shelf.kept_the_old_one() is beside


def test_after_a_failed_switch_the_old_model_is_still_there(shelf):
    loader, shelf.free_bytes = Loader(shelf), 10**9
    load(loader, "a")
    shelf.failing["b"] = ModelError(ErrorCode.WEIGHTS_NOT_FOUND, "none")
    with pytest.raises(ModelError, match="WEIGHTS_NOT_FOUND"):
        load(loader, "b")
    assert loader.backend is shelf.made[0]
    assert not shelf.made[0].closed


def test_after_a_failed_switch_that_closed_the_old_model_it_is_loaded_again(shelf):
    loader, shelf.free_bytes = Loader(shelf), 0
    load(loader, "a")
    shelf.failing["b"] = ModelError(ErrorCode.WEIGHTS_CORRUPT, "torn")
    with pytest.raises(ModelError, match="WEIGHTS_CORRUPT"):
        load(loader, "b")
    assert loader.backend is shelf.made[1]
    assert (loader.backend.name, loader.backend.closed) == ("a", False)


def test_a_model_that_does_not_fit_beside_the_old_one_after_all_is_loaded_alone(shelf):
    loader, shelf.free_bytes = Loader(shelf), 10**9
    load(loader, "a")
    full = InferenceError(ErrorCode.OUT_OF_MEMORY, "full")
    shelf.failing["b"] = lambda: full if not shelf.made[0].closed else None
    load(loader, "b")
    assert shelf.alive_when_making == [[], ["a"], []]
    assert loader.backend.name == "b"


def test_when_the_old_model_cannot_be_loaded_again_there_is_none(shelf, caplog):
    loader, shelf.free_bytes = Loader(shelf), 0
    load(loader, "a")
    shelf.failing = dict.fromkeys("ab", ModelError(ErrorCode.WEIGHTS_NOT_FOUND, "gone"))
    with pytest.raises(ModelError):
        load(loader, "b")
    assert loader.backend is None
    assert "cannot be loaded again" in caplog.text
    shelf.failing = {}
    load(loader, "a")
    assert loader.backend.name == "a"


def test_a_model_that_fails_to_warm_up_is_closed(shelf, script, monkeypatch):
    def out_of_memory(self):
        raise MemoryError

    monkeypatch.setattr(script, "warm_up", out_of_memory)
    with pytest.raises(VlmError, match="OUT_OF_MEMORY"):
        load(Loader(shelf), "a")
    assert shelf.made[0].closed
    assert load(Loader(shelf, warm_up=False), "a").model == "a"


def test_a_model_that_breaks_off_without_an_exception_has_failed_as_any_other(shelf):
    class Panic(BaseException):
        pass

    loader = Loader(shelf)
    load(loader, "a")
    shelf.failing["b"] = lambda: Panic("unwrap")
    with pytest.raises(VlmError, match="unwrap"):
        load(loader, "b")
    assert loader.backend is shelf.made[0]


def test_a_load_cancelled_at_the_last_moment_leaves_nothing(shelf):
    loader = Loader(shelf)
    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        loader.perform(LoadJob("a", {}), lambda: False)
    assert shelf.made[0].closed
    assert loader.backend is None


def test_a_load_cancelled_before_it_began_asks_nobody(shelf):
    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        load(Loader(shelf), "a", cancelled=True)
    assert shelf.made == []


def test_a_failed_load_leaves_nothing_allocated(script):
    class Weights:
        pass

    watched = []

    def factory(name, *, should_cancel, **options):
        weights = Weights()
        weights.itself = weights
        watched.append(weakref.ref(weights))
        raise ValueError("shape")

    with pytest.raises(VlmError, match="INTERNAL") as caught:
        load(Loader(factory), "a")
    error = caught.value
    assert watched[0]() is None
    assert isinstance(error.__cause__, ValueError)


def test_nothing_is_restored_when_no_model_is_wanted_any_more(shelf):
    loader, shelf.free_bytes = Loader(shelf), 0
    load(loader, "a")
    job = LoadJob("b", {})

    def given_up():
        job.roll_back = False
        return False

    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        loader.perform(job, given_up)
    assert loader.backend is None
    assert [one.closed for one in shelf.made] == [True, True]


def test_closing_a_model_that_cannot_close_is_logged_and_done(shelf, script, monkeypatch, caplog):
    loader = Loader(shelf)
    load(loader, "a")
    monkeypatch.setattr(script, "close", lambda self: 1 / 0)
    loader.unload()
    assert loader.backend is None
    assert "closing model a failed" in caplog.text
    loader.unload()


def test_this_machine_tells_its_memory():
    free = available_memory_bytes()
    assert free is None or free > 2**20


# -- what garbage collections leave out, and that a model is freed all the same --------------------


class Thing:
    """Sits in a reference cycle with itself."""

    def __init__(self):
        self.myself = self


@pytest.fixture
def garbage_as_before():
    """Garbage collection is about the whole process: also about the tests that follow."""
    yield
    gc.unfreeze()


def test_what_is_there_is_left_out_of_collections_until_one_asks_for_all(garbage_as_before):
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


def test_what_came_since_is_collected_as_ever(garbage_as_before):
    settle()
    since = weakref.ref(Thing())
    assert since() is not None
    gc.collect()
    assert since() is None


def test_a_process_that_has_not_asked_for_it_is_left_as_it_is(garbage_as_before):
    gc.unfreeze()
    collect()
    assert gc.get_freeze_count() == 0
