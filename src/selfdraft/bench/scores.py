"""How good a text is: ROUGE, the last number, pass@k. The plain text is scored; equal texts have equal scores."""

from __future__ import annotations

import re
from collections.abc import Sequence as SequenceOf
from decimal import Decimal
from math import comb

from selfdraft.errors import OptionError

ROUGES = ("rouge1", "rouge2", "rougeL")
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def rouge(text: str, references: SequenceOf[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stemmer, each the best over the references.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), as computed by `rouge-score`.
    Errors: OptionError when `rouge-score` is missing.
    """
    need_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    found = [scorer.score(reference, text) for reference in references]
    return {name: max(float(one[name].fmeasure) for one in found) for name in ROUGES}


def need_rouge() -> None:
    """Errors: OptionError when `rouge-score` is missing."""
    try:
        import rouge_score  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "summaries are scored by rouge-score, which is missing: pip install 'selfdraft[bench]'"
        ) from error


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separated by commas or not; None without any."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def same_number(text: str, answer: str) -> bool:
    """Whether the last number of a text is the last number of the answer: 8 and 8.00 are the same."""
    said = last_number(text)
    return said is not None and said == last_number(answer)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes, from `passed` of `samples` that did.

    1 - C(samples - passed, k) / C(samples, k): Chen et al. (arXiv 2107.03374), section 2.1. Errors: OptionError
    when k is above `samples`.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise OptionError(f"pass@{k} cannot be told from {passed} of {samples} samples")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def code_of(text: str) -> str | None:
    """The first fenced block of code in an answer; one that was never closed goes to the end. None without a fence."""
    found = FENCE.search(text)
    return found.group(1) if found else None
