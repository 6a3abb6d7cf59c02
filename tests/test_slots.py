"""Slots: a request that begins as an earlier one did prefills only the rest, and its text stays what it was."""

from __future__ import annotations

import random

import pytest
import torch

from selfdraft import LLM, SamplingParams
from selfdraft.core.rows import Rows, Span
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY
from selfdraft.drafters import NAMES, build
from selfdraft.engine import scheduler
from selfdraft.engine.engine import Engine
from selfdraft.engine.slots import LEAST, Held, Reuse, Slots, Taken
from selfdraft.errors import MissingMasks
from selfdraft.models.kv_cache import KVCache
from selfdraft.testing import FakeTarget
from selfdraft.types import SamplingParams as Sampling

CHUNK = 4


def held(slots: Slots, tokens: range, owner: str = "a", prompt: int = 0) -> int:
    """A slot that a request of these tokens has left."""
    taken = slots.take([*tokens], None)
    slots.give(taken.slot, Held([*tokens], prompt or len(tokens), owner, taken.slot))
    return taken.slot


def test_a_request_that_goes_on_takes_its_slot() -> None:
    slots = Slots(4, CHUNK, "all")
    short = slots.take([1], None).slot
    long = slots.take([1], None).slot
    slots.give(short, Held([*range(20)], 20, "a", short))
    slots.give(long, Held([*range(30)], 30, "a", long))
    assert slots.take([*range(25), 99, 98], "a") == Taken(long, long, 25)
    assert slots.take([*range(25), 99, 98], "a") == Taken(short, short, 20)
    assert slots.take([*range(25)], "a").count == 0


def test_of_another_conversation_the_common_beginning_is_copied() -> None:
    """All chats begin with the same system message: that must not cost one of them its slot."""
    slots = Slots(3, CHUNK, "all")
    used = held(slots, range(100))
    taken = slots.take([*range(30), 555, 556], "a")
    assert (taken.source, taken.count) == (used, 30)
    assert taken.slot != used
    assert used in slots.held


def test_what_a_running_request_has_prefilled_is_copied() -> None:
    slots = Slots(2, CHUNK, "all")
    first = slots.take([*range(50)], "a").slot
    taken = slots.take([*range(50)], "a", [Held([*range(40)], 50, "a", first)])
    assert taken == Taken(1 - first, first, 40)


def test_at_least_one_token_is_left_to_run() -> None:
    slots = Slots(1, CHUNK, "all")
    held(slots, range(20))
    assert slots.take([*range(20)], "a").count == 19


def test_another_owner_and_none_reuse_nothing() -> None:
    for owner in ("b", None):
        slots = Slots(1, CHUNK, "all")
        held(slots, range(20))
        assert slots.take([*range(20)], owner, [Held([*range(20)], 20, "a", 7)]).count == 0


def test_chunks_of_an_earlier_prompt_alone_where_rows_depend_on_their_pass() -> None:
    slots = Slots(1, CHUNK, "chunks")
    slot = slots.take([1], None).slot
    slots.give(slot, Held([*range(30)], 23, "a", slot))
    assert slots.take([*range(40)], "a").count == 20


def test_a_short_common_beginning_is_not_worth_it() -> None:
    slots = Slots(2, CHUNK, "all")
    used = held(slots, range(LEAST - 1))
    assert slots.take([*range(LEAST - 1), 99], "a") == Taken(1 - used, 1 - used, 0)


def test_without_owners_the_slot_that_was_used_last_is_taken_again() -> None:
    slots = Slots(3, CHUNK)
    slot = slots.take([1], None).slot
    for _ in range(4):
        slots.give(slot, None)
        assert slots.take([1], None).slot == slot


def test_the_slot_that_was_left_longest_ago_is_given_up_first() -> None:
    slots = Slots(2, CHUNK, "all")
    first = held(slots, range(20))
    second = held(slots, range(100, 120))
    assert {first, second} == {0, 1}
    assert slots.take([*range(50, 70)], "a").slot == first


def turns(engine: Engine, owner: str | None, sampling: Sampling) -> list[list[int]]:
    """The answers of a chat of four turns: the next prompt is all that was said and three tokens more."""
    prompt, answers = [3, 1, 4, 1, 5, 9, 2, 6], []
    for turn in range(4):
        sequence = open_sequence(prompt, sampling, seed=5, eos=frozenset(), context=engine.target.max_length)
        engine.submit(sequence, owner=owner)
        while not sequence.finished:
            engine.advance()
        answers.append(sequence.output)
        prompt = [*sequence.tokens, 7, turn, 8]
    return answers


@pytest.mark.parametrize("reuse", ["all", "chunks"])
@pytest.mark.parametrize("name", ["none", "lookup", "merged", "auto", "lookahead", "layer_skip", "recycling"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_chat_has_the_same_text_with_and_without_reuse(name: str, reuse: Reuse, temperature: float) -> None:
    sampling = Sampling(max_tokens=11, temperature=temperature, seed=5)
    texts, rows = [], []
    for owner in (None, "a"):
        target = FakeTarget(slots=2)
        engine = Engine(target, build(name, target), slots=2, chunk=CHUNK, reuse=reuse)
        texts.append(turns(engine, owner, sampling))
        rows.append(sum(target.sizes))
    assert texts[0] == texts[1]
    if name == "none":
        assert rows[1] < rows[0], "fewer rows are run than without"


@pytest.mark.parametrize("name", [*NAMES])
def test_a_real_model_has_the_same_text_with_reuse(name: str) -> None:
    """The fast runner's rows have the same bits in a pass of any size, so what a drafted pass kept is reused, too."""
    llm = LLM("pocket", drafter="none", dtype="bfloat16", max_num_seqs=2, enable_prefix_caching=True)
    plain = LLM("pocket", drafter="none", dtype="bfloat16", max_num_seqs=2)
    try:
        llm.use(name)
    except MissingMasks:
        pytest.skip("no masks in this checkpoint")
    prompt = llm.encode("Once upon a time there was a little dog.")
    for turn in range(3):
        sampling = SamplingParams(max_tokens=24, temperature=0.7 * (turn % 2), seed=3)
        said = llm.generate([prompt], sampling)[0].outputs[0]
        assert said.token_ids == plain.generate([prompt], sampling)[0].outputs[0].token_ids
        prompt = [*prompt, *said.token_ids, *llm.encode(" And then")]
    assert llm.engine.slots.held
    assert not plain.engine.slots.held


def test_random_requests_of_two_owners() -> None:
    """Many requests that share beginnings, some aborted at any step: each text is the one that it has alone."""
    draw = random.Random(0)
    target = FakeTarget(slots=3)
    engine = Engine(target, build("merged", target), slots=3, chunk=CHUNK, reuse="all")
    alone = FakeTarget(slots=1)
    lone = Engine(alone, build("none", alone), chunk=CHUNK)
    stem = [draw.randrange(40) for _ in range(40)]
    running: list[Sequence] = []
    for number in range(120):
        prompt = [*stem[: draw.randrange(1, 40)], *[draw.randrange(40) for _ in range(draw.randrange(4))]]
        sequence = open_sequence(prompt, Sampling(max_tokens=9), seed=1, eos=frozenset({0}), context=160)
        engine.submit(sequence, owner=draw.choice(["a", "b", None]))
        running.append(sequence)
        for _ in range(draw.randrange(6)):
            engine.advance()
        if number % 7 == 0:
            engine.abort(draw.choice(running))
    while engine.running or engine.waiting:
        engine.advance()
    assert sorted(engine.slots.free) == [0, 1, 2]
    for sequence in running:
        same = open_sequence(
            sequence.tokens[: sequence.prompt_length], Sampling(max_tokens=9), seed=1, eos=frozenset({0}), context=160
        )
        lone.submit(same)
        while not same.finished:
            lone.advance()
        assert sequence.output == same.output[: sequence.num_output_tokens]


@pytest.mark.parametrize("reuse", ["all", "chunks"])
@pytest.mark.parametrize("name", ["none", "merged", "auto"])
def test_several_answers_to_one_prompt_prefill_it_once(name: str, reuse: Reuse) -> None:
    prompt, sampling = [*range(1, 31)], Sampling(max_tokens=9, temperature=0.9)
    texts, rows = [], []
    for owner in (None, "a"):
        target = FakeTarget(slots=5)
        engine = Engine(target, build(name, target), slots=5, chunk=CHUNK, reuse=reuse)
        answers = [open_sequence(prompt, sampling, seed=i, eos=frozenset(), context=99) for i in range(4)]
        stranger = open_sequence([5, 6], sampling, seed=0, eos=frozenset(), context=99)
        for one in answers:
            engine.submit(one, owner=owner)
        engine.submit(stranger, owner=owner)
        engine.advance()
        assert stranger in engine.running, "who waits for another's prompt lets others pass"
        while engine.running or engine.waiting:
            engine.advance()
        texts.append([one.output for one in answers])
        rows.append(sum(target.sizes))
        shared = [one.stats.num_cached_tokens for one in answers]
        assert shared == ([0] * 4 if owner is None else [0, 24, 24, 24]), "less than LEAST is not waited for"
    assert texts[0] == texts[1]
    if name == "none":
        assert rows[0] - rows[1] == 3 * 24


def test_who_waits_for_a_prompt_that_ends_early_reads_it_alone() -> None:
    target = FakeTarget(slots=3)
    engine = Engine(target, build("none", target), slots=3, chunk=CHUNK, reuse="all")
    first, second = (
        open_sequence([*range(1, 31)], Sampling(max_tokens=3), seed=0, eos=frozenset(), context=99) for _ in range(2)
    )
    engine.submit(first, owner="a")
    engine.submit(second, owner="a")
    engine.advance()
    assert (engine.running, [*engine.waiting]) == ([first], [second])
    engine.abort(first)
    engine.advance()
    assert engine.running == [second]
    while engine.running:
        engine.advance()
    assert len(second.output) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_n_answers_of_a_real_model_share_their_prompt_and_leave_nothing(dtype: str) -> None:
    llm = LLM("pocket", drafter="auto", dtype=dtype, max_num_seqs=4)
    prompt = llm.encode("Once upon a time there was a little dog. " * 3)
    several = llm.generate([prompt], SamplingParams(max_tokens=16, temperature=0.8, seed=7, n=3))[0].outputs
    alone = [
        llm.generate([prompt], SamplingParams(max_tokens=16, temperature=0.8, seed=7 + i))[0].outputs[0]
        for i in range(3)
    ]
    assert [one.token_ids for one in several] == [one.token_ids for one in alone]
    if llm.target.rows_independent:
        assert [one.stats.num_cached_tokens for one in several] == [0, len(prompt) - 1, len(prompt) - 1]
    assert not llm.engine.slots.held


def test_one_that_failed_leaves_nothing() -> None:
    target = FakeTarget()
    engine = Engine(target, build("none", target), reuse="all")
    sequence = open_sequence([*range(1, 20)], Sampling(max_tokens=4), seed=0, eos=frozenset(), context=64)
    engine.submit(sequence, owner="a")
    engine.advance()
    engine.fail(sequence)
    assert engine.slots.free
    assert not engine.slots.held


def test_steps_of_several_drafters_take_turns() -> None:
    target = FakeTarget(slots=4)
    one, other = build("none", target), build("merged", target)
    engine = Engine(target, one, slots=4)
    requests = [open_sequence([i + 1], Sampling(max_tokens=6), seed=0, eos=frozenset(), context=99) for i in range(4)]
    for number, sequence in enumerate(requests):
        engine.submit(sequence, drafter=other if number % 2 else None)
    seen = []
    while engine.running or engine.waiting:
        moved = [sequence for sequence, _ in engine.advance()]
        seen.append({requests.index(sequence) % 2 for sequence in moved})
    assert all(len(kinds) == 1 for kinds in seen), "a step has one drafter"
    assert seen[:4] in ([{0}, {1}, {0}, {1}], [{1}, {0}, {1}, {0}])
    assert scheduler.next_group(requests, dict.fromkeys(requests, one), other) == requests


def test_a_copy_over_a_slot_that_a_broken_request_left_has_no_nan() -> None:
    cache = KVCache(2, 64)
    rows = torch.ones(1, 20, 4)
    cache.write(0, 0, 0, rows, rows)
    cache.write(0, 1, 0, torch.full((1, 30, 4), float("nan")), torch.full((1, 30, 4), float("nan")))
    cache.copy(1, 0, 12)
    for tensor in (cache.keys[0], cache.values[0]):
        assert torch.equal(tensor[1, :, :12], torch.ones(1, 12, 4))
        assert not tensor[1, :, 12:].any()


def test_what_an_earlier_request_drafted_in_a_slot_is_no_state_of_the_next_one() -> None:
    """Hidden states that a layer-skip draft left, by a step that failed, at the place where the next request begins."""
    llm = LLM("pocket", drafter="layer_skip", dtype="float32", max_num_seqs=2, enable_prefix_caching=True)
    target = llm.target
    target._early.note(rows_of(0, 20, 5), torch.zeros(1, int(target.config.hidden_size)), 2)
    assert target._early.trails
    target.reuse(0, 0, 20)
    assert not target._early.trails


def rows_of(slot: int, base: int, token: int) -> Rows:
    return Rows((token,), (base,), (Span(slot, base, 0, 1, EMPTY, 1),), (0,))
