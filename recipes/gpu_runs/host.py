"""Microseconds of the host's work in a step, by drafter and by the text before it; a pass is nothing here.

They are time of the processor, which nothing is waited for here: what else runs on the machine is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from tests.host import OPTIONS, decoding, still_target

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


def step_microseconds(drafter: str, options: dict[str, object], sampling: SamplingParams) -> list[float]:
    """The median step behind a text of each length. They take turns: what else the machine does meets all of them."""
    engines = [decoding(still_target("cpu"), drafter, sampling, length, options) for length in LENGTHS]
    found: list[list[float]] = [[] for _ in engines]
    for number in range(WARM + STEPS):
        for engine, seconds in zip(engines, found, strict=True):
            began = time.process_time()
            engine.advance()
            if number >= WARM:
                seconds.append(time.process_time() - began)
    return [1e6 * median(seconds) for seconds in found]


def host() -> int:
    """A table in Markdown: every drafter greedy, two of them sampled, and what the longest text adds."""
    torch.set_num_threads(1)
    greedy = SamplingParams(max_tokens=4000)
    # so cold that all texts are said alike: noise depends on the place, and so would the work
    sampled = SamplingParams(max_tokens=4000, temperature=0.05, top_p=0.9)
    ways = [(name, OPTIONS.get(name, {}), greedy, _title(name)) for name in NAMES]
    bare: dict[str, dict[str, object]] = {"merged": {"masks": False}, "auto": {"masks": False, "bits": False}}
    ways += [(name, options, greedy, f"`{name}` without masks") for name, options in bare.items()]
    ways += [(name, OPTIONS.get(name, {}), sampled, f"{_title(name)}, sampled") for name in ("none", "merged")]
    print(f"| us a step behind | {' | '.join(f'{length:,}' for length in LENGTHS)} | growth |")
    print(f"|{'---|' * (len(LENGTHS) + 2)}")
    with waited_for():
        for name, options, sampling, title in ways:
            each = step_microseconds(name, options, sampling)
            shown = " | ".join(f"{one:,.0f}" for one in each)
            print(f"| {title} | {shown} | {100 * (each[-1] / each[0] - 1):+.0f} % |", flush=True)
    return 0


def _title(name: str) -> str:
    return f"`{name}` with masks" if OPTIONS.get(name, {}).get("masks") else f"`{name}`"
