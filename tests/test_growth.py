"""Work and memory of every index by the length of the text, counted in lines of code and in entries, not in seconds."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import selfdraft
from selfdraft.core.commit import commit
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.verify import Result, walk
from selfdraft.drafters import build
from selfdraft.protocols import Drafter, needs_of
from selfdraft.types import Budget, SamplingParams
from tests.models import tiny_target

PACKAGE = str(Path(selfdraft.__file__).parent)
ROOM = Budget(max_nodes=16, max_depth=16, max_probe_depth=16)
STEPS = 20
LENGTHS = (1000, 4000)
OPTIONS: dict[str, dict[str, object]] = {
    "lookup": {},
    "suffix": {},
    "context": {"min_probability": 0.0},
    "recycling": {"min_probability": 0.0},
    "prediction": {"min_probability": 0.0},
    "merged": {"min_probability": 0.0, "memory": 10000},
}


def lines_of(work: Callable[[], object]) -> int:
    """Lines of this package that `work` runs: a loop over the text would show, whatever the machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def text_of(kind: str, length: int, seed: int = 0) -> list[int]:
    if kind == "motif":
        return [place % 13 for place in range(length)]
    if kind == "new":
        return list(range(length))
    return random.Random(seed).choices(range(200), [1 / rank for rank in range(1, 201)], k=length)


def opened(name: str, text: list[int]) -> tuple[Drafter, Sequence]:
    drafter = build(name, tiny_target(), OPTIONS[name])
    told = tuple(text) if needs_of(drafter).prediction else ()
    sampling = SamplingParams(max_tokens=STEPS * 20, prediction=told)
    return drafter, open_sequence(text, sampling, seed=0, eos=frozenset(), context=2**20)


def read(drafter: Drafter, sequence: Sequence) -> None:
    drafter.draft([sequence], [ROOM])
    drafter.observe([sequence], [Result(draft=drafter.draft([sequence], [ROOM])[0])])


def go_on(drafter: Drafter, sequence: Sequence) -> None:
    answers = iter(text_of("zipf", STEPS * 20, seed=1))
    for _ in range(STEPS):
        (draft,) = drafter.draft([sequence], [ROOM])
        path, tokens = walk(draft, lambda node: next(answers))
        result = Result(draft, tuple(path), tuple(tokens), logits=torch.zeros(1 + len(draft), 61))
        commit(sequence, result)
        drafter.observe([sequence], [result])


@pytest.mark.parametrize("kind", ["motif", "zipf", "new"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_costs_the_same_in_every_context(name: str, kind: str) -> None:
    """Four times the text: four times the work of reading it, and no more work in a step behind it."""
    reading, steps = [], []
    for length in LENGTHS:
        drafter, sequence = opened(name, text_of(kind, length))
        reading.append(lines_of(lambda: read(drafter, sequence)))  # noqa: B023
        steps.append(lines_of(lambda: go_on(drafter, sequence)))  # noqa: B023
    assert reading[1] <= 4.3 * reading[0]
    assert steps[1] <= 1.3 * steps[0]
    assert steps[0] > 20 * STEPS


def test_a_loop_over_the_text_would_be_seen() -> None:
    counts = []
    for length in LENGTHS:
        sequence = opened("suffix", text_of("new", length))[1]

        def search(sequence: Sequence = sequence) -> int:
            found = 0
            for token in sequence.tokens:
                found += token == sequence.tokens[-1]
            return found

        search.__code__ = search.__code__.replace(co_filename=PACKAGE)
        counts.append(lines_of(search))
    assert counts[1] > 3.5 * counts[0]
