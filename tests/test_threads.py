"""Many callers of one `LLM`: threads, streams that are read in turn, abandoned, interrupted, and coroutines.

No outcome depends on which thread comes first: every answer must be the one that the request has alone.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfdraft import LLM, AsyncLLM, SamplingParams, drafters
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.engine.shared import SharedEngine
from selfdraft.errors import EngineError, RequestError, RunnerUnavailable
from selfdraft.llm import Piece
from selfdraft.models.runner import kernel_build
from tests.clocks import Ticking
from tests.models import random_adapters, tiny_llama
from tests.test_llm import TEXTS, model, tokenizer

PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=17, temperature=0.8, seed=5),
    SamplingParams(max_tokens=20, temperature=1.3, top_k=20, seed=6, repetition_penalty=1.2),
    SamplingParams(max_tokens=12, logprobs=2),
]
CALLS = list(itertools.product(TEXTS, PARAMS))
PATIENCE = 300
"""Seconds after which a thread counts as hung; nothing is asserted about how long it takes."""


def door(drafter: str, **options: Any) -> LLM:
    adapters = random_adapters(model())
    return LLM(model(), tokenizer=tokenizer(), drafter=drafter, adapters=adapters, clock=Ticking(0.001), **options)


@cache
def wanted() -> list[tuple[int, ...]]:
    """The answers of CALLS, each alone and without drafts."""
    plain = door("none")
    return [plain.generate(text, params)[0].outputs[0].token_ids for text, params in CALLS]


def together(works: SequenceOf[Callable[[], object]]) -> None:
    """Run all in threads of their own that begin at once; the first error of any is raised here."""
    start, errors = threading.Barrier(len(works)), list[BaseException]()

    def body(work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def read(pieces: SequenceOf[Piece]) -> tuple[int, ...]:
    """Token ids of a whole stream, after a look at its pieces."""
    last = pieces[-1]
    assert last.finish_reason is not None
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == last.output.text
    ids = tuple(token for piece in pieces for token in piece.token_ids)
    assert ids == last.output.token_ids
    return ids


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_threads_have_the_answers_they_have_alone(drafter: str) -> None:
    llm = door(drafter, max_num_seqs=3)
    said: list[tuple[int, ...]] = [()] * len(CALLS)

    def ask(first: int) -> None:
        for number in range(first, len(CALLS), 4):
            text, params = CALLS[number]
            if number % 3:
                said[number] = llm.generate(text, params)[0].outputs[0].token_ids
            else:
                said[number] = read(list(llm.stream(text, params)))

    together([lambda i=i: ask(i) for i in range(4)])  # type: ignore[misc]
    assert said == wanted()
    assert not llm.engine.running
    assert llm.stats.num_output_tokens == sum(map(len, wanted()))


def test_eight_threads_with_aborts_and_errors_among_them() -> None:
    """Streams left early, processors that raise, options of all kinds: the others never notice."""
    llm = door("auto", max_num_seqs=4)
    answers = wanted()

    def broken(_: SequenceOf[int], scores: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    def ask(thread: int) -> None:
        chance = random.Random(thread)
        for _ in range(12):
            number = chance.randrange(len(CALLS))
            text, params = CALLS[number]
            kind = chance.randrange(4)
            if kind == 0:
                stream = llm.stream(text, params)
                next(stream)
                stream.close()  # type: ignore[attr-defined]
            elif kind == 1:
                with pytest.raises(EngineError, match="prompt 0: a logits processor raised ZeroDivisionError: mine"):
                    llm.generate(text, SamplingParams(logits_processors=(broken,)))
            elif kind == 2:
                assert read(list(llm.stream(text, params))) == answers[number]
            else:
                assert llm.generate(text, params)[0].outputs[0].token_ids == answers[number]

    together([lambda i=i: ask(i) for i in range(8)])  # type: ignore[misc]
    assert not llm.engine.running
    assert not llm.engine.waiting
    assert sorted(llm.engine.slots.free) == [0, 1, 2, 3]


def test_a_paused_stream_keeps_its_rest() -> None:
    llm, answers = door("lookup"), wanted()
    stream = llm.stream(*CALLS[0])
    first = next(stream)
    assert llm.generate(*CALLS[1])[0].outputs[0].token_ids == answers[1]
    assert read([first, *stream]) == answers[0]


def test_streams_that_are_read_in_turn() -> None:
    llm = door("suffix", max_num_seqs=2)
    streams = [llm.stream(*call) for call in CALLS[:5]]
    pieces: list[list[Piece]] = [[] for _ in streams]
    for row in itertools.zip_longest(*streams):
        for mine, piece in zip(pieces, row, strict=True):
            mine += [piece] if piece else []
    assert [read(mine) for mine in pieces] == wanted()[:5]


def test_one_slot_is_not_blocked_by_a_stream_that_nobody_reads() -> None:
    llm, answers = door("none", max_num_seqs=1), wanted()
    stream = llm.stream(*CALLS[0])
    first = next(stream)
    assert llm.generate(*CALLS[2])[0].outputs[0].token_ids == answers[2]
    assert read([first, *stream]) == answers[0]


def test_a_stream_that_is_forgotten_frees_its_slot() -> None:
    llm = door("none", max_num_seqs=1)
    next(llm.stream(*CALLS[0]))
    gc.collect()
    assert not llm.engine.running


def test_the_drafter_does_not_change_under_a_request() -> None:
    llm = door("lookup")
    stream = llm.stream(*CALLS[0])
    first = next(stream)
    with pytest.raises(EngineError, match="the drafter cannot be changed while 1 requests run"):
        llm.use("suffix")
    assert read([first, *stream]) == wanted()[0]
    llm.use("suffix")


def test_no_answer_is_asked_for_from_inside_a_step() -> None:
    llm = door("none")

    def asks(_: SequenceOf[int], scores: Tensor) -> Tensor:
        llm.generate("a")
        return scores

    with pytest.raises(EngineError, match="cannot ask the same LLM for another answer"):
        llm.generate("a", SamplingParams(logits_processors=(asks,)))
    assert llm.generate(*CALLS[0])[0].outputs[0].token_ids == wanted()[0]


def nan(_: SequenceOf[int], scores: Tensor) -> Tensor:
    return torch.full_like(scores, torch.nan)


def none(_: SequenceOf[int], scores: Tensor) -> Any:
    return None


def short(_: SequenceOf[int], scores: Tensor) -> Tensor:
    return scores[:-1]


def ban(_: SequenceOf[int], scores: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf)


def stop(_: SequenceOf[int]) -> bool:
    raise KeyError("x")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"logits_processors": (nan,)}, "a logits processor returned NaN"),
    "none": ({"logits_processors": (none,)}, "a logits processor returned NoneType instead of a tensor of"),
    "short": ({"logits_processors": (short,)}, r"a logits processor returned \(299,\) instead"),
    "ban": ({"logits_processors": (ban,)}, "every token is banned here"),
    "stop": ({"stopping_criteria": (stop,)}, "a stopping criterion or the tokenizer raised KeyError"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_request_that_fails_is_named_and_the_others_are_answered(name: str, sampled: bool) -> None:
    options, words = FAULTS[name]
    llm, answers = door("lookup"), wanted()
    bad = SamplingParams(temperature=float(sampled), seed=1, **options)
    batch, params = [CALLS[0][0], TEXTS[1], CALLS[1][0]], [CALLS[0][1], bad, CALLS[1][1]]
    with pytest.raises(EngineError, match=f"prompt 1: {words}") as caught:
        llm.generate(batch, params)
    outputs: Any = caught.value.outputs
    assert outputs[1].error is caught.value
    for said in (outputs, llm.generate(batch, params, return_errors=True)):
        assert [said[i].outputs[0].token_ids for i in (0, 2)] == answers[:2]
        assert (said[1].outputs, type(said[1].error)) == ((), EngineError)
    with pytest.raises(EngineError, match=words):
        list(llm.stream(TEXTS[1], bad))
    assert not llm.engine.running


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_a_stopping_criterion_that_raises_between_two_others_hurts_neither(drafter: str) -> None:
    """The one before it has moved in that step, the one behind it has not, and the drafter was told of neither."""
    llm, answers, seen = door(drafter), wanted(), list[int]()

    def third(_: SequenceOf[int]) -> bool:
        seen.append(1)
        return 1 // (3 - len(seen)) < 0

    bad = SamplingParams(max_tokens=24, stopping_criteria=(third,))
    batch, params = [CALLS[0][0], TEXTS[1], CALLS[1][0]], [CALLS[0][1], bad, CALLS[1][1]]
    said = llm.generate(batch, params, return_errors=True)
    assert [said[i].outputs[0].token_ids for i in (0, 2)] == answers[:2]
    assert "a stopping criterion or the tokenizer raised ZeroDivisionError" in str(said[1].error)
    assert llm.generate(*CALLS[2])[0].outputs[0].token_ids == answers[2]


def test_no_engine_is_made_over_slots_that_are_in_use() -> None:
    """A profile is measured in slot 0: the stream there would go on behind something else."""
    llm = door("lookup")
    stream = llm.stream(*CALLS[0])
    first = next(stream)
    with pytest.raises(EngineError, match="another engine cannot be made while 1 requests run"):
        llm.engine_for("auto")
    assert read([first, *stream]) == wanted()[0]
    llm.engine_for("auto")


def test_wrong_prompts_take_the_place_of_their_answers() -> None:
    llm = door("lookup")
    prompts: list[str | SequenceOf[int]] = ["", CALLS[0][0], [10**6]]
    said = llm.generate(prompts, CALLS[0][1], return_errors=True)
    assert [str(one.error).partition(":")[0] for one in said] == ["prompt 0", "None", "prompt 2"]
    assert isinstance(said[0].error, RequestError)
    assert said[1].outputs[0].token_ids == wanted()[0]


def test_ctrl_c_in_a_step_ends_the_others_with_an_error_and_leaves_a_usable_engine() -> None:
    llm = door("lookup")

    def interrupted(_: SequenceOf[int], scores: Tensor) -> Tensor:
        raise KeyboardInterrupt

    other = llm.stream(*CALLS[0])
    next(other)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", SamplingParams(logits_processors=(interrupted,)))
    with pytest.raises(EngineError, match="interrupted in the thread that ran it"):
        list(other)
    assert not llm.engine.running
    assert llm.generate(*CALLS[1])[0].outputs[0].token_ids == wanted()[1]


def test_a_request_that_was_never_submitted_is_not_waited_for() -> None:
    shared = SharedEngine(door("none").engine)
    with pytest.raises(EngineError, match="it was never submitted"):
        shared.run([stray()])
    steps = shared.engine.generate([stray()])
    next(steps)
    shared.engine.running.clear()
    with pytest.raises(EngineError, match="left the engine without an end"):
        next(steps)


def stray() -> Sequence:
    return open_sequence([3, 4], SamplingParams(), seed=0, eos=frozenset(), context=64)


def test_coroutines_share_the_engine() -> None:
    door_ = AsyncLLM(door("lookup", max_num_seqs=3))

    async def ask(number: int) -> tuple[int, ...]:
        if number % 2:
            return (await door_.generate(*CALLS[number]))[0].outputs[0].token_ids
        return read([piece async for piece in door_.stream(*CALLS[number])])

    async def main() -> list[tuple[int, ...]]:
        return await asyncio.gather(*map(ask, range(len(CALLS))))

    assert asyncio.run(main()) == wanted()
    with pytest.raises(RequestError, match="prompt 0: the prompt is empty"):
        asyncio.run(door_.generate(""))
    door_.close()


def test_a_coroutine_that_is_cancelled_or_left_aborts_its_request() -> None:
    llm = door("none", max_num_seqs=1)
    door_ = AsyncLLM(llm)
    long = SamplingParams(max_tokens=200)

    async def main() -> None:
        async for _ in door_.stream(TEXTS[0], long):
            break
        task = asyncio.create_task(door_.generate(TEXTS[0], long))
        begun = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(begun.set_result, None)
        await begun  # the task runs up to its first await meanwhile
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await door_.generate(*CALLS[0]))[0].outputs[0].token_ids == wanted()[0]

    asyncio.run(main())
    door_.close()
    assert not llm.engine.running


def test_many_that_build_the_kernels_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiler = kernel_build._compiler()
    except RunnerUnavailable as error:
        pytest.skip(str(error))
    (tmp_path / "kernels.cpp").write_text('extern "C" int one() { return 1; }', "utf-8")
    monkeypatch.setattr(kernel_build, "SOURCE", tmp_path / "kernels.cpp")
    place = tmp_path / "cache" / "kernels.so"
    together([lambda: kernel_build._build(compiler, place) for _ in range(4)])
    assert [path.name for path in place.parent.iterdir()] == ["kernels.so"]


def test_two_llms_over_other_models_do_not_wait_for_each_other() -> None:
    mine, other = door("lookup"), LLM(tiny_llama(), drafter="lookup", clock=Ticking(0.001))
    stream = mine.stream(*CALLS[0])
    first = next(stream)
    assert other.generate([3, 4, 5], PARAMS[0])[0].outputs[0].finish_reason == "length"
    assert read([first, *stream]) == wanted()[0]


def test_two_processes_build_the_kernels_at_once(tmp_path: Path) -> None:
    """Both have them afterwards, from one whole file, and nothing else is left in the folder."""
    try:
        kernel_build._compiler()
    except RunnerUnavailable as error:
        pytest.skip(str(error))
    code = "from selfdraft.models.runner import kernel_build; kernel_build.library(); print('built')"
    there = {**os.environ, "SELFDRAFT_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=there
        )
        for _ in range(3)
    ]
    ended = [one.communicate() for one in started]
    assert [out for out, _ in ended] == ["built\n"] * 3, ended
    (kernels,) = (tmp_path / "kernels").glob("*")
    assert kernels.suffix == ".so"
