"""Host work of a step does not grow with the text before it: lines and bytes are counted, no clock is read."""

from __future__ import annotations

import os
from dataclasses import replace
from statistics import median

import pytest

from selfdraft.drafters import NAMES
from selfdraft.types import SamplingParams
from tests.far import FAR, Noted, watching
from tests.host import Work, decoding, still_target, work_of

GREEDY = SamplingParams(max_tokens=100)
SAMPLED = replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9)
SHORT = 512
LONG = 65_536 if os.environ.get("SELFDRAFT_TEST_GRAPHS") == "all" else 16_384
WARM, COUNTED = 3, 5
MORE = 1.2
"""Most that a long text may add."""
ROUNDING = 2048
"""Bytes: what a list or a table that grows takes now and then."""


def work(drafter: str, sampling: SamplingParams, length: int) -> Work:
    """The median of some steps behind so many tokens."""
    engine = decoding(still_target(FAR), drafter, sampling, length)
    with watching(Noted()):
        for _ in range(WARM):
            engine.advance()
        found = [work_of(engine.advance) for _ in range(COUNTED)]
    return Work(round(median(one.lines for one in found)), round(median(one.bytes for one in found)))


@pytest.mark.parametrize(
    ("drafter", "sampling"),
    [*((name, GREEDY) for name in NAMES), *((name, SAMPLED) for name in ("none", "lookahead", "merged", "s3d"))],
    ids=lambda given: given if isinstance(given, str) else "greedy" if given.greedy else "sampled",
)
def test_a_step_does_no_more_behind_a_long_text(drafter: str, sampling: SamplingParams) -> None:
    short, long = work(drafter, sampling, SHORT), work(drafter, sampling, LONG)
    assert long.lines <= MORE * short.lines, f"{drafter}: {short} behind {SHORT} tokens, {long} behind {LONG}"
    assert long.bytes <= MORE * short.bytes + ROUNDING, (
        f"{drafter}: {short} behind {SHORT} tokens, {long} behind {LONG}"
    )


def test_the_count_sees_a_text_that_is_copied_or_read() -> None:
    engine = decoding(still_target(FAR), "none", GREEDY, SHORT)
    tokens = list(range(10_000))
    copied = work_of(lambda: tokens[:])
    assert copied.bytes >= 8 * len(tokens)
    lines = work_of(lambda: engine.running[0].output).lines
    assert lines >= 1
