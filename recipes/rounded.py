"""What a pass with rounded weights costs on this CPU beside a whole one, and what its copy takes.

    python recipes/rounded.py                       # 135m and 1b shapes, bfloat16, two threads
    python recipes/rounded.py --shape 1b --rounds 5

Random weights made in memory (`recipes/plain.py`). Tq(n) is one drafting pass of n rows behind 64 tokens, all of them
answered, T(n) a whole one; medians, in alternation.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Annotated

import torch
import typer
from plain import DTYPES, PREFIX, random_model

from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.models.load import load_model
from selfdraft.models.pocket import POCKET
from selfdraft.models.target import HFTarget
from selfdraft.prove.doctor import machine
from selfdraft.types import PassVariant, Rounded, SamplingParams

WAYS: dict[str, PassVariant | None] = {"T": None, "T8": Rounded(8), "T4": Rounded(4)}
ROWS = (1, 2, 4, 8, 16)


def main(
    shape: Annotated[list[str], typer.Option(help="pocket, 135m, 1b, llama32-1b")] = ["135m", "1b"],  # noqa: B006
    dtype: str = "bfloat16",
    threads: int = 2,
    rounds: int = 15,
) -> None:
    torch.set_num_threads(threads)
    print(json.dumps({**machine(torch.device("cpu")), "dtype": dtype, "rounds": rounds}))
    for name in shape:
        model = load_model(POCKET, dtype=DTYPES[dtype]) if name == "pocket" else random_model(name, DTYPES[dtype])
        target = HFTarget(model, fast=True)
        found = passes(target, rounds)
        for bits, copy in target.copies.items():
            print(f"{name}: {bits} bits: {copy.bytes / 1e6:.0f} MB made in {copy.seconds:.1f} s, {copy.layers} layers")
        for rows in ROWS:
            times = {way: found[way, rows] for way in WAYS}
            each = (f"{way}({rows}) {ms:.2f} ms = {ms / found['T', 1]:.2f} T(1)" for way, ms in times.items())
            print("  " + "  ".join(each))


def passes(target: HFTarget, rounds: int) -> dict[tuple[str, int], float]:
    """Milliseconds of a pass by its kind and its number of rows."""
    prompt = torch.randint(0, target.vocab, (PREFIX,), generator=torch.Generator().manual_seed(1)).tolist()
    sequence = Sequence([*prompt, 1], PREFIX, SamplingParams(), slot=0, num_cached=PREFIX)
    found: dict[tuple[str, int], list[float]] = {(way, rows): [] for way in WAYS for rows in ROWS}
    for _ in range(rounds + 1):
        for (way, count), times in found.items():
            rows = pack([(sequence, 1, Draft.chain([2] * (count - 1), "x"))])
            began = time.perf_counter()
            target.forward(rows, WAYS[way])
            times.append(time.perf_counter() - began)
    return {key: 1e3 * median(times[1:]) for key, times in found.items()}


if __name__ == "__main__":
    typer.run(main)
