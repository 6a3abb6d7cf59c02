"""Is drafting ever slower than plain decoding in a batch? The prompts of the tasks, so many at a time.

    python -m recipes.batches --tasks spec-bench --data-dir DATA --limit 8

Plain decoding and each way to draft answer the same batches in turns, in one process; ratios of their times by group of
tasks and by size of the batch, medians of all runs of a batch, texts compared. Plain decoding is there twice: how far
the ratio of its second time is from 1 says what a ratio is worth. Exit code 1 where a text differs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from recipes.task_prompts import options, prompts_of

from selfdraft import LLM, SamplingParams
from selfdraft.engine.engine import Engine

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("none", {}),
    "plain again": ("none", {}),
    "auto": ("auto", {}),
    "auto without a copy": ("auto", {"bits": False}),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are answered at once."""

    prompts: SequenceOf[list[int]]
    params: SamplingParams
    runs: int
    """Times that each way answers it."""
    number: int


def answered(llm: LLM, engine: Engine, batch: Batch) -> tuple[float, object]:
    """Seconds, and the tokens of every answer."""
    requests = [one for prompt in batch.prompts for one in llm.requests(prompt, batch.params)]
    began = time.perf_counter()
    for _ in engine.generate(requests):
        pass
    return time.perf_counter() - began, [request.output for request in requests]


def timed(llm: LLM, engines: Mapping[str, Engine], batch: Batch) -> tuple[dict[str, float], int]:
    """Median seconds of every way, which take turns to be first; and how many answers of them differ from the plain."""
    took, ways, wrong = defaultdict[str, list[float]](list), list(engines), 0
    for run in range(batch.runs):
        turn, texts = (batch.number + run) % len(ways), dict[str, object]()
        for way in ways[turn:] + ways[:turn]:
            seconds, texts[way] = answered(llm, engines[way], batch)
            took[way].append(seconds)
        wrong += sum(texts[way] != texts["plain"] for way in ways)
    return {way: statistics.median(each) for way, each in took.items()}, wrong


def told(size: int, group: str, seconds: Mapping[str, float]) -> None:
    ratios = {way: round(seconds["plain"] / each, 3) for way, each in seconds.items() if way != "plain"}
    row = {"at a time": size, "group": group, "plain seconds": round(seconds["plain"], 2)} | ratios
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", default="1,4,16", help="requests at a time")
    parser.add_argument("--runs", type=int, default=1, help="times that each way answers a batch")
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    llm = LLM(given.model, drafter="none", max_num_seqs=max(sizes))
    groups, wrong = prompts_of(llm, given), 0
    for size in sizes:
        engines = {way: llm.engine_for(*how) for way, how in WAYS.items()}
        first_ones = next(iter(groups.values()))[:size]
        timed(llm, engines, Batch(first_ones, SamplingParams(max_tokens=given.max_new_tokens), 1, 0))  # warm-up
        total = Counter[str]()
        for group, prompts in groups.items():
            seconds = Counter[str]()
            for first in range(0, len(prompts), size):
                params = SamplingParams(max_tokens=given.max_new_tokens, temperature=given.temperature, seed=first)
                batch = Batch(prompts[first : first + size], params, given.runs, first // size)
                medians, differ = timed(llm, engines, batch)
                seconds.update(medians)
                wrong += differ
            told(size, group, seconds)
            total.update(seconds)
        told(size, "all", total)
    print(json.dumps({"answers of batches that differ": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
