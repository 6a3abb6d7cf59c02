"""`tune task`: what a drafter learns about one kind of text, kept in a file for later runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
    encode_all,
    open_llm,
)
from selfdraft.cli.tune.prompts import InTemplate, Limit, OwnTokens, Prompts, Temperature, read_prompts, sampling_of

Name = Annotated[str, typer.Argument(help="What the text is, such as 'code': a name for the file, and a note in it.")]
Output = Annotated[Path | None, typer.Option(help="Where the profile goes. Default: task-NAME.json here.")]


def tune_task(
    name: Name,
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: InTemplate = False,
    max_new_tokens: OwnTokens = 128,
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
    """Learn what drafts are worth on one kind of text, and keep it.

    Prompts of this kind are answered with the drafter `auto`. Later runs that are given the file begin with what was
    learned. It holds counts and no text.
    """
    from selfdraft.files.task_profiles import check_task_name

    check_task_name(name, "tune task")
    sampling = sampling_of(max_new_tokens, temperature, seed)
    texts = read_prompts(prompts, limit)
    llm = open_llm(model, "auto", None, dtype, exactness, threads, lora=lora, quantization=quantization, device=device)
    from selfdraft.files.skip_sets import check_writable

    place = output or Path(f"task-{name}.json")
    check_writable(place)
    ids = encode_all(llm, texts, chat, sampling)
    with terminal.progress(len(ids), quiet=as_json, what="answering") as advance:
        for each in ids:
            llm.generate(each, sampling)
            advance()
    llm.save_task_profile(place, name)
    told = {"output": str(place), "prompts": len(ids), **llm.stats.as_dict()}
    if as_json:
        terminal.print_json(told)
    else:
        config = json.dumps({"method": "auto", "task_profile": str(place)})
        terminal.out.print(f"written to {place}; use it: --speculative-config '{config}'", soft_wrap=True)
