"""Whatever a backend does with a batch, each request gets an answer or a coded error."""

from __future__ import annotations

import gc
import weakref

import pytest

from librobot_vlm_ros.core import ErrorCode, InferenceError, ModelAnswer, RequestError
from librobot_vlm_ros.runtime.batch_executor import run_batch
from librobot_vlm_ros.runtime.pending_request import PendingRequest


@pytest.fixture
def requests(ask):
    return [PendingRequest(ask("a")), PendingRequest(ask("b")), PendingRequest(ask("c"))]


def codes(run):
    return ["ok" if isinstance(one, ModelAnswer) else one.code.name for one in run.outcomes]


def test_answers_come_in_order(backend, requests):
    backend.answer = lambda request: ModelAnswer(text=request.request_id)
    run = run_batch(backend, requests)
    assert [answer.text for answer in run.outcomes] == ["a", "b", "c"]
    assert run.served
    assert run.failure is None


def test_one_request_that_fails_leaves_the_others_alone(backend, requests):
    def answer(request):
        if request.request_id == "b":
            raise InferenceError(ErrorCode.NAN_LOGITS, "nan")
        return ModelAnswer()

    backend.answer = answer
    run = run_batch(backend, requests)
    assert codes(run) == ["ok", "NAN_LOGITS", "ok"]
    assert run.failure is None


def test_an_exception_becomes_the_error_of_all_requests(backend, requests):
    backend.answer = lambda request: 1 / 0
    run = run_batch(backend, requests)
    assert codes(run) == ["INTERNAL"] * 3
    assert "ZeroDivisionError" in str(run.failure)


def test_what_is_no_exception_becomes_one_too(backend, requests):
    class Panic(BaseException):
        """As the bindings of Rust libraries raise it."""

    def break_off(request):
        raise Panic("called `Result::unwrap()` on an `Err` value")

    backend.answer = break_off
    run = run_batch(backend, requests)
    assert codes(run) == ["INTERNAL"] * 3
    assert "unwrap()" in str(run.failure)


@pytest.mark.parametrize("answers", [[], [ModelAnswer()] * 4, ["text", "text", "text"], None])
def test_a_backend_that_breaks_its_word_gives_coded_errors(backend, requests, answers):
    backend.run = lambda batch, *, on_token=None, should_stop=None: answers
    assert codes(run_batch(backend, requests)) == ["INTERNAL"] * 3


def test_a_batch_out_of_memory_is_run_again_one_by_one(backend, requests):
    def no_room_for_two(batch):
        if len(batch) > 1:
            raise MemoryError("CUDA out of memory")

    backend.before_run = no_room_for_two
    run = run_batch(backend, requests)
    assert codes(run) == ["ok"] * 3
    assert run.ran_out_of_memory
    assert backend.caches_freed == 1
    assert [len(batch) for batch in backend.batches] == [3, 1, 1, 1]


def test_out_of_memory_alone_is_an_error_and_frees_caches(backend, ask):
    def no_room(batch):
        raise MemoryError

    backend.before_run = no_room
    run = run_batch(backend, [PendingRequest(ask())])
    assert codes(run) == ["OUT_OF_MEMORY"]
    assert run.failure is not None
    assert backend.caches_freed == 1
    backend.before_run = lambda batch: None
    assert codes(run_batch(backend, [PendingRequest(ask())])) == ["ok"]


def test_a_backend_that_fails_to_free_its_caches_still_answers(backend, requests):
    backend.free_caches = lambda: 1 / 0

    def no_room_for_two(batch):
        if len(batch) > 1:
            raise MemoryError

    backend.before_run = no_room_for_two
    assert codes(run_batch(backend, requests)) == ["ok"] * 3


def test_only_the_requests_that_ran_out_of_memory_are_run_again(backend, requests):
    seen = []

    def answer(request):
        seen.append(request.request_id)
        if request.request_id == "b" and seen.count("b") == 1:
            raise InferenceError(ErrorCode.OUT_OF_MEMORY, "full")
        return ModelAnswer()

    backend.answer = answer
    assert codes(run_batch(backend, requests)) == ["ok"] * 3
    assert seen == ["a", "b", "c", "b"]


def test_a_request_that_has_streamed_text_is_not_run_twice(backend, ask):
    texts = []
    streaming = PendingRequest(ask("s"), on_text=texts.append)
    plain = PendingRequest(ask("p"))
    backend.tokens = ["a", "b"]

    def full(request):
        if len(backend.batches[-1]) > 1:
            raise InferenceError(ErrorCode.OUT_OF_MEMORY, "full")
        return ModelAnswer()

    backend.answer = full
    assert codes(run_batch(backend, [streaming, plain])) == ["OUT_OF_MEMORY", "ok"]
    assert texts == ["a", "b"]


def test_tokens_go_to_the_request_they_belong_to(backend, ask):
    heard = {"x": [], "y": []}
    backend.tokens = ["to", "ken"]
    run_batch(
        backend,
        [
            PendingRequest(ask("x"), on_text=heard["x"].append),
            PendingRequest(ask()),
            PendingRequest(ask("y"), on_text=heard["y"].append),
        ],
    )
    assert heard == {"x": ["to", "ken"], "y": ["to", "ken"]}


def test_a_listener_that_fails_is_not_called_again_and_the_answer_still_comes(backend, ask, caplog):
    heard = []

    def listen(text):
        heard.append(text)
        raise ValueError("gone")

    backend.tokens = ["a", "b", "c"]
    assert codes(run_batch(backend, [PendingRequest(ask("r"), on_text=listen)])) == ["ok"]
    assert heard == ["a"]
    assert "on_token of request 'r' failed" in caplog.text


def test_an_ended_request_hears_no_token_and_is_told_to_stop(backend, ask):
    heard = []
    pending = PendingRequest(ask(), on_text=heard.append)
    pending.finished = True
    backend.tokens = ["a"]
    backend.hold()
    assert codes(run_batch(backend, [pending])) == ["CANCELLED"]
    assert heard == []


def test_errors_do_not_keep_what_the_model_held(backend, ask):
    class Tensor:
        pass

    watched = []

    def fail(batch):
        tensor = Tensor()
        watched.append(weakref.ref(tensor))
        raise RuntimeError("broken")

    backend.before_run = fail
    run = run_batch(backend, [PendingRequest(ask())])
    gc.collect()
    assert run.failure is not None
    assert watched[0]() is None


def test_errors_of_the_request_do_not_speak_against_the_model(backend, ask):
    def refuse(request):
        raise RequestError(ErrorCode.BAD_PARAMETER, "no")

    backend.answer = refuse
    assert run_batch(backend, [PendingRequest(ask())]).failure is None
