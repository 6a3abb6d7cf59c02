"""Microseconds of the host's work in a step, by drafter and by the text before it; a pass is nothing here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from tests.host import decoding, still_target

from selfdraft.core import verify
from selfdraft.drafters import NAMES
from selfdraft.types import SamplingParams

LENGTHS = (512, 4096, 16384, 65536)
WARM, STEPS = 4, 40


@contextmanager
def waited_for() -> Iterator[None]:
    """This machine is taken for a device that is waited for: all rows are chosen at once, as on a GPU."""
    here = verify.apart
    verify.apart = lambda logits: True  # type: ignore[assignment]
    try:
        yield
    finally:
        verify.apart = here


def step_microseconds(drafter: str, length: int, sampling: SamplingParams) -> float:
    """The median step behind a text of so many tokens."""
    engine = decoding(still_target("cpu"), drafter, sampling, length)
    found = []
    for number in range(WARM + STEPS):
        began = time.perf_counter()
        engine.advance()
        if number >= WARM:
            found.append(time.perf_counter() - began)
    return 1e6 * median(found)


def host() -> int:
    """A table in Markdown: every drafter, greedy, and some sampled."""
    torch.set_num_threads(1)
    greedy = SamplingParams(max_tokens=4000)
    sampled = SamplingParams(max_tokens=4000, temperature=0.8, top_p=0.9)
    ways = [(name, greedy, name) for name in NAMES] + [
        (name, sampled, f"{name}, sampled") for name in ("none", "merged")
    ]
    print(f"| us a step behind | {' | '.join(f'{length:,}' for length in LENGTHS)} | growth |")
    print(f"|{'---|' * (len(LENGTHS) + 2)}")
    with waited_for():
        for name, sampling, title in ways:
            each = [step_microseconds(name, length, sampling) for length in LENGTHS]
            shown = " | ".join(f"{one:,.0f}" for one in each)
            print(f"| `{title}` | {shown} | {100 * (each[-1] / each[0] - 1):+.0f} % |", flush=True)
    return 0
