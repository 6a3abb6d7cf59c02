"""Is `auto` ever slower than plain decoding? Text that nobody can guess, drafts that are always wrong, full batches.

python recipes/floor.py [--model pocket] [--tokens 2000] [--runs 3]

Plain and drafted decoding take turns every few tokens in one process; the ratio of their times, texts compared.
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
from selfdraft.engine.engine import Engine
from selfdraft.models.reference import quiet
from selfdraft.types import Budget

LINES = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return ",
    "Once upon a time there was a little girl who lived in a village near the forest. She ",
    "Question: Tom has 3 apples and buys 5 more. How many apples does he have?\nAnswer:",
    "Translate English to French: The weather is fine today.\nFrench:",
)


BLOCK = 16
"""Tokens after which it is the other side's turn."""


class Wrong(Auto):
    """`auto` whose every draft is wrong: the same tree, each token one further."""

    vocab = 0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts = super().draft(sequences, budgets)
        return [replace(draft, tokens=tuple((t + 1) % self.vocab for t in draft.tokens)) for draft in drafts]


class Side:
    """One of the two that race, over a memory of its own."""

    def __init__(self, llm: LLM, engine: Engine) -> None:
        self.llm, self.engine = llm, engine
        self.seconds = 0.0

    def start(self, prompts: list[list[int]], sampling: SamplingParams) -> None:
        self.seconds = 0.0
        self.sequences = [self.llm.requests(ids, replace(sampling, seed=i))[0] for i, ids in enumerate(prompts)]
        for sequence in self.sequences:
            self.engine.submit(sequence)

    def run(self, tokens: int) -> None:
        """On until so many tokens are there, on average."""
        began = time.perf_counter()
        while self.said < tokens * len(self.sequences) and not self.ended:
            self.engine.advance()
        self.seconds += time.perf_counter() - began

    @property
    def said(self) -> int:
        return sum(sequence.num_output_tokens for sequence in self.sequences)

    @property
    def ended(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)


def race(name: str, plain: Side, drafted: Side, prompts: list[list[int]], sampling: SamplingParams, runs: int) -> None:
    """Both sides take turns every BLOCK tokens, so that whatever disturbs the machine disturbs both."""
    ratios, rates = [], []
    for run in range(runs):
        sides = [plain, drafted][:: -1 if run % 2 else 1]
        for side in sides:
            side.start(prompts, sampling)
        for tokens in range(BLOCK, sampling.max_tokens + BLOCK, BLOCK):
            for side in sides:
                side.run(tokens)
        texts = [[sequence.output for sequence in side.sequences] for side in sides]
        assert texts[0] == texts[1], f"{name}: the texts differ"
        ratios.append(plain.seconds / drafted.seconds)
        rates.append(plain.said / plain.seconds)
    found = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"{name}: {median(ratios):.3f}x plain ({found}; plain {median(rates):.0f} tokens/s); texts equal", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    quiet()
    llm = LLM(given.model, dtype="bfloat16", max_num_seqs=16)
    other = LLM(given.model, dtype="bfloat16", drafter="none", max_num_seqs=16)
    print(f"{given.model}, bfloat16, runner {llm.target.runs}, {torch.get_num_threads()} threads")
    plain = Side(other, other.engine)
    draw = random.Random(0)
    noise = [[draw.randrange(llm.target.vocab) for _ in range(32)]]
    size = min(given.tokens, llm.target.context - 33)
    hot = SamplingParams(temperature=1.5, max_tokens=size, ignore_eos=True)
    race("warm-up", plain, Side(llm, llm.engine_for("auto")), noise, replace(hot, max_tokens=256), 1)
    for number in range(1, given.runs + 1):  # a fresh engine has learned nothing yet: its first request is the worst
        fresh = Side(llm, llm.engine_for("auto"))
        race(f"random tokens, temperature 1.5, fresh engine {number}", plain, fresh, noise, hot, 1)
    Wrong.vocab = llm.target.vocab
    for number in range(1, given.runs + 1):
        wrong = Side(llm, Engine(llm.target, Wrong(llm.target), slots=16))
        greedy = replace(hot, temperature=0.0)
        race(f"always wrong, fresh engine {number}", plain, wrong, [llm.encode(LINES[0])], greedy, 1)
    for batch in (1, 4, 16):
        prompts = [llm.encode(LINES[number % len(LINES)] + " " * (number // len(LINES))) for number in range(batch)]
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(temperature=temperature, max_tokens=256, ignore_eos=True)
            name = f"batch {batch}, temperature {temperature:.0f}"
            race(name, plain, Side(llm, llm.engine_for("auto")), prompts, sampling, given.runs)


if __name__ == "__main__":
    main()
