"""What the pocket model says, as it was written down once; `python -m tests.golden` writes it anew, if that is meant.

float64 on the plain path: another processor, thread number or torch moves logits by some 1e-14 there, and nothing short
of an exact tie is decided by that. The texts also hold when logits are moved by 1e-3, which `main` tries, so that
float32 with any kernels must say them, too. bfloat16 is left out: its steps are larger than many gaps between logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.models.load import load_model, load_tokenizer
from selfdraft.models.pocket import POCKET
from selfdraft.models.target import HFTarget
from selfdraft.types import PassVariant, SamplingParams
from tests.clocks import on_passes
from tests.models import run

PLACE = Path(__file__).with_name("golden.json")
PROMPTS = ("Once upon a time", "def fibonacci(n):\n", "The capital of France is")
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=48, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=48, ignore_eos=True, temperature=0.8, top_p=0.95, seed=1),
}
MOVED = 1e-3
"""Logits may be off by so much, and the texts stay."""


class Golden(TypedDict):
    """A prompt, its token ids, and by the name of a sampling the ids and the text of the answer."""

    prompt: str
    ids: list[int]
    said: dict[str, list[int]]
    text: dict[str, str]


def golden() -> list[Golden]:
    found: list[Golden] = json.loads(PLACE.read_text("utf-8"))
    return found


def opened(dtype: torch.dtype, *, fast: bool = False) -> HFTarget:
    return on_passes(HFTarget(load_model(POCKET, dtype=dtype), slots=len(PROMPTS), fast=fast))


def answers(target: HFTarget, drafter: str, name: str, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt with the seed of the sampling itself, as if it came alone."""
    return [run(target, drafter, [prompt], SAMPLINGS[name])[0].output for prompt in prompts]


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(POCKET)
    prompts: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    target = opened(torch.float64)
    said = {name: answers(target, "none", name, prompts) for name in SAMPLINGS}
    draw, forward = torch.Generator().manual_seed(0), target.forward

    def moved(rows: Rows, short: PassVariant | None = None) -> Tensor:
        logits = forward(rows, short)
        return logits + MOVED * (2 * torch.rand(logits.shape, generator=draw, dtype=logits.dtype) - 1)

    target.forward = moved  # type: ignore[method-assign]
    for _ in range(2):
        for name in SAMPLINGS:
            assert answers(target, "none", name, prompts) == said[name], f"{name}: a near tie; choose another prompt"
    found = [
        Golden(
            prompt=prompt,
            ids=prompts[i],
            said={name: said[name][i] for name in SAMPLINGS},
            text={name: tokenizer.decode(said[name][i], skip_special_tokens=True) for name in SAMPLINGS},
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in found]
    PLACE.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


if __name__ == "__main__":
    main()
