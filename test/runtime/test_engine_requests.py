"""On-demand requests: answered first, in order, on time, or with a code that says why not."""

from __future__ import annotations

import threading

import pytest

from librobot_vlm_ros.core import ErrorCode, InferenceError, ModelAnswer
from librobot_vlm_ros.runtime import StandingTask, batching

SOON = 10.0


def code(future):
    error = future.result(SOON).error
    return error.code if error is not None else ErrorCode.OK


@pytest.fixture
def held(make_engine, backend, ask):
    """A running engine whose model is in the middle of a request, and that request's future."""
    engine = make_engine(queue_size=2)
    backend.hold()
    running = engine.submit(ask("running"))
    backend.wait_entered()
    return engine, running


def test_an_answer_carries_its_provenance_and_the_frames_own_header(
    make_engine, backend, ask, make_frame, clock
):
    engine = make_engine()
    frame = make_frame()
    backend.answer = lambda request: ModelAnswer(
        text="a cube", prompt_tokens=3, generated_tokens=5, preprocess_s=0.01, inference_s=0.02
    )
    clock.advance(0.25)
    result = engine.submit(
        ask("q1", frame=frame, task="answer", prompt="what is it?", instruction_id=7)
    ).result(SOON)
    assert result.ok
    assert result.answer.text == "a cube"
    assert result.frame_header is frame.header
    assert (result.stamp_ns, result.frame_id) == (frame.stamp_ns, "front_optical")
    assert (result.image_width, result.image_height) == (6, 4)
    info = result.info
    assert (info.request_id, info.camera, info.task, info.prompt) == (
        "q1",
        "front",
        "answer",
        "what is it?",
    )
    assert (info.model, info.revision, info.dtype, info.device) == (
        "script",
        "script-r1",
        "float32",
        "cpu",
    )
    assert (info.prompt_tokens, info.generated_tokens, info.instruction_id) == (3, 5, 7)
    assert (info.preprocess_s, info.inference_s, info.batch_size) == (0.01, 0.02, 1)
    assert info.age_s == pytest.approx(0.25)


def test_everything_of_the_model_happens_on_one_thread(make_engine, backend, ask):
    engine = make_engine()
    engine.submit(ask()).result(SOON)
    assert engine.stop(SOON)
    assert backend.closed
    assert backend.threads == {"vlm-model"}


def test_beyond_the_queue_the_answer_is_busy_at_once(held, backend, ask):
    engine, running = held
    waiting = [engine.submit(ask()) for _ in range(2)]
    refused = engine.submit(ask())
    assert refused.done()
    assert code(refused) == ErrorCode.BUSY
    assert engine.stats().queue_depth == 2
    backend.release()
    assert [code(one) for one in [running, *waiting]] == [ErrorCode.OK] * 3
    assert code(engine.submit(ask())) == ErrorCode.OK


def test_requests_are_answered_in_the_order_they_came(held, backend, ask):
    engine, _ = held
    futures = [
        engine.submit(ask("first", task="detect")),
        engine.submit(ask("second", task="caption")),
    ]
    backend.release()
    for future in futures:
        future.result(SOON)
    assert [batch[0].request_id for batch in backend.batches] == ["running", "first", "second"]


def test_a_waiting_request_that_is_cancelled_never_reaches_the_model(held, backend, ask):
    engine, running = held
    waiting = engine.submit(ask("w"))
    assert engine.cancel("w")
    assert waiting.done()
    assert code(waiting) == ErrorCode.CANCELLED
    backend.release()
    running.result(SOON)
    assert engine.drain(SOON)
    assert len(backend.batches) == 1


def test_a_running_request_that_is_cancelled_is_answered_at_once_and_the_model_stops(
    held, backend, ask
):
    engine, running = held
    assert engine.cancel("running")
    assert running.done()
    assert code(running) == ErrorCode.CANCELLED
    assert engine.drain(SOON)  # though nobody released the model: it was told to stop
    backend.release()
    assert code(engine.submit(ask())) == ErrorCode.OK


def test_cancelling_what_is_not_there_says_so(held):
    engine, _ = held
    assert not engine.cancel("nobody")
    engine.cancel("running")
    assert not engine.cancel("running")


def test_cancelling_through_the_future_does_nothing(held, backend):
    _, running = held
    assert not running.cancel()
    backend.release()
    assert code(running) == ErrorCode.OK


def test_a_request_past_its_deadline_is_answered_though_the_model_is_deaf(
    held, backend, ask, clock
):
    engine, _ = held
    backend.deaf = True
    late = engine.submit(ask("late", deadline_ns=clock.ns + 1_000_000_000))
    patient = engine.submit(ask("patient", deadline_ns=clock.ns + 9_000_000_000))
    clock.advance(1.0)
    assert code(late) == ErrorCode.DEADLINE_EXCEEDED
    assert not patient.done()
    backend.release()
    assert code(patient) == ErrorCode.OK


def test_a_running_request_stops_at_its_deadline(make_engine, backend, ask, clock):
    engine = make_engine()
    backend.hold()
    future = engine.submit(ask(deadline_ns=clock.ns + 500_000_000))
    backend.wait_entered()
    clock.advance(0.5)
    assert code(future) == ErrorCode.DEADLINE_EXCEEDED
    assert engine.drain(SOON)


def test_a_request_whose_deadline_has_passed_already_does_not_wait(make_engine, ask, clock):
    engine = make_engine()
    assert code(engine.submit(ask(deadline_ns=clock.ns))) == ErrorCode.DEADLINE_EXCEEDED


def test_an_answer_that_comes_after_the_deadline_is_thrown_away(held, backend, ask, clock):
    engine, running = held
    backend.deaf = True
    late = engine.submit(ask("late", deadline_ns=clock.ns + 1))
    clock.advance(1.0)
    first = late.result(SOON)
    backend.release()
    running.result(SOON)
    assert engine.drain(SOON)
    assert late.result() is first


def test_tokens_stream_to_the_one_who_asked_and_end_with_the_answer(make_engine, backend, ask):
    engine = make_engine()
    backend.tokens = ["a", " red", " cube"]
    heard = []
    future = engine.submit(ask(), on_token=heard.append)
    future.result(SOON)
    assert heard == ["a", " red", " cube"]


def test_no_token_comes_after_a_cancelled_future_is_done(make_engine, backend, ask):
    engine = make_engine()
    heard = []
    cancelled = threading.Event()
    backend.tokens = ["one", "two", "three"]

    def listen(text):
        heard.append(text)
        engine.cancel("talk")
        cancelled.set()

    future = engine.submit(ask("talk"), on_token=listen)
    assert code(future) == ErrorCode.CANCELLED
    assert cancelled.wait(SOON)
    assert engine.drain(SOON)
    assert heard == ["one"]


def test_a_task_that_the_model_cannot_do_is_refused_with_what_it_can(make_engine, ask):
    engine = make_engine()
    future = engine.submit(ask(task="ocr"))
    assert code(future) == ErrorCode.TASK_NOT_SUPPORTED
    assert "caption, detect" in str(future.result().error)


def test_a_failing_request_gives_its_code_and_the_next_is_served(make_engine, backend, ask):
    engine = make_engine()

    def fail(request):
        raise InferenceError(ErrorCode.NAN_LOGITS, "nan")

    good, backend.answer = backend.answer, fail
    assert code(engine.submit(ask())) == ErrorCode.NAN_LOGITS
    backend.answer = good
    assert code(engine.submit(ask())) == ErrorCode.OK
    stats = engine.stats()
    assert stats.errors == {"NAN_LOGITS": 1}
    assert "NAN_LOGITS" in stats.last_error


def test_requests_on_one_frame_share_a_batch(held, backend, ask, make_frame):
    engine, _ = held
    frame = make_frame()
    one = engine.submit(ask(frame=frame, task="caption"))
    two = engine.submit(ask(frame=frame, task="detect"))
    backend.release()
    assert one.result(SOON).info.batch_size == 2
    assert two.result(SOON).info.batch_size == 2
    assert [len(batch) for batch in backend.batches] == [1, 2]


def test_requests_go_before_standing_tasks(make_engine, backend, ask, make_frame, results):
    engine = make_engine()
    engine.set_standing_tasks([StandingTask("detect")])
    backend.hold()
    engine.submit(ask("first"))
    backend.wait_entered()
    engine.offer(make_frame())
    engine.submit(ask("second", task="answer", prompt="?"))
    backend.release()
    results.wait(1)
    assert [batch[0].task for batch in backend.batches] == ["caption", "answer", "detect"]


def test_a_flood_of_requests_does_not_starve_standing_tasks(
    make_engine, backend, ask, make_frame, results, monkeypatch
):
    monkeypatch.setattr(batching, "REQUESTS_BEFORE_STANDING", 3)
    engine = make_engine(queue_size=20)
    engine.set_standing_tasks([StandingTask("detect")])
    backend.hold()
    engine.submit(ask("r0"))
    backend.wait_entered()
    engine.offer(make_frame())
    futures = [engine.submit(ask(f"r{number}")) for number in range(1, 9)]
    backend.release()
    for future in futures:
        future.result(SOON)
    kinds = [batch[0].task for batch in backend.batches]
    assert kinds.index("detect") <= 4


def test_a_done_callback_may_ask_again(make_engine, ask):
    engine = make_engine()
    chained = []
    ready = threading.Event()

    def again(_):
        chained.append(engine.submit(ask("second")))
        ready.set()

    engine.submit(ask("first")).add_done_callback(again)
    assert ready.wait(SOON)
    assert code(chained[0]) == ErrorCode.OK
