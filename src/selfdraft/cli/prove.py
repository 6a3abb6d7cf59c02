"""The verbs that prove: verify and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    AsJson,
    Dtype,
    Exact,
    InTemplate,
    Lora,
    MaxNew,
    Model,
    NoCache,
    Threads,
    check_options,
    conditions,
    drafter_names,
    encode_all,
    open_llm,
    repeatable,
    runnable,
)
from selfdraft.errors import OptionError


def verify(
    prompts: Annotated[Path, typer.Option(help="A jsonl file with prompt, turns, question or text in each line.")],
    model: Model = DEFAULT_MODEL,
    adapter: Adapters = None,
    lora: Lora = None,
    drafters: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1)] = None,
    max_new_tokens: MaxNew = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    seed: Annotated[int, typer.Option(help="Prompt i is sampled with seed + i.")] = 0,
    chat_template: InTemplate = False,
    against: Annotated[
        Literal["plain", "hf"], typer.Option(help="Our own plain decoding, or transformers' greedy.")
    ] = "plain",
    dtype: Dtype = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Prove that drafting changes nothing. Every token of every drafter is compared; exit code 1 at a mismatch."""
    from selfdraft.files.records import read_prompts
    from selfdraft.types import SamplingParams

    names = drafter_names(drafters, against)
    texts = read_prompts(prompts, limit)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, ignore_eos=ignore_eos)
    if against == "hf" and not sampling.plain:
        raise OptionError(f"--against hf is for greedy decoding, not for temperature {temperature}")
    check_options(model, None, None, dtype)
    from selfdraft.prove.verify import Report, plainly, stock_greedy
    from selfdraft.prove.verify import verify as run

    llm = open_llm(model, "none", None, dtype, exactness, threads, adapter, no_cache=no_cache, lora=lora)
    reference = plainly(llm.engine) if against == "plain" else stock_greedy(llm.model)
    requests = [
        repeatable(llm, sampling, seed + i, ids)
        for i, ids in enumerate(encode_all(llm, texts, chat_template, sampling))
    ]
    engines = {}
    for name in names:
        if (engine := runnable(llm, name, named=drafters != "all")) is not None:
            engines[name] = engine
    report = Report()
    with terminal.progress(len(texts) * len(engines), quiet=as_json) as advance:
        for _ in run(llm.model, reference, engines, requests, report):
            advance()
    result = {**conditions(llm, model, lora), "against": against, "drafters": list(engines), "prompts": len(texts)}
    result |= {"temperature": temperature, **report.as_dict()}
    if as_json:
        terminal.document(result)
    else:
        terminal.verification(result, llm.decode)
    raise typer.Exit(1 if report.mismatches else 0)


def doctor(
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    max_new_tokens: MaxNew = 48,
    threads: Threads = None,
    prove: Annotated[bool, typer.Option("--prove", help="Do the proof at load again, kept or not.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the exactness this machine reaches. It is tried, with two dtypes: fast in any shape, plain in two rules."""
    from selfdraft.prove.doctor import machine, trial
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_new_tokens, ignore_eos=True)
    trials: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        for runner, exactness in (("auto", "bitwise"), ("plain", "bitwise"), ("plain", "token")):
            llm = open_llm(model, "none", None, dtype, exactness, threads, runner=runner, no_cache=prove, lora=lora)
            if runner == "auto" and llm.target.runner is None:
                continue  # the plain path comes next anyway
            requests = [repeatable(llm, sampling, 0, llm.encode(text)) for text in terminal.SAMPLE_PROMPTS]
            shapes = str(llm.target.shapes) if runner == "plain" else "any, fast runner"
            found = trial(llm.target, llm.engine.drafter, requests, dtype, shapes)
            facts = {name: getattr(found, name) for name in found.__slots__}
            trials.append({"runner": llm.target.runs, "exactness": exactness, **facts, "level": found.level})
            trials[-1] |= {"promised": llm.exactness.level, "why": llm.exactness.why}
    result: dict[str, Any] = {"machine": machine(), "model": model, "trials": trials}
    if as_json:
        terminal.document(result)
    else:
        terminal.diagnosis(result)
