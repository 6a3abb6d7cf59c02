"""`tune s3d`: how many blocks to leave out and how many mask tokens to use, measured at a few widths and solved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
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
    Runs,
    Temperature,
    output_of,
    read_prompts,
    requests_of,
    sampling_of,
)
from selfdraft.types import within

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.llm import LLM
    from selfdraft.tune.s3d import Choice, Curve

Sweep = Annotated[bool, typer.Option("--sweep", help="Also decode for real with every setting, to check the formula.")]
Output = Annotated[Path | None, typer.Option(help="Where the result goes. Default: s3d-MODEL.json here.")]


def tune_s3d(
    model: Model = DEFAULT_MODEL,
    adapter: Adapters = None,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: InTemplate = False,
    max_new_tokens: OwnTokens = 48,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same own text.")] = 0,
    output: Output = None,
    sweep: Sweep = False,
    runs: Runs = 3,
    lora: Lora = None,
    quantization: Quantized = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find how many blocks s3d should skip, with how many masks.

    The model must have mask tokens for s3d: in its folder, or given with --adapter. Give prompts like those you will
    ask.
    """
    sampling = sampling_of(max_new_tokens, temperature, seed)
    within("runs", runs, 1, 100)
    output, texts = output_of(output, "s3d", model), read_prompts(prompts, limit)
    opening = partial(open_llm, lora=lora, quantization=quantization, device=device)
    llm = opening(model, "none", None, dtype, exactness, threads, adapter)
    requests = requests_of(llm, texts, chat, sampling)
    from selfdraft.files.skip_sets import check_writable, write_json

    check_writable(output)
    curve = measured(llm, requests, quiet=as_json)
    tried = swept(llm, requests, curve, runs) if sweep else []
    document = {**conditions(llm, model, lora).as_dict(), "method": "s3d", **curve.as_dict()}
    if sweep:
        document["sweep"] = [asdict(choice) for choice in tried]
    write_json(output, document)
    if as_json:
        terminal.print_json({"output": str(output), **document})
    else:
        show_curve(curve, tried, output)


def measured(llm: LLM, requests: Sequence[Callable[[], Request]], *, quiet: bool) -> Curve:
    """The curve through a few measured widths."""
    from selfdraft.tune import s3d

    widths = s3d.default_widths(llm.target)
    found: dict[int, s3d.Width] = {}
    verify: tuple[float, ...] = ()
    with terminal.progress(2 * len(widths) + 1, quiet=quiet, what="measuring widths") as advance:
        for part in s3d.measure(llm.target, requests, widths):
            if isinstance(part, s3d.Width):
                found[part.width] = part
            else:
                verify = part
            advance()
    return s3d.solve(llm.target.layers, list(found.values()), verify)


def swept(llm: LLM, requests: Sequence[Callable[[], Request]], curve: Curve, runs: int) -> list[Choice]:
    """Every setting of the curve with its speed-up by the clock."""
    from selfdraft.tune.s3d import sweep

    settings = [(choice.width, choice.masks) for choice in curve.all()]
    with terminal.waiting(f"decoding with {len(settings)} settings"):
        return [*sweep(llm.target, requests, settings, runs)]


def show_curve(curve: Curve, tried: Sequence[Choice], output: Path) -> None:
    """The speed-up by skip width and number of masks, predicted and (after a sweep) measured."""
    from rich.table import Table

    choices = curve.all()
    measured = {(choice.width, choice.masks): choice.speed for choice in tried}
    masks = sorted({choice.masks for choice in choices})
    title = "speed-up over plain decoding, predicted" + (" / measured" if measured else "")
    table = Table("blocks skipped", *(terminal.counted(count, "mask") for count in masks), title=title)
    for width in sorted({choice.width for choice in choices}):
        cells = []
        for count in masks:
            real = measured.get((width, count))
            cells.append(f"{curve.speed(width, count):.2f}" + (f" / {real:.2f}" if real else ""))
        table.add_row(str(width), *cells)
    terminal.out.print(table)
    for one in curve.widths:
        shares = " ".join(f"{share:.2f}" for share in one.acceptance)
        terminal.out.print(f"{one.width} blocks skipped: acceptance by place {shares}")
    terminal.out.print(f"best: {json.dumps({'method': 's3d', **choices[0].options})}, in {output}")
