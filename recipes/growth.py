"""How time and memory of every drafter's index grow with the text: exponents of total time, bytes per token.

    python recipes/growth.py              # contexts of 256 to 65,536 tokens
    python recipes/growth.py --longest 8192

Three texts: the same motif again and again (everything matches), words drawn by Zipf's law (much matches), tokens that
never come again (nothing matches). A prompt of n tokens is read, then STEPS tokens are drafted for and learned. Reading
should take time in proportion to n: exponent 1 (the shortest context is left out: there the first draft is most of it);
a step should not depend on n: exponent 0. Memory is that of Python objects (tracemalloc) after reading, in a run of its
own: measuring it slows the other down.
"""

from __future__ import annotations

import gc
import math
import random
import time
import tracemalloc
from collections.abc import Sequence as SequenceOf
from statistics import median
from typing import Annotated, Any

import torch
import typer

from selfdraft.core.commit import commit
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result, walk
from selfdraft.drafters import build, needs_of
from selfdraft.replay.replay import LogTarget
from selfdraft.types import Budget, SamplingParams

STEPS = 200
NODES = 64
VOCAB = 2000
DRAFTERS: dict[str, dict[str, Any]] = {
    "lookup": {},
    "suffix": {},
    "context": {"min_probability": 0.0},
    "recycling": {"min_probability": 0.0},
    "prediction": {"min_probability": 0.0},
    "merged": {"min_probability": 0.0, "memory": 2**18},
}


def text_of(kind: str, length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    if kind == "motif":
        return [place % 13 for place in range(length)]
    if kind == "new":
        return list(range(length))
    return draw.choices(range(VOCAB), [1 / rank for rank in range(1, VOCAB + 1)], k=length)


def begun(name: str, text: list[int]) -> tuple[Any, Sequence]:
    """A drafter that was handed a prompt, and read it. Memory and prediction are as long as the prompt."""
    drafter = build(name, LogTarget(), DRAFTERS[name])
    if getattr(drafter, "memory", None) is not None:
        drafter.memory.add(text)
    told = {"prediction": tuple(text)} if needs_of(drafter).prediction else {}
    sampling = SamplingParams(max_tokens=STEPS * (1 + NODES), **told)
    sequence = open_sequence(text, sampling, seed=0, eos=frozenset(), context=2**31)
    drafter.draft([sequence], [Budget(NODES, NODES, NODES)])
    drafter.observe([sequence], [Result(Draft())])
    return drafter, sequence


def steps(drafter: Any, sequence: Sequence, rest: SequenceOf[int]) -> list[float]:
    """Seconds of drafting and learning, step by step; the text goes on with `rest`, whatever was drafted."""
    found = []
    answers = iter(rest)
    logits = torch.zeros(1 + NODES, VOCAB)
    for _ in range(STEPS):
        began = time.perf_counter()
        (draft,) = drafter.draft([sequence], [Budget(NODES, NODES, NODES)])
        took = time.perf_counter() - began
        path, tokens = walk(draft, lambda node: next(answers))
        result = Result(draft, tuple(path), tuple(tokens), logits=logits[: 1 + len(draft)])
        commit(sequence, result)
        began = time.perf_counter()
        drafter.observe([sequence], [result])
        found.append(took + time.perf_counter() - began)
    return found


def exponent(sizes: SequenceOf[int], values: SequenceOf[float]) -> float:
    """The slope of the straight line through the logarithms."""
    across, up = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mean = sum(across) / len(across)
    return sum((x - mean) * y for x, y in zip(across, up, strict=True)) / sum((x - mean) ** 2 for x in across)


def measured(name: str, kind: str, length: int, runs: int) -> tuple[float, float, float]:
    """Seconds of reading, seconds of the middle step, bytes."""
    reading, middle = [], []
    begun(name, text_of(kind, 1))
    text, rest = text_of(kind, length), text_of("zipf", STEPS * (1 + NODES), seed=1)
    for _ in range(runs):
        gc.collect()
        began = time.perf_counter()
        drafter, sequence = begun(name, text)
        reading.append(time.perf_counter() - began)
        middle.append(median(steps(drafter, sequence, rest)))
    gc.collect()
    tracemalloc.start()
    drafter, sequence = begun(name, text)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return min(reading), min(middle), used


def main(
    longest: int = 65536,
    shortest: int = 256,
    runs: Annotated[int, typer.Option(help="The quickest of so many runs counts.")] = 3,
) -> None:
    sizes = [size for power in range(4, 21, 2) if shortest <= (size := 2**power) <= longest]
    sizes += [longest] if longest not in sizes else []
    print(f"contexts {sizes}, {STEPS} steps behind each, the quickest of {runs} runs")
    heads = f"{'reading':>8} {'us/token':>9} {'step':>6} {'us/step':>8} {'bytes':>6} {'/token':>7}"
    print(f"{'drafter':11} {'text':6} {heads}")
    for name in DRAFTERS:
        for kind in ("motif", "zipf", "new"):
            found = [measured(name, kind, size, runs) for size in sizes]
            reading, middle, used = (list(column) for column in zip(*found, strict=True))
            print(
                f"{name:11} {kind:6} {exponent(sizes[1:], reading[1:]):8.2f} {1e6 * reading[-1] / sizes[-1]:9.2f} "
                f"{exponent(sizes, middle):6.2f} {1e6 * middle[-1]:8.1f} {exponent(sizes, used):6.2f} "
                f"{used[-1] / sizes[-1]:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
