"""Is drafting ever slower than plain decoding in a batch? The prompts of the tasks, so many at a time.

    python recipes/batches.py --tasks spec-bench --data-dir DATA --limit 8

Plain decoding and each way to draft answer the same batches in turns, in one process; ratios of their times by group of
tasks and by size of the batch, texts compared. Exit code 1 where a text differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from selfdraft import LLM, SamplingParams
from selfdraft.bench.tasks import load, names_of

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("none", {}),
    "auto": ("auto", {}),
    "auto without a copy": ("auto", {"bits": False}),
}


def prompts_of(llm: LLM, given: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of the first turns in the chat template, by group."""
    found = defaultdict(list)
    for name in names_of(given.tasks):
        for item in load(name, given.data_dir, chat=True, limit=given.limit):
            group = f"{name}/{item.group}" if item.group else name
            found[group].append(llm.render([{"role": "user", "content": item.turns[0]}]))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default="quick", help="names as 'selfdraft bench' has them")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, help="prompts of each task or group")
    parser.add_argument("--sizes", default="1,4,16", help="requests at a time")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
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
                    requests = [one for prompt in prompts[first : first + size] for one in llm.requests(prompt, params)]
                    began = time.perf_counter()
                    for _ in engines[way].generate(requests):
                        pass
                    seconds[way] += time.perf_counter() - began
                    texts[way] = [request.output for request in requests]
                wrong += sum(texts[way] != texts["plain"] for way in WAYS)
            total = {way: total[way] + seconds[way] for way in WAYS}
            told(size, group, seconds)
        told(size, "all", total)
    print(json.dumps({"batches whose texts differ": wrong}))
    sys.exit(bool(wrong))


def told(size: int, group: str, seconds: dict[str, float]) -> None:
    ratios = {way: round(seconds["plain"] / each, 3) for way, each in seconds.items() if way != "plain"}
    print(
        json.dumps({"at a time": size, "group": group, "plain seconds": round(seconds["plain"], 2)} | ratios),
        flush=True,
    )


if __name__ == "__main__":
    main()
