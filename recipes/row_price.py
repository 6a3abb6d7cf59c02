"""What masks and a 4-bit copy bring, by what a row costs: `auto` without and with them where passes take given times.

    python -m recipes.row_price                                          # the bundled prompts, some 40 minutes
    python -m recipes.row_price --tasks spec-bench --data-dir DATA --limit 5 --picture row-price.png

The model is real and so is every token; only the clock is not. It stands still but for passes, and a pass of n rows
takes T(n): that of this machine (kept by `selfdraft tune`), and T(1) (1 + c (n - 1)) for several c, the cost of a row.
So no other work disturbs a figure, and the host's own work costs nothing: speeds are what passes allow.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from recipes.task_prompts import options, prompts_of

from selfdraft import LLM, SamplingParams
from selfdraft.bench.charts import PALETTE
from selfdraft.drafting.cost_model import Profile
from selfdraft.tune.machine import profile_of

PLAIN = 0.010
"""Seconds of a pass of one row where its time is given."""
PRICES = (0.0, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25)
"""c: what one more row costs, in passes of one row. A GPU at small batch has 0.01 or less (docs/gpu.md)."""
COPY = 0.4
"""What a pass of a 4-bit copy takes for one row, in whole passes; further rows take what they take there."""
WAYS: dict[str, dict[str, object]] = {
    "auto without masks": {"masks": False, "bits": False},
    "auto with masks": {"masks": True, "bits": False},
    "auto with a 4-bit copy": {"masks": False, "bits": 4},
    "auto unasked": {},
}


class Clock:
    """Seconds that only passes move."""

    def __init__(self) -> None:
        self.now, self.profile = 0.0, line(0.0)

    def __call__(self) -> float:
        return self.now


def line(price: float) -> Profile:
    """T(n) = T(1) (1 + price (n - 1))."""
    return Profile((1, 65), (PLAIN, PLAIN * (1 + 64 * price)), (0.0, 0.0))


@contextmanager
def passes_move(clock: Clock, llm: LLM) -> Iterator[None]:
    """Meanwhile every pass takes what the clock's profile says, wherever its rows are."""
    forward = llm.target.forward

    def timed(rows, short=None):  # type: ignore[no-untyped-def]
        clock.now += clock.profile.at(len(rows)) - (short is not None) * (1 - COPY) * clock.profile.at(1)
        return forward(rows, short)

    llm.target.forward = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        llm.target.forward = forward  # type: ignore[method-assign]


def measured(llm: LLM, clock: Clock, prompts: Sequence[list[int]], given: argparse.Namespace) -> dict[str, object]:
    """Speed against plain decoding behind the first token, and tokens per pass, of each way at one T."""
    found: dict[str, object] = {}
    for way, chosen in WAYS.items():
        engine = llm.engine_for("auto", chosen)
        seconds, passes, tokens, wrong = 0.0, 0, 0, 0
        for number, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=given.max_new_tokens, temperature=given.temperature, seed=number)
            (request,) = llm.requests(prompt, params)
            first = 0.0
            for _ in engine.generate([request]):
                if not first and request.num_output_tokens:
                    first, late = clock.now, request.num_output_tokens
            seconds += clock.now - first
            tokens += request.num_output_tokens - late
            passes += request.stats.num_steps - 1
            wrong += request.output != given.texts[number]
        assert not wrong, f"{way}: {wrong} texts differ from plain decoding"
        speed = tokens * clock.profile.at(1) / seconds
        found[way] = {"speedup": round(speed, 3), "tokens_per_pass": round(tokens / passes, 3)}
    return found


def plain_texts(llm: LLM, prompts: Sequence[list[int]], given: argparse.Namespace) -> list[list[int]]:
    found = []
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=given.max_new_tokens, temperature=given.temperature, seed=number)
        (request,) = llm.requests(prompt, params)
        for _ in llm.engine_for("none").generate([request]):
            pass
        found.append(request.output)
    return found


def drawn(rows: Sequence[dict[str, object]], path: Path, title: str) -> None:
    """Speed-up over the cost of a row, one line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [row for row in rows if row["price"] is not None]
    for colour, way in zip(PALETTE, WAYS, strict=False):
        style = "-" if WAYS[way] else "--"
        heights = [row[way]["speedup"] for row in lines]  # type: ignore[index]
        axes.plot([row["price"] for row in lines], heights, style, marker="o", color=colour, label=way)  # type: ignore[misc]
    axes.axhline(1, color="#6B6B6B", linewidth=0.8)
    axes.set(xlabel="cost of one more row, in plain passes", ylabel="speed against plain decoding", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    clock = Clock()
    llm = LLM(given.model, drafter="none", clock=clock)
    own = profile_of(llm.target)
    prompts = [prompt for group in prompts_of(llm, given).values() for prompt in group]
    given.texts = plain_texts(llm, prompts, given)
    machines = {"this machine": (None, replace(own, per_token=(0.0,) * len(own.rows)))} if own is not None else {}
    machines |= {f"c = {price:g}": (price, line(price)) for price in PRICES}
    rows = []
    with passes_move(clock, llm):
        for name, (price, profile) in machines.items():
            clock.profile = llm.target.profile = profile
            eight = profile.at(8) / profile.at(1)
            row = {"machine": name, "price": price, "T(8)/T(1)": round(eight, 3)}
            rows.append(row | measured(llm, clock, prompts, given))
            print(json.dumps(rows[-1]), flush=True)
    if given.picture is not None:
        what = f"{given.model}, {len(prompts)} prompts of {given.tasks}, temperature {given.temperature:g}"
        drawn(rows, given.picture, what)


if __name__ == "__main__":
    main()
