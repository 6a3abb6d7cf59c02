"""A text inside this package for measuring perplexity: sums in words with their solutions, and Python functions."""

from __future__ import annotations

from itertools import chain, zip_longest

from selfdraft.bench.tasks import find_records

NAME = "GSM8K and HumanEval in turns, from this package"
"""What it is, in the words that stand beside a figure."""


def sample_text() -> str:
    """GSM8K's test questions with their answers and HumanEval's functions whole, in turns (both MIT, OpenAI).

    About 300,000 tokens; from the 165th question on there are only sums.
    """
    sums = (f"{record['question']}\n{record['answer']}" for _, record in find_records("gsm8k", None))
    code = (f"{record['prompt']}{record['canonical_solution']}" for _, record in find_records("humaneval", None))
    return "\n\n".join(text for text in chain.from_iterable(zip_longest(sums, code)) if text is not None)
