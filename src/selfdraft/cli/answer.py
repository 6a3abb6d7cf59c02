"""The verbs that answer: generate and chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    AsJson,
    Config,
    Dtype,
    Exact,
    InTemplate,
    Log,
    Lora,
    MaxNew,
    Memory,
    Model,
    NoCache,
    Threads,
    check_options,
    conditions,
    encode_all,
    gather,
    open_llm,
    opened,
)
from selfdraft.errors import RequestError

if TYPE_CHECKING:
    from selfdraft.llm import LLM
    from selfdraft.types import SamplingParams

Prompts = Annotated[Path | None, typer.Option(help="A jsonl file with prompt, turns, question or text in each line.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="A text file that is the prompt; '-' is standard input. A line end at its very end is left out."),
]
System = Annotated[str | None, typer.Option(help="What the system message of the chat template says.")]
Predicted = Annotated[
    Path | None, typer.Option(help="A text that the answer may resemble: a guess for prediction and merged.")
]
Comparing = Annotated[
    bool, typer.Option("--compare", help="Also decode plainly here and say how much faster drafting was.")
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from standard input.")] = None,
    model: Model = DEFAULT_MODEL,
    drafter: Annotated[str | None, typer.Option(help="Who guesses; 'none' is plain decoding. Default: auto.")] = None,
    speculative_config: Config = None,
    adapter: Adapters = None,
    lora: Lora = None,
    prompt_file: PromptFile = None,
    prompts: Prompts = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts of the file.", min=1)] = None,
    chat_template: InTemplate = False,
    system: System = None,
    max_new_tokens: MaxNew = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens under this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen get less likely.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken once from tokens already in the answer.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken per occurrence in the answer.")] = 0.0,
    min_tokens: Annotated[int, typer.Option(help="No stop before so many tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: a fresh one.")] = None,
    dtype: Dtype = "auto",
    exactness: Exact = "bitwise",
    compare: Comparing = False,
    prediction: Predicted = None,
    memory: Memory = None,
    log: Log = None,
    threads: Threads = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or all prompts of a file. Accepted draft tokens are coloured by their source."""
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        max_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        seed=seed,
        prediction=read_prediction(prediction),
    )
    check_options(model, drafter, speculative_config, dtype)
    texts = _texts(prompt, prompt_file, prompts, limit, log)
    loading: dict[str, Any] = {"memory": memory, "no_cache": no_cache, "lora": lora}
    llm = open_llm(model, drafter, speculative_config, dtype, exactness, threads, adapter, **loading)
    encoded = encode_all(llm, texts, chat_template, sampling, system)
    results = _answers(llm, texts, encoded, sampling, log, memory, compare=compare, quiet=as_json)
    if as_json:
        terminal.document({**conditions(llm, model, lora), "drafter": llm.drafter_name, "results": results})


def _texts(
    prompt: str | None, prompt_file: Path | None, prompts: Path | None, limit: int | None, log: Path | None
) -> Sequence[str]:
    """The prompts; that the log can be written is checked before anything is loaded. Errors: RequestError."""
    texts = gather(prompt, prompt_file, prompts, limit)
    if log is not None:
        from selfdraft.files.token_log import check_log

        check_log(log)
    return texts


def read_prediction(path: Path | None) -> str:
    """Errors: RequestError."""
    try:
        return path.read_text("utf-8") if path is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prediction {path} cannot be read: {error}") from error


def _keep(
    llm: LLM, ids: list[int], output: list[int], sampling: SamplingParams, log: Path | None, memory: Path | None
) -> None:
    """Write an answer into the files that ask for it."""
    from selfdraft.files.token_log import append

    if log is not None:
        append(log, llm.logged(ids, output, sampling))
    if memory is not None:
        llm.save_memory(memory)


def _answers(
    llm: LLM,
    texts: Sequence[str],
    encoded: Sequence[list[int]],
    sampling: SamplingParams,
    log: Path | None,
    memory: Path | None,
    *,
    compare: bool,
    quiet: bool,
) -> list[dict[str, Any]]:
    """The records of all answers, each written into the files that ask for it as soon as it is there."""
    records = []
    for text, ids in zip(texts, encoded, strict=True):
        records.append(_answer(llm, text, ids, sampling, compare=compare, quiet=quiet, many=len(texts) > 1))
        _keep(llm, ids, records[-1]["token_ids"], sampling, log, memory)
    return records


def _answer(
    llm: LLM, text: str, ids: list[int], sampling: SamplingParams, *, compare: bool, quiet: bool, many: bool
) -> dict[str, Any]:
    """Stream one answer to the terminal (unless `quiet`) and return its record."""
    if many and not quiet:
        terminal.heading(text)
    if compare and sampling.seed is None:
        from dataclasses import replace

        sampling = replace(sampling, seed=0)
    clock = terminal.Clock()
    output = None
    try:
        for piece in llm.stream(ids, sampling):
            output = piece.output
            clock.saw(output)
            if not quiet:
                terminal.piece(piece)
    except KeyboardInterrupt:
        if output is not None and not quiet:
            terminal.figures(output.stats, clock, llm.drafter_name)
        raise
    assert output is not None
    record: dict[str, Any] = {"prompt": text, "text": output.text, "token_ids": list(output.token_ids)}
    record |= {"sources": list(output.sources), "finish_reason": output.finish_reason}
    speed, first = clock.speed(len(output.token_ids)), clock.first or 0.0
    record |= {"stop_reason": output.stop_reason, "seconds": round(clock.seconds, 4)}
    record |= {"first_token_seconds": round(first, 4), "decode_tokens_per_second": speed and round(speed, 2)}
    record |= output.stats.as_dict()
    if not quiet:
        terminal.figures(output.stats, clock, llm.drafter_name)
    if compare:
        record["compare"] = _compare(llm, ids, sampling, quiet=quiet)
    return record


def _compare(llm: LLM, ids: list[int], sampling: SamplingParams, *, quiet: bool) -> dict[str, object]:
    from selfdraft.prove.compare import compare

    result = compare(llm.engine_for("none"), llm.engine, lambda: llm.requests(ids, sampling)[0])
    if not quiet:
        terminal.comparison(result, llm.drafter_name)
    return result.as_dict()


def chat(
    model: Model = DEFAULT_MODEL,
    drafter: Annotated[str | None, typer.Option(help="Who guesses; 'none' is plain decoding. Default: auto.")] = None,
    speculative_config: Config = None,
    adapter: Adapters = None,
    lora: Lora = None,
    system: System = None,
    max_new_tokens: MaxNew = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: a fresh one.")] = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    no_cache: NoCache = False,
) -> None:
    """Talk with a model through its template. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_new_tokens)
    llm = open_llm(model, drafter, speculative_config, dtype, "bitwise", threads, adapter, no_cache=no_cache, lora=lora)
    opening = opened(system)
    messages = [*opening]
    while (said := terminal.ask()) is not None:
        messages.append({"role": "user", "content": said})
        answer, clock = "", terminal.Clock()
        try:
            ids = llm.render(messages)
            for piece in llm.stream(ids, sampling):
                answer = piece.output.text
                clock.saw(piece.output)
                terminal.piece(piece)
        except RequestError as error:
            terminal.complain(f"{error}; the conversation starts anew")
            messages = [*opening]
            continue
        except KeyboardInterrupt:
            terminal.write("\n")
            terminal.note("stopped; the text so far stays in the conversation")
        else:
            terminal.figures(piece.output.stats, clock, llm.drafter_name)
        messages.append({"role": "assistant", "content": answer})
