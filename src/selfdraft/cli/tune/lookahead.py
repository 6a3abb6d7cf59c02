"""`tune lookahead`: the sizes of its window and pool, by decoding with those of a grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Device,
    Dtype,
    Exact,
    Lora,
    Model,
    Quantized,
    Threads,
    conditions,
    open_llm,
)
from selfdraft.cli.tune.prompts import (
    InTemplate,
    Limit,
    OwnTokens,
    Prompts,
    Temperature,
    output_of,
    read_prompts,
    requests_of,
    sampling_of,
)

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.llm import LLM
    from selfdraft.tune.lookahead import Point

Output = Annotated[Path | None, typer.Option(help="Where the result goes. Default: lookahead-MODEL.json here.")]


def tune_lookahead(
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: InTemplate = False,
    max_new_tokens: OwnTokens = 48,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same own text.")] = 0,
    output: Output = None,
    lora: Lora = None,
    quantization: Quantized = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the window and the pool of lookahead by trying a few.

    Every size of a grid is decoded with, then the fastest with adaptation. Give prompts like those you will ask.
    """
    sampling = sampling_of(max_new_tokens, temperature, seed)
    output, texts = output_of(output, "lookahead", model), read_prompts(prompts, limit)
    llm = open_llm(model, "none", None, dtype, exactness, threads, lora=lora, quantization=quantization, device=device)
    requests = requests_of(llm, texts, chat, sampling)
    from selfdraft.files.skip_sets import check_writable, write_json
    from selfdraft.tune import lookahead

    check_writable(output)
    points = measured(llm, requests, quiet=as_json)
    document = lookahead.document(points, conditions(llm, model, lora).as_dict())
    write_json(output, document)
    if as_json:
        terminal.print_json({"output": str(output), **document})
    else:
        show_points(points, output)


def measured(llm: LLM, requests: Sequence[Callable[[], Request]], *, quiet: bool) -> list[Point]:
    """Fixed sizes of a grid, then adaptation from the fastest of them."""
    from selfdraft.tune import lookahead

    measure = partial(lookahead.measure, partial(llm.engine_for, "lookahead"), requests)
    points = []
    with terminal.progress(len(lookahead.GRID) + 1, quiet=quiet, what="trying sizes") as advance:
        for _ in measure([(7, 5, 7)]):
            pass  # warms up; not counted
        for point in measure():
            points.append(point)
            advance()
        best = lookahead.recommend(points)
        for point in measure([(best.window_size, best.ngram_size, best.guess_set_size)], adaptive=True):
            points.append(point)
            advance()
    return points


def show_points(points: Sequence[Point], output: Path) -> None:
    """The sizes and what they gave, the law through them, and how to use the fastest."""
    from rich.table import Table

    from selfdraft.tune.lookahead import fit_law, fit_log, recommend

    table = Table("W", "N", "G", "tokens a pass", "rows a step", "tokens/s", box=None, pad_edge=False)
    for point in points:
        sizes = map(str, (point.window_size, point.ngram_size, point.guess_set_size))
        rates = (f"{point.tokens_per_pass:.3f}", f"{point.rows_per_step:.1f}", f"{point.tokens_per_second:.1f}")
        table.add_row(*sizes, *rates, "adaptive" if point.adaptive else "")
    terminal.out.print(table)
    fixed = [point for point in points if not point.adaptive]
    line, law = fit_log(fixed), fit_law(fixed)
    terminal.out.print(
        f"tokens a pass = {line.intercept:.2f} + {line.slope:.3f} ln(rows), r = {line.correlation:.2f}; "
        f"the paper's law: a = {law.acceptance:.2f}, f = {law.period:.1f}, off by {law.error:.2f}"
    )
    options = json.dumps({"method": "lookahead", **recommend(points).options})
    terminal.out.print(f"written to {output}; use it: --speculative-config '{options}'")
