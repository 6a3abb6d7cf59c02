"""What the papers of the four methods say, beside our own rows of the same kind of text."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from selfdraft.bench.rows import Row
from selfdraft.bench.sheets import Sheet, column_of, speedup, tokens_per_pass


class Published(NamedTuple):
    """A figure of a paper, its code or its README; greedy unless the setting says otherwise."""

    method: str
    column: str
    """Our column with the same kind of text, or the same prompts."""
    task: str
    setting: str
    speedup: str
    tokens_per_pass: str = "-"


PUBLISHED = (
    Published("layer_skip", "cnn-dailymail", "CNN/DailyMail", "LLaMA-2-13B, A100-40G", "1.58"),
    Published("layer_skip", "cnn-dailymail", "CNN/DailyMail", "LLaMA-2-70B, two A100-80G", "1.99"),
    Published("layer_skip", "xsum", "XSum", "LLaMA-2-13B, measured by LayerSkip's authors", "1.48"),
    Published("layer_skip", "humaneval", "HumanEval", "CodeLLaMA-13B", "1.35 to 1.46"),
    Published("lookahead", "mt-bench", "MT-Bench", "LLaMA-2-chat-7B, A100-80G, float16", "1.64"),
    Published("lookahead", "gsm8k", "GSM8K", "CodeLlama-instruct-7B, A100", "1.89"),
    Published("lookahead", "humaneval", "HumanEval", "CodeLlama-7B, A100", "2.25"),
    Published("lookahead", "mbpp", "MBPP", "CodeLlama, A100", "1.75 to 1.87"),
    Published("lookahead", "classeval", "ClassEval", "7B with FlashAttention, A100", "2.7 to 2.8"),
    Published("lookahead", "cnn-dailymail", "CNN/DailyMail", "7B, temperature 1", "1.46", "1.64"),
    Published("space", "humaneval", "HumanEval-X", "LLaMA-2-7B; hardware not said", "3.18", "3.54"),
    Published("space", "xsum", "XSum", "LLaMA-2-7B; hardware not said", "1.94", "2.23"),
    Published("space", "mt-bench", "CIP (chat)", "LLaMA-2-7B; hardware not said", "1.71", "1.85"),
    Published("s3d", "mt-bench", "MT-Bench", "8 bits, A10G: 1.4 to 2 (Phi-3) and up to 3.9 times EAGLE", "-"),
)
"""Sources: arXiv 2309.08168 and its repository (`layer_skip`), 2402.02057 and its README (`lookahead`), 2402.11809
(`space`), 2405.20314 (`s3d`, which gives no speed-up over plain decoding in its abstract)."""
FIGURES = ("speed-up", "tokens per pass")
WORDS = (
    "What differs everywhere: their models have 7 to 70 billion parameters and run on GPUs, where one more row costs "
    "next to nothing. Speed-up by tokens per pass says how much a row costs."
)


def table(sheet: Sheet) -> list[str]:
    """Lines of a page: every published figure for which there are rows. Nothing where there are none."""
    lines = []
    for one in PUBLISHED:
        for label in sheet.labels:
            rows = [row for row in sheet.of(label) if named(label, one.method) and _kind(row) == one.column]
            if rows:
                theirs = f"{one.task}: {one.setting} | {one.speedup} | {one.tokens_per_pass}"
                lines.append(f"| {label} | {theirs} | {_column(rows)} | {_own(rows)} |")
    if not lines:
        return []
    head = ["### Beside the papers", "", WORDS, ""]
    names = ("drafter", "the paper's text, model and hardware", *FIGURES, "here", *FIGURES)
    return [*head, f"| {' | '.join(names)} |", "|---|---|---:|---:|---|---:|---:|", *lines, ""]


def named(label: str, method: str) -> bool:
    """Whether a label is a method's name, alone or with words behind it."""
    return label.split()[:1] == [method]


def _kind(row: Row) -> str:
    """The task of a row; Spec-Bench's groups are tasks of their own."""
    return str(row["group"] or row["task"])


def _column(rows: SequenceOf[Row]) -> str:
    return f"{column_of(rows[0])}, {len(rows)} prompt{'s' if len(rows) > 1 else ''}"


def _own(rows: SequenceOf[Row]) -> str:
    faster = speedup(rows)
    passes = tokens_per_pass(rows)
    return f"{'texts differ' if faster is None else f'{faster:.2f}'} | {'-' if passes is None else f'{passes:.2f}'}"
