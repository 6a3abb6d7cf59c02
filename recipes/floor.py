"""Is `auto` ever slower than plain decoding? Text that nobody can guess, drafts that are always wrong, full batches.

python recipes/floor.py [--model pocket] [--tokens 2000] [--runs 3]

Plain and drafted runs take turns in one process; the ratio of the medians of their times, texts compared.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from statistics import median

import torch

from selfdraft import LLM, SamplingParams
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.drafters.auto import Auto
from selfdraft.engine.loop import Engine
from selfdraft.models.stock import quiet
from selfdraft.types import Budget

LINES = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return ",
    "Once upon a time there was a little girl who lived in a village near the forest. She ",
    "Question: Tom has 3 apples and buys 5 more. How many apples does he have?\nAnswer:",
    "Translate English to French: The weather is fine today.\nFrench:",
)


class Wrong(Auto):
    """`auto` whose every draft is wrong: the same tree, each token one further."""

    vocab = 0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts = super().draft(sequences, budgets)
        return [replace(draft, tokens=tuple((t + 1) % self.vocab for t in draft.tokens)) for draft in drafts]


def timed(
    llm: LLM, engine: Engine, prompts: list[list[int]], sampling: SamplingParams
) -> tuple[float, list[list[int]]]:
    """Seconds of all prompts at once, and what was said."""
    sequences = [llm.requests(ids, replace(sampling, seed=number))[0] for number, ids in enumerate(prompts)]
    began = time.perf_counter()
    for _ in engine.generate(sequences):
        pass
    return time.perf_counter() - began, [sequence.output for sequence in sequences]


def compare(
    name: str, llm: LLM, drafted: Engine, prompts: list[list[int]], sampling: SamplingParams, runs: int
) -> None:
    plain = llm.engine_for("none")
    timed(llm, plain, prompts, replace(sampling, max_tokens=64))
    times: list[list[float]] = [[], []]
    for run in range(runs):
        texts = {}
        for which in (0, 1) if run % 2 == 0 else (1, 0):
            seconds, texts[which] = timed(llm, (plain, drafted)[which], prompts, sampling)
            times[which].append(seconds)
        assert texts[0] == texts[1], f"{name}: the texts differ"
    count = len(prompts) * sampling.max_tokens
    first, later = median(times[0]), median(times[1])
    print(
        f"{name}: plain {count / first:.0f} tokens/s, drafted {count / later:.0f}: {first / later:.3f}x "
        f"(runs {', '.join(f'{a / b:.3f}' for a, b in zip(*times, strict=True))}); texts equal",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    quiet()
    llm = LLM(given.model, dtype="bfloat16", max_num_seqs=16)
    print(f"{given.model}, bfloat16, runner {llm.target.runs}, {torch.get_num_threads()} threads")
    draw = random.Random(0)
    noise = [[draw.randrange(llm.target.vocab) for _ in range(32)]]
    size = min(given.tokens, llm.target.context - 33)
    hot = SamplingParams(temperature=1.5, max_tokens=size, ignore_eos=True)
    for run in range(1, given.runs + 1):  # a fresh engine has nothing learned yet: its first request is the worst
        compare(f"random tokens, temperature 1.5, engine {run}", llm, llm.engine_for("auto"), noise, hot, 1)
    compare("the same, one engine", llm, llm.engine_for("auto"), noise, hot, given.runs)
    Wrong.vocab = llm.target.vocab
    for run in range(1, given.runs + 1):
        wrong = Engine(llm.target, Wrong(llm.target), slots=16)
        text = [llm.encode(LINES[0])]
        compare(f"always wrong, engine {run}", llm, wrong, text, replace(hot, temperature=0.0), 1)
    for batch in (1, 4, 16):
        prompts = [llm.encode(LINES[number % len(LINES)] + " " * (number // len(LINES))) for number in range(batch)]
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(temperature=temperature, max_tokens=256, ignore_eos=True)
            name = f"batch {batch}, temperature {temperature:.0f}"
            compare(name, llm, llm.engine_for("auto"), prompts, sampling, given.runs)


if __name__ == "__main__":
    main()
