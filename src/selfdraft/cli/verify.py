"""The verb `verify`: every token of every drafter against plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    AsJson,
    Configs,
    Device,
    Dtype,
    Exact,
    InTemplate,
    KvCacheDtype,
    Lora,
    MaxNew,
    Model,
    NoCache,
    Quantized,
    Threads,
    check_options,
    chosen_drafters,
    conditions,
    encode_all,
    open_llm,
    repeatable,
    runnable,
)
from selfdraft.errors import OptionError
from selfdraft.methods import ALIASES, OPTIONS
from selfdraft.types import SamplingParams

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.engine.engine import Engine
    from selfdraft.llm import LLM
    from selfdraft.prove.verify import Mismatch, Report

Against = Literal["plain", "hf"]
Names = Annotated[
    str | None, typer.Option(help="Names with commas between, or 'all': the default without --speculative-config.")
]
REFERENCES: dict[Against, str] = {"plain": "plain decoding", "hf": "transformers' greedy"}
"""What --against compares with, in words."""


def verify(
    prompts: Annotated[Path, typer.Option(help="A jsonl file with prompt, turns, question or text in each line.")],
    model: Model = DEFAULT_MODEL,
    adapter: Adapters = None,
    lora: Lora = None,
    quantization: Quantized = "auto",
    drafters: Names = None,
    speculative_config: Configs = None,
    limit: Annotated[int | None, typer.Option(help="Take at most this many prompts.", min=1)] = None,
    max_new_tokens: MaxNew = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    seed: Annotated[int, typer.Option(help="Prompt i is sampled with seed + i.")] = 0,
    chat_template: InTemplate = False,
    against: Annotated[Against, typer.Option(help="Our own plain decoding, or transformers' greedy.")] = "plain",
    dtype: Dtype = "auto",
    device: Device = "auto",
    exactness: Exact = "bitwise",
    kv_cache_dtype: KvCacheDtype = "auto",
    threads: Threads = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Prove that drafting changes nothing. Every token of every drafter is compared; exit code 1 at a mismatch."""
    from selfdraft.files.records import read_prompts

    wanted = to_compare(drafters, speculative_config or [], against)
    texts = read_prompts(prompts, limit)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, ignore_eos=ignore_eos)
    if against == "hf" and not sampling.plain:
        raise OptionError(f"--against hf is for greedy decoding, not for temperature {temperature}")
    check_options(model, None, None, dtype)
    loading = partial(open_llm, no_cache=no_cache, lora=lora, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    loading = partial(loading, device=device)
    llm = loading(model, "none", None, dtype, exactness, threads, adapter)
    ids = encode_all(llm, texts, chat_template, sampling)
    requests = [repeatable(llm, sampling, seed + i, prompt) for i, prompt in enumerate(ids)]
    by_name = drafters not in (None, "all") or (drafters is None and bool(speculative_config))
    tried = {label: runnable(llm, name, rest, named=by_name or bool(rest)) for label, name, rest in wanted}
    engines = {label: engine for label, engine in tried.items() if engine is not None}
    report = compared(llm, against, engines, requests, quiet=as_json)
    facts = conditions(llm, model, lora)
    if as_json:
        run = {"against": against, "drafters": list(engines), "prompts": len(texts), "temperature": temperature}
        terminal.print_json({**facts.as_dict(), **run, **report.as_dict()})
    else:
        what = f"{terminal.counted(len(texts), 'prompt')} x {', '.join(engines)}; {facts.dtype}"
        show_verdict(report, against, what, llm.decode)
    raise typer.Exit(1 if report.mismatches else 0)


def to_compare(
    drafters: str | None, configs: Sequence[str], against: Against
) -> list[tuple[str, str, dict[str, object]]]:
    """Label, method and options of the drafters; 'none' is no comparison with plain decoding. Errors: OptionError."""
    found = chosen_drafters(drafters, configs)
    left = [one for one in found if against == "hf" or ALIASES.get(one[1], one[1]) != "none"]
    if not left:
        given = "--speculative-config" if drafters is None else f"--drafters {drafters!r}"
        raise OptionError(f"{given} leaves nothing to compare; there are: {', '.join(OPTIONS)}")
    return left


def compared(
    llm: LLM,
    against: Against,
    engines: dict[str, Engine],
    requests: Sequence[Callable[[], Request]],
    *,
    quiet: bool,
) -> Report:
    """The counts of a whole comparison: every drafter's engine on every request."""
    from selfdraft.prove.verify import Report, plainly, stock_greedy
    from selfdraft.prove.verify import verify as run

    reference = plainly(llm.engine) if against == "plain" else stock_greedy(llm.model)
    report = Report()
    with terminal.progress(len(requests) * len(engines), quiet=quiet, what="verifying") as advance:
        for _ in run(llm.model, reference, engines, requests, report):
            advance()
    return report


def show_mismatch(mismatch: Mismatch, decode: Callable[[Sequence[int]], str]) -> None:
    """Where a text leaves the reference: the place, both tokens and the logit gap."""
    tokens = (mismatch.expected, mismatch.got)
    expected, got = (f"{token} {decode([token])!r}" if token is not None else "the end" for token in tokens)
    gap = f"{mismatch.gap:.6g}" if mismatch.gap is not None else "unknown"
    terminal.out.print(
        f"prompt {mismatch.prompt}, {mismatch.drafter}: token {mismatch.position} is {got}, "
        f"expected {expected}; logit gap {gap}"
    )


def show_verdict(report: Report, against: Against, run: str, decode: Callable[[Sequence[int]], str]) -> None:
    """Every mismatch; how much was compared, and with what, and how much of it differed.

    `run` says prompts, drafters and dtype.
    """
    for mismatch in report.mismatches:
        show_mismatch(mismatch, decode)
    count = len(report.mismatches)
    terminal.out.print(
        f"{report.tokens_compared} tokens compared with {REFERENCES[against]}, "
        f"{terminal.counted(count, 'mismatch', 'es')} ({run})"
    )
    if report.logit_rows_compared:
        terminal.out.print(f"logits bit-equal: {report.logit_rows_equal} of {report.logit_rows_compared} rows")
    if not count and report.tokens_compared:
        terminal.out.print(f"95 % upper bound on mismatches per token: {3 / report.tokens_compared:.1e}")
