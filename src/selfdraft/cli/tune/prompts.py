"""The prompts that a drafter is tuned on: their options, and those that are built in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli.options import SAMPLE_PROMPTS, encode_all, repeatable
from selfdraft.types import SamplingParams, within

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.llm import LLM

PROMPTS = (
    *SAMPLE_PROMPTS,
    "The old man looked at the sea and",
    "import os\nimport sys\n\n\ndef main():\n",
    "### Instruction:\nWrite a short poem about rain.\n\n### Response:\n",
    "Question: A train travels 60 miles in 2 hours. How fast is it?\nAnswer:",
    "class Stack:\n    def __init__(self):\n",
)
"""Stories, code, instructions and sums, when no prompts are given."""

Prompts = Annotated[
    Path | None, typer.Option(help="A jsonl file with prompt, turns, question or text in each line; some are built in.")
]
Limit = Annotated[int | None, typer.Option(help="Take at most this many prompts.", min=1)]
InTemplate = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the checkpoint's chat template.")]
OwnTokens = Annotated[int, typer.Option(help="Tokens of the model's own text for each prompt.")]
Temperature = Annotated[float, typer.Option(help="The own text is sampled at this; 0 is greedy.")]
Runs = Annotated[int, typer.Option(help="Timed runs of each prompt, in alternation with plain decoding.")]


def read_prompts(prompts: Path | None, limit: int | None) -> list[str]:
    """The prompts of the file, or those that are built in. Errors: RequestError."""
    from selfdraft.files import records

    return list(PROMPTS[:limit]) if prompts is None else records.read_prompts(prompts, limit)


def sampling_of(max_new_tokens: int, temperature: float, seed: int) -> SamplingParams:
    """How the own text is sampled. Errors: OptionError names the option and its limits."""
    within("seed", seed, 0, 2**62)
    within("max_new_tokens", max_new_tokens, 4, 2**20)
    within("temperature", temperature, 0.0, 100.0)
    return SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=seed)


def requests_of(llm: LLM, texts: list[str], chat: bool, sampling: SamplingParams) -> list[Callable[[], Request]]:
    """Makers of one request for each prompt, all with the same seed."""
    seed = sampling.seed or 0
    return [repeatable(llm, sampling, seed, ids) for ids in encode_all(llm, texts, chat, sampling)]


def output_of(output: Path | None, method: str, model: str) -> Path:
    """The file for the result: the one given, or METHOD-MODEL.json here."""
    return output or Path(f"{method}-{Path(model).name}.json")
