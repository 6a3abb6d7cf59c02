"""The engine around the step: who gets a slot, who goes next, and what is left when somebody leaves or fails."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as SequenceOf
from functools import cache
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.engine import scheduler
from selfdraft.engine.engine import Engine
from selfdraft.engine.slots import Slots
from selfdraft.engine.step import budget
from selfdraft.errors import OptionError, PromptTooLong, RequestError
from selfdraft.models.exactness import Shapes
from selfdraft.testing import FakeTarget
from selfdraft.types import Budget, SamplingParams
from tests.models import run, tiny_target

VOCAB, CONTEXT, END = 13, 60, 0
Texts = dict[Sequence, list[int]]


def say(tokens: SequenceOf[int]) -> int:
    """The model: what comes next depends on every token before."""
    return crc32(bytes(tokens)) % VOCAB


@cache
def plain(prompt: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Plain decoding."""
    tokens = list(prompt)
    while len(tokens) < min(CONTEXT, len(prompt) + most):
        tokens.append(say(tokens))
        if tokens[-1] == END:
            break
    return tuple(tokens[len(prompt) :])


def one_hot(path: SequenceOf[int]) -> Tensor:
    """Logits of what `say` says."""
    return torch.nn.functional.one_hot(torch.tensor(say(list(path))), VOCAB).float()


def fake_target(slots: int) -> FakeTarget:
    return FakeTarget(one_hot, slots=slots, vocab=VOCAB, context=CONTEXT)


class Guesser:
    """Right, half right or wrong, by chance; fails when told to."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.fails = ""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if self.fails == "draft":
            raise RuntimeError("planted")
        return [self._one(sequence) for sequence in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if self.fails == "observe":
            raise RuntimeError("planted")

    def _one(self, sequence: Sequence) -> Draft:
        right = list(sequence.tokens)
        for _ in range(self.random.randrange(6)):
            right.append(say(right))
        truth = right[len(sequence.tokens) :]
        wrong = [self.random.randrange(-1, VOCAB + 1) for _ in range(self.random.randrange(4))]
        return Draft.branches([truth[:1] + wrong, wrong, truth], "guess") if truth or wrong else EMPTY


def request(prompt: SequenceOf[int], most: int = 12) -> Sequence:
    sampling = SamplingParams(max_tokens=most)
    return open_sequence(prompt, sampling, seed=0, eos=frozenset({END}), context=CONTEXT)


def engine_of(slots: int = 2, chunk: int = 4, rows: int = 8) -> Engine:
    return Engine(fake_target(slots), Guesser(), slots=slots, chunk=chunk, rows=rows)


def free_of(engine: Engine) -> list[int]:
    return sorted(engine.slots.free)


def check(sequence: Sequence) -> None:
    """The text is plain decoding's, whole when it was let run to its end."""
    said = plain(tuple(sequence.tokens[: sequence.prompt_length]), sequence.sampling.max_tokens)
    assert tuple(sequence.output) == said[: sequence.num_output_tokens]
    assert sequence.num_cached == len(sequence.tokens) - 1 or sequence.num_output_tokens == 0
    if sequence.finish_reason in ("stop", "length"):
        assert tuple(sequence.output) == said
        assert (sequence.finish_reason == "stop") == (said[-1] == END)


PROMPTS = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20)


# --- scheduler --------------------------------------------------------------------------------------------------


@given(waiting=st.integers(0, 5), free=st.lists(st.integers(0, 9), unique=True, max_size=5))
def test_admit_first_come_first_served(waiting: int, free: list[int]) -> None:
    queue = deque(request([i + 1]) for i in range(waiting))
    before, slots, room = list(queue), set(free), Slots(0, 4)
    room.free = free
    admitted = [sequence for sequence, _ in scheduler.admit(queue, room, {})]
    assert admitted == before[: len(slots)]
    assert [*admitted, *queue] == before
    taken = {sequence.slot for sequence in admitted}
    assert len(taken) == len(admitted)
    assert taken | set(free) == slots
    assert not taken & set(free)
    assert not (queue and free), "nobody waits beside a free slot"


@given(length=st.integers(1, 50), chunk=st.integers(1, 20), data=st.data())
def test_shares_end_at_multiples_of_the_chunk(length: int, chunk: int, data: st.DataObject) -> None:
    """Also when the prompt's beginning is already remembered, up to any place."""
    sequence = request([1] * length)
    sequence.num_cached = known = data.draw(st.integers(0, length - 1))
    ends = []
    while sequence.num_cached < length:
        size = scheduler.share(sequence, chunk)
        assert 1 <= size <= chunk
        sequence.num_cached += size
        ends.append(sequence.num_cached)
    assert ends == [*(end for end in range(chunk, length, chunk) if end > known), length]


@st.composite
def running(draw: st.DrawFn) -> tuple[list[Sequence], int]:
    """Sequences as they can stand between two steps: decoding, or prefilled up to some chunk."""
    chunk = draw(st.integers(1, 8))
    sequences = []
    for length in draw(st.lists(st.integers(1, 40), max_size=6)):
        sequence = request([1] * length)
        sequence.num_cached = draw(st.sampled_from([*range(0, length, chunk), length - 1]))
        sequences.append(sequence)
    return sequences, chunk


@given(state=running(), rows=st.integers(1, 30))
def test_plan(state: tuple[list[Sequence], int], rows: int) -> None:
    sequences, chunk = state
    work = scheduler.plan(sequences, chunk, rows)
    sizes = dict(work)
    assert len(sizes) == len(work), "nobody goes twice"
    assert bool(work) == bool(sequences), "every step makes progress"
    for sequence, size in work:
        assert size == scheduler.share(sequence, chunk), "a share does not depend on who else is there"
        assert (sequence.num_cached + size) % chunk == 0 or sequence.num_cached + size == len(sequence.tokens)
    decoding = [s for s in sequences if scheduler.share(s, chunk) == 1]
    prefills = [s for s in sequences if s not in decoding]
    assert all(sequence in sizes for sequence in decoding)
    assert not prefills or prefills[0] in sizes, "nobody is kept waiting by those that decode"
    went = [s for s in prefills if s in sizes]
    assert sum(sizes.values()) <= max(rows, len(decoding) + (sizes[went[0]] if went else 0))
    left = rows - len(decoding) - sum(sizes[s] for s in went)
    assert all(scheduler.share(s, chunk) > left for s in prefills if s not in sizes), "no room is wasted"


def test_a_long_prompt_is_not_starved_by_short_requests() -> None:
    """More short requests than ever end, and rows for less than one chunk beside them."""
    engine = engine_of(slots=3, chunk=8, rows=4)
    long = request([1 + i % 5 for i in range(40)], 3)
    crowd = [request([1 + i % 7, 2], 30) for i in range(40)]
    for sequence in (crowd[0], long, *crowd[1:]):
        engine.submit(sequence)
    for _ in range(5 + 3):
        engine.advance()
    assert long.finished
    check(long)


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=6),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 9),
    rows=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_text_does_not_depend_on_slots_chunks_and_rows(
    prompts: list[list[int]], slots: int, chunk: int, rows: int
) -> None:
    engine = engine_of(slots, chunk, rows)
    sequences = [request(prompt) for prompt in prompts]
    steps = list(engine.generate(sequences))
    for sequence in sequences:
        assert sequence.finish_reason in ("stop", "length")
        check(sequence)
        emitted = sum(s is sequence and bool(result.tokens) for s, result in steps)
        assert emitted == sequence.stats.num_steps
    assert free_of(engine) == list(range(slots))


# --- the machine ------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Requests come, run, are aborted at any moment, and parts fail; no slot and no token is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = 3
        self.target, self.drafter = fake_target(self.slots), Guesser(5)
        self.engine = Engine(self.target, self.drafter, slots=self.slots, chunk=4, rows=9, nodes=9)
        self.all: list[Sequence] = []
        self.aborted: dict[Sequence, int] = {}

    @rule(prompt=PROMPTS, most=st.integers(1, 15))
    def submit(self, prompt: list[int], most: int) -> None:
        self.all.append(request(prompt, most))
        self.engine.submit(self.all[-1])

    @rule(prompt=PROMPTS)
    def abort_before_submit(self, prompt: list[int]) -> None:
        sequence = request(prompt)
        self.engine.abort(sequence)
        self.engine.submit(sequence)
        self.all.append(sequence)
        self.aborted[sequence] = 0

    @rule(times=st.integers(1, 4))
    def advance(self, times: int) -> None:
        for _ in range(times):
            busy = bool(self.engine.running or self.engine.waiting)
            before = {s: len(s.tokens) + s.num_cached for s in self.all}
            moved = self.engine.advance()
            assert bool(moved) == busy, "whoever is there, somebody goes"
            went = {s for s, _ in moved}
            assert {s for s in self.all if len(s.tokens) + s.num_cached > before[s]} == went

    @precondition(lambda self: self.all)
    @rule(data=st.data(), twice=st.booleans())
    def abort(self, data: st.DataObject, twice: bool) -> None:
        """Waiting, running or finished; once or twice."""
        sequence = data.draw(st.sampled_from(self.all))
        reason = sequence.finish_reason
        for _ in range(1 + twice):
            self.engine.abort(sequence)
        assert sequence.finish_reason == (reason or "abort")
        if reason is None:
            self.aborted[sequence] = sequence.num_output_tokens

    @precondition(lambda self: self.engine.running or self.engine.waiting)
    @rule(where=st.sampled_from(["draft", "observe", "target"]))
    def fail(self, where: str) -> None:
        """A failing part moves nobody, but for `observe`, which comes after everything was written."""
        before = [(list(s.tokens), s.num_cached) for s in self.all]
        self.drafter.fails, self.target.fails = where, where == "target"
        try:
            self.engine.advance()
        except RuntimeError:
            assert where == "observe" or [(s.tokens, s.num_cached) for s in self.all] == before
        else:
            assert where == "draft", "only a step without a draft can miss a failing drafter"
        finally:
            self.drafter.fails, self.target.fails = "", False

    @invariant()
    def slots_are_kept_apart(self) -> None:
        taken = [sequence.slot for sequence in self.engine.running]
        assert sorted([*taken, *self.engine.slots.free]) == list(range(self.slots))

    @invariant()
    def everyone_is_in_one_place(self) -> None:
        for sequence in self.all:
            places = (sequence in self.engine.running) + (sequence in self.engine.waiting)
            assert places == (0 if sequence.finished else 1)

    @invariant()
    def texts_are_plain(self) -> None:
        for sequence in self.all:
            check(sequence)
        for sequence, written in self.aborted.items():
            assert (sequence.finish_reason, sequence.num_output_tokens) == ("abort", written), (
                "nothing comes after an abort"
            )

    def teardown(self) -> None:
        for _ in range(40 * (1 + len(self.all))):
            if not self.engine.advance():
                break
        assert all(sequence.finished for sequence in self.all)
        assert free_of(self.engine) == list(range(self.slots))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# --- the two drivers --------------------------------------------------------------------------------------------


@given(items=st.lists(st.one_of(st.none(), PROMPTS), max_size=12), slots=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_serve_yields_everyone_once(items: list[list[int] | None], slots: int) -> None:
    engine = engine_of(slots)
    requests = [None if prompt is None else request(prompt) for prompt in items]
    served = list(engine.serve(requests))
    assert len(served) == len(set(served))
    assert set(served) == {sequence for sequence in requests if sequence is not None}
    for sequence in served:
        assert sequence.finish_reason in ("stop", "length")
        check(sequence)
    assert free_of(engine) == list(range(slots))


def test_serve_reads_one_item_a_step_and_takes_late_comers() -> None:
    engine = engine_of(slots=2)
    read: list[int] = []
    first, late = request([1, 2, 3], 12), request([4], 2)

    def stream() -> Iterator[Sequence | None]:
        for i, item in enumerate([None, first, None, None, late]):
            read.append(i)
            assert len(engine.target.sizes) == max(0, i - 1), "one step between two items"  # type: ignore[attr-defined]
            yield item

    order = [(sequence, len(read)) for sequence in engine.serve(stream())]
    assert {sequence for sequence, _ in order} == {first, late}
    assert order[-1][1] == 5


def test_serve_of_nothing_ends() -> None:
    assert list(engine_of().serve([])) == []
    assert list(engine_of().serve([None, None])) == []


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_leaving_generate_early_aborts_the_rest(steps: int) -> None:
    engine = engine_of(slots=2)
    sequences = [request([i + 1] * (3 + i), 20) for i in range(5)]
    running = engine.generate(sequences)
    for _ in range(steps):
        next(running)
    ended = [sequence for sequence in sequences if sequence.finished]
    assert isinstance(running, Generator)
    running.close()
    for sequence in sequences:
        assert sequence.finish_reason == "abort" or sequence in ended
        check(sequence)
    assert free_of(engine) == [0, 1]
    assert not engine.running
    assert not engine.waiting
    again = [request([i + 1] * (3 + i), 20) for i in range(5)]
    assert len(list(engine.generate(again))) > 5
    assert {sequence.finish_reason for sequence in again} <= {"stop", "length"}


def test_an_exception_in_the_middle_frees_the_slots() -> None:
    engine = engine_of(slots=2)
    sequences = [request([i + 1, 2], 20) for i in range(4)]
    running = engine.generate(sequences)
    next(running)
    assert isinstance(engine.drafter, Guesser)
    engine.drafter.fails = "observe"
    with pytest.raises(RuntimeError, match="planted"):
        list(running)
    assert free_of(engine) == [0, 1]
    assert all(sequence.finished for sequence in sequences)


def test_a_request_that_cannot_run_is_refused_at_once() -> None:
    """Else it would wait for ever, or write behind the context."""
    engine = engine_of()
    with pytest.raises(RequestError, match="empty"):
        engine.submit(request([]))
    with pytest.raises(PromptTooLong, match=str(CONTEXT)):
        engine.submit(request([1] * CONTEXT))
    fine = request([1, 2])
    with pytest.raises(RequestError):
        list(engine.generate([fine, request([])]))
    assert fine.finish_reason == "abort"
    assert not engine.waiting
    last = request([1] * (CONTEXT - 1))
    list(engine.generate([last]))
    assert last.num_output_tokens == 1


@pytest.mark.parametrize("option", ["slots", "chunk", "rows", "nodes"])
@pytest.mark.parametrize("value", [-1, 2**30, 1.5])
def test_sizes_are_checked(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{option}={value}"):
        Engine(fake_target(1), Guesser(), **{option: value})  # type: ignore[arg-type]


def test_a_draft_ends_where_the_shape_of_attention_changes_or_the_text_must() -> None:
    """The last node stands at the last position before the edge, and leaves room for the token behind it."""
    target = tiny_target(shapes=Shapes(4, 64))

    def depth(length: int, most: int) -> int:
        sampling = SamplingParams(max_tokens=most)
        made = open_sequence([1] * length, sampling, seed=0, eos=frozenset(), context=target.max_length)
        return budget(target, made, 9).max_depth

    assert [depth(length, 999) for length in (60, 63, 64, 65)] == [4, 1, 0, 63]
    assert [depth(60, most) for most in (1, 2, 3)] == [0, 1, 2]
    assert depth(511, 999) == 0


def test_the_fake_can_tell() -> None:
    """The fake's own checks: a wrong order of rows is noticed."""
    target = fake_target(1)
    engine = Engine(target, Guesser(3), chunk=8)
    engine.submit(request([1, 2, 3]))
    engine.advance()
    with pytest.raises(AssertionError, match="something else"):
        target.keep(0, 0, [1, 0])
    assert target.memory == [[1, 2, 3]]


def test_a_broken_request_leaves_serve_and_its_slot_clean() -> None:
    """A request that ends in NaN is aborted alone, and what it left in the cache reaches nobody."""

    def poison(path: SequenceOf[int], scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf")) if len(path) > 20 else scores

    target = tiny_target(slots=1)
    plain = run(tiny_target(), "none", [[7, 8, 9]], SamplingParams(max_tokens=20))[0].tokens
    bad = open_sequence([1, 2, 3], SamplingParams(logits_processors=(poison,)), seed=0, eos=frozenset(), context=256)
    good = open_sequence([7, 8, 9], SamplingParams(max_tokens=20), seed=0, eos=frozenset(), context=256)
    ended = []
    for sequence in Engine(target, build("none", target)).serve([bad, good]):
        ended.append(sequence)
        with torch.inference_mode():
            for tensor in (*target.cache.keys.values(), *target.cache.values.values()):
                tensor[:, :, 3:20] = float("nan")  # the worst that a broken request can leave to its successor
    assert [s.finish_reason for s in ended] == ["abort", "length"]
    assert good.tokens == plain
