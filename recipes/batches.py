"""Is drafting ever slower than plain decoding in a batch? The prompts of the tasks, so many at a time.

    python -m recipes.batches --tasks spec-bench --data-dir DATA --limit 8

Plain decoding and each way to draft answer the same batches in turns, in one process; ratios of their times by group of
tasks and by size of the batch, texts compared. Exit code 1 where a text differs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from recipes.task_prompts import options, prompts_of

from selfdraft import LLM, SamplingParams
from selfdraft.engine.engine import Engine

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("none", {}),
    "auto": ("auto", {}),
    "auto without a copy": ("auto", {"bits": False}),
}


def answered(llm: LLM, engine: Engine, prompts: SequenceOf[list[int]], params: SamplingParams) -> tuple[float, object]:
    """Seconds, and the tokens of every answer."""
    requests = [one for prompt in prompts for one in llm.requests(prompt, params)]
    began = time.perf_counter()
    for _ in engine.generate(requests):
        pass
    return time.perf_counter() - began, [request.output for request in requests]


def told(size: int, group: str, seconds: Mapping[str, float]) -> None:
    ratios = {way: round(seconds["plain"] / each, 3) for way, each in seconds.items() if way != "plain"}
    row = {"at a time": size, "group": group, "plain seconds": round(seconds["plain"], 2)} | ratios
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", default="1,4,16", help="requests at a time")
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    llm = LLM(given.model, drafter="none", max_num_seqs=max(sizes))
    groups, wrong = prompts_of(llm, given), 0
    for size in sizes:
        engines = {way: llm.engine_for(*how) for way, how in WAYS.items()}
        total = dict.fromkeys(WAYS, 0.0)
        for group, prompts in groups.items():
            seconds = dict.fromkeys(WAYS, 0.0)
            for number, first in enumerate(range(0, len(prompts), size)):
                params = SamplingParams(max_tokens=given.max_new_tokens, temperature=given.temperature, seed=first)
                texts = {}
                for way in (WAYS, reversed(WAYS))[number % 2]:
                    took, texts[way] = answered(llm, engines[way], prompts[first : first + size], params)
                    seconds[way] += took
                wrong += sum(texts[way] != texts["plain"] for way in WAYS)
            told(size, group, seconds)
            total = {way: total[way] + seconds[way] for way in WAYS}
        told(size, "all", total)
    print(json.dumps({"batches whose texts differ": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
