"""The engine worker: queue, fair order, deadlines, cancellation, faults. The clock is handed in; no thread but one."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence as SequenceOf

import pytest

from selfdraft.core.sequence import open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import EngineError, PromptTooLong
from selfdraft.serve.worker import FAILURES, Call, EngineWorker, Refused
from selfdraft.testing import FakeTarget, markov
from selfdraft.types import SamplingParams


class Hand:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def worker_of(slots: int = 2, queue: int = 8, kv_tokens: int | None = None) -> tuple[EngineWorker, Hand]:
    target, hand = FakeTarget(slots=slots), Hand()
    engine = Engine(target, build("merged", target), slots=slots, chunk=4, rows=8, reuse="all")
    return EngineWorker(engine, max_queue=queue, kv_tokens=kv_tokens, clock=hand), hand


def call_of(prompt: SequenceOf[int] = (3, 1, 4), most: int = 8, n: int = 1, **options: object) -> Call:
    sampling = SamplingParams(max_tokens=most)
    made = [open_sequence(prompt, sampling, seed=i, eos=frozenset(), context=160) for i in range(n)]
    return Call(made, **options)  # type: ignore[arg-type]


def text_of(call: Call) -> list[int]:
    """The tokens that were handed out for the first answer."""
    return [token for update in call.updates if update.index == 0 for token in update.piece.token_ids]


def plain(prompt: SequenceOf[int], most: int = 8) -> list[int]:
    say, path = markov(), list(prompt)
    for _ in range(most):
        path.append(int(say(path).argmax()))
    return path[len(prompt) :]


def run(worker: EngineWorker, most: int = 1000) -> None:
    for _ in range(most):
        if not worker.busy:
            return
        worker.turn()
    raise AssertionError("calls that never end")


def free(worker: EngineWorker) -> int:
    return len(worker.engine.slots.free)


def test_answers_are_plain_decoding_s_and_every_token_is_handed_out_once() -> None:
    worker, _ = worker_of()
    calls = [call_of([i + 1, 2, 3], most=9, n=1 + i % 3) for i in range(6)]
    for call in calls:
        worker.submit(call)
    run(worker)
    for number, call in enumerate(calls):
        assert call.done
        assert call.error is None
        assert text_of(call) == plain([number + 1, 2, 3], 9)
        for index in range(len(call.sequences)):
            last = [update for update in call.updates if update.index == index][-1]
            assert last.piece.finish_reason == "length"
    assert free(worker) == 2


def test_a_full_queue_refuses_with_429_and_says_when_to_come_again() -> None:
    worker, _ = worker_of(slots=1, queue=2)
    for _ in range(3):
        worker.submit(call_of())
    with pytest.raises(Refused) as caught:
        worker.submit(call_of())
    assert caught.value.status == 429
    assert caught.value.wait >= 1
    run(worker)
    worker.submit(call_of())
    run(worker)


def test_a_prompt_that_does_not_fit_is_refused_before_it_waits() -> None:
    worker, _ = worker_of()
    with pytest.raises(PromptTooLong):
        worker.submit(call_of([1] * 160))
    assert not worker.busy


def test_slots_go_to_the_caller_with_the_fewest_running_calls() -> None:
    worker, _ = worker_of(slots=2, queue=20)
    many = [call_of(caller="a") for _ in range(5)]
    for call in many:
        worker.submit(call)
    worker.submit(late := call_of(caller="b"))
    worker.turn()
    assert late.admitted is not None, "it does not wait behind five of another caller"
    assert [call.admitted is not None for call in many] == [True, False, False, False, False]
    run(worker)
    assert [call.admitted for call in many] == sorted(call.admitted or 0.0 for call in many), (
        "each caller's own in order"
    )


def test_running_calls_hold_no_more_tokens_than_they_may() -> None:
    worker, _ = worker_of(slots=4, queue=20, kv_tokens=30)
    calls = [call_of(most=10) for _ in range(4)]
    for call in calls:
        worker.submit(call)
    worker.turn()
    assert [call.admitted is not None for call in calls] == [True, True, False, False]
    run(worker)
    assert all(call.error is None for call in calls)
    worker.submit(huge := call_of(most=100))
    run(worker)
    assert huge.error is None, "alone it may run, however long it is"


def test_a_call_that_waits_too_long_ends_with_503() -> None:
    worker, hand = worker_of(slots=1)
    worker.submit(first := call_of(most=40))
    worker.submit(second := call_of(queue_timeout=5.0))
    worker.turn()
    hand.now = 6.0
    worker.turn()
    assert isinstance(second.error, Refused)
    assert (second.error.status, second.error.code) == (503, "queue_timeout")
    run(worker)
    assert first.error is None


def test_a_call_that_takes_too_long_ends_with_503_and_frees_its_slot() -> None:
    worker, hand = worker_of(slots=1)
    worker.submit(call := call_of(most=90, timeout=5.0))
    worker.turn()
    worker.turn()
    hand.now = 6.0
    worker.turn()
    assert isinstance(call.error, Refused)
    assert call.error.code == "request_timeout"
    assert free(worker) == 1
    assert text_of(call) == plain([3, 1, 4], 90)[: len(text_of(call))]


@pytest.mark.parametrize("turns", range(8))
def test_a_cancelled_call_frees_its_slot_at_once_whenever_it_comes(turns: int) -> None:
    worker, _ = worker_of(slots=1)
    worker.submit(call := call_of([*range(1, 14)], most=12))
    worker.submit(other := call_of())
    for _ in range(turns):
        worker.turn()
    worker.cancel(call)
    worker.cancel(call)
    worker.turn()
    assert call.done
    run(worker)
    assert free(worker) == 1
    assert text_of(other) == plain([3, 1, 4])


def test_one_answer_of_a_call_that_fails_ends_this_call_alone() -> None:
    def raises(path: SequenceOf[int], logits: object) -> object:
        if len(path) > 5:
            raise RuntimeError("planted")
        return logits

    worker, _ = worker_of(slots=3)
    broken = call_of(n=2)
    sampling = SamplingParams(max_tokens=8, logits_processors=(raises,))  # type: ignore[arg-type]
    broken.sequences = [*broken.sequences[:1], open_sequence([1, 2], sampling, seed=0, eos=frozenset(), context=99)]
    worker.submit(broken)
    worker.submit(healthy := call_of())
    run(worker)
    assert isinstance(broken.error, EngineError)
    assert text_of(healthy) == plain([3, 1, 4])
    assert free(worker) == 3
    assert worker.failed is None


def test_an_answer_that_ends_in_the_step_in_which_another_one_fails_is_handed_out() -> None:
    """The step raises for one request, after it has moved those before it: they appear in no result of it."""

    def raises(tokens: SequenceOf[int]) -> bool:
        raise RuntimeError("planted")

    worker, _ = worker_of(slots=2)
    whole = call_of([3], most=1)
    sampling = SamplingParams(max_tokens=8, stopping_criteria=(raises,))
    broken = Call([open_sequence([4], sampling, seed=0, eos=frozenset(), context=99)])
    worker.submit(whole)
    worker.submit(broken)
    run(worker)
    assert isinstance(broken.error, EngineError)
    assert whole.error is None
    assert text_of(whole) == plain([3], 1)
    assert free(worker) == 2


def test_a_step_that_fails_for_all_ends_all_that_run_and_the_next_ones_are_served() -> None:
    worker, _ = worker_of()
    target = worker.engine.target
    assert isinstance(target, FakeTarget)
    worker.submit(one := call_of())
    worker.submit(two := call_of())
    worker.turn()
    target.fails = True
    worker.turn()
    target.fails = False
    assert isinstance(one.error, EngineError)
    assert isinstance(two.error, EngineError)
    assert "planted" not in str(one.error), "the inside is not told"
    assert free(worker) == 2
    worker.submit(three := call_of())
    run(worker)
    assert text_of(three) == plain([3, 1, 4])


def test_an_engine_that_fails_again_and_again_is_given_up_and_nobody_waits_for_ever() -> None:
    worker, _ = worker_of(slots=1)
    target = worker.engine.target
    assert isinstance(target, FakeTarget)
    target.fails = True
    calls = [call_of() for _ in range(FAILURES + 3)]
    for call in calls:
        worker.submit(call)
    worker.start()
    worker._thread.join()
    assert worker.failed is not None
    assert all(call.done and call.error is not None for call in calls)
    with pytest.raises(Refused):
        worker.submit(call_of())


def test_stop_ends_whoever_runs_and_waits_with_an_error() -> None:
    worker, _ = worker_of(slots=1)
    ended = threading.Event()
    calls = [call_of(most=150, notify=ended.set) for _ in range(3)]
    for call in calls:
        worker.submit(call)
    worker.start()
    ended.wait()
    worker.stop()
    assert all(call.done for call in calls)
    assert any(isinstance(call.error, Refused) for call in calls)
    assert free(worker) == 1


def test_a_step_that_hangs_is_seen() -> None:
    worker, hand = worker_of()
    assert not worker.stalled(10)
    worker._stepping_since = 0.0
    hand.now = 11.0
    assert worker.stalled(10)


def test_random_storms_leave_nothing_behind() -> None:
    """Calls that come, go, time out and fail at random moments: each text is right as far as it came."""
    draw = random.Random(1)
    worker, hand = worker_of(slots=3, queue=6)
    target = worker.engine.target
    assert isinstance(target, FakeTarget)
    calls: list[tuple[list[int], Call]] = []
    for _ in range(600):
        hand.now += 0.1
        prompt = [draw.randrange(1, 8) for _ in range(draw.randrange(1, 12))]
        owner = draw.choice(["a", "b", None])
        call = call_of(prompt, most=draw.randrange(1, 9), n=draw.choice([1, 1, 2]), owner=owner, timeout=3.0)
        try:
            worker.submit(call)
            calls.append((prompt, call))
        except Refused:
            pass
        target.fails = draw.random() < 0.01
        worker.turn()
        target.fails = False
        if calls and draw.random() < 0.2:
            worker.cancel(draw.choice(calls)[1])
    run(worker)
    assert free(worker) == 3
    assert not worker._active
    assert not worker._waiting
    for prompt, call in calls:
        assert call.done
        said = text_of(call)
        assert said == plain(prompt, 9)[: len(said)]
        if call.error is None and call.sequences[0].finish_reason == "length":
            assert len(said) == call.sequences[0].sampling.max_tokens
