"""Memory over thousands of short calls: generate, a stream that is left, custom_generate, with every drafter.

python recipes/flat_memory.py [DRAFTER,...] [CALLS]

Prints, for each drafter and way in, by how much the process grew (MB of resident memory) over CALLS calls (1,000)
after as many calls to warm up. The issue's limit is 1 MB.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfdraft
from selfdraft import LLM, SamplingParams
from selfdraft.methods import OPTIONS
from selfdraft.models.pocket import POCKET

PROMPT = "Once upon a time there was a little girl. She had a red ball. One day the red ball"
DRAFTERS = tuple(OPTIONS)
NEW = 4
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Resident memory of this process in MB, after a garbage collection."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def ways(name: str) -> dict[str, Callable[[], object]]:
    """The three ways in, each as one call of a few tokens."""
    llm = LLM(str(POCKET), drafter=name)
    greedy = SamplingParams(max_tokens=NEW)
    model = AutoModelForCausalLM.from_pretrained(POCKET)
    adapters = [POCKET / f"selfdraft_{name}"] if name in ("s3d", "space") else []
    ids = AutoTokenizer.from_pretrained(POCKET)(PROMPT, return_tensors="pt")

    def leave() -> None:
        stream = llm.stream(PROMPT, SamplingParams(max_tokens=64))
        next(stream)
        stream.close()

    def custom() -> object:
        return model.generate(
            **ids,
            max_new_tokens=NEW,
            do_sample=False,
            custom_generate=selfdraft.generate,
            drafter=name,
            adapters=adapters,
        )

    return {"generate": lambda: llm.generate(PROMPT, greedy), "stream left": leave, "custom_generate": custom}


def main() -> None:
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else DRAFTERS
    calls = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    torch.set_num_threads(1)
    print(f"MB grown over {calls:,} calls after {calls:,} calls; pocket model, {NEW} new tokens, one thread")
    for name in names:
        for way, call in ways(name).items():
            for _ in range(calls):
                call()
            before, begin = resident(), time.perf_counter()
            for _ in range(calls):
                call()
            each = (time.perf_counter() - begin) / calls
            print(f"{name:12} {way:16} {resident() - before:+7.2f} MB  {1e3 * each:6.1f} ms a call", flush=True)


if __name__ == "__main__":
    main()
