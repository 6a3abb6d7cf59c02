"""The verb `generate`: answers to one prompt, or to all prompts of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from selfdraft.cli import terminal
from selfdraft.cli.answers import (
    Clock,
    Drafter,
    Seed,
    System,
    Temperature,
    TopP,
    note_full_context,
    show_figures,
    show_piece,
)
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    AsJson,
    Config,
    Device,
    Dtype,
    EngineSizes,
    Exact,
    InTemplate,
    KvCacheDtype,
    Log,
    Lora,
    MaxNew,
    Memory,
    Model,
    NoCache,
    Quantized,
    Threads,
    as_verb,
    check_options,
    conditions,
    open_all,
    open_llm,
    prompts_of,
)
from selfdraft.cli.ranks import LookaheadParallel, joined, show_ranks
from selfdraft.errors import OptionError, RequestError
from selfdraft.methods import splittable
from selfdraft.types import SamplingParams

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.llm import LLM, CompletionOutput
    from selfdraft.parallel import Ranks
    from selfdraft.prove.compare import Comparison

Prompts = Annotated[Path | None, typer.Option(help="A jsonl file with prompt, turns, question or text in each line.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="A text file that is the prompt; '-' is standard input. A line end at its very end is left out."),
]
Predicted = Annotated[
    Path | None, typer.Option(help="A text that the answer may resemble: a guess for prediction and merged.")
]
Comparing = Annotated[
    bool, typer.Option("--compare", help="Also decode plainly here and say how much faster drafting was.")
]
OnRay = Annotated[
    Path | None,
    typer.Option(
        "--ray", help="Answer all rows of a jsonl or parquet file on Ray Data (the extra 'ray').", metavar="FILE"
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(help="With --ray: the folder for the answers; a run that was ended goes on.", metavar="DIR"),
]
Workers = Annotated[int, typer.Option(help="With --ray: processes that answer, each with its own model.", min=1)]
BlockRows = Annotated[
    int, typer.Option(help="With --ray: rows that are answered together, and kept in one file.", min=1, max=1024)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of the verb, in the order of its help."""

    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from standard input.")] = None
    model: Model = DEFAULT_MODEL
    drafter: Drafter = None
    speculative_config: Config = None
    adapter: Adapters = None
    lora: Lora = None
    quantization: Quantized = "auto"
    prompt_file: PromptFile = None
    prompts: Prompts = None
    limit: Annotated[int | None, typer.Option(help="Take at most this many prompts of the file.", min=1)] = None
    chat_template: InTemplate = False
    system: System = None
    max_new_tokens: MaxNew = 128
    temperature: Temperature = 0.0
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0
    top_p: TopP = 1.0
    min_p: Annotated[float, typer.Option(help="Drop tokens under this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen get less likely.")] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="Taken once from tokens already in the answer.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="Taken per occurrence in the answer.")] = 0.0
    min_tokens: Annotated[int, typer.Option(help="Least number of new tokens.")] = 0
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False
    seed: Seed = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    exactness: Exact = "bitwise"
    kv_cache_dtype: KvCacheDtype = "auto"
    compare: Comparing = False
    prediction: Predicted = None
    memory: Memory = None
    log: Log = None
    threads: Threads = None
    no_cache: NoCache = False
    lookahead_parallel: LookaheadParallel = False
    as_json: AsJson = False
    ray: OnRay = None
    output: Output = None
    workers: Workers = 1
    block_rows: BlockRows = 16


def generate(given: GenerateOptions) -> None:
    """Answer a prompt, or all prompts of a file. Accepted draft tokens are coloured by their source."""
    sampling = sampling_of(given)
    config = check_options(given.model, given.drafter, given.speculative_config, given.dtype)
    if given.ray is not None:
        from selfdraft.integrations.ray.required import DATA_PARTS, check_ray

        check_ray(DATA_PARTS)
        from selfdraft.integrations.ray.batch_command import answer_on_ray

        answer_on_ray(given)
        return
    if given.output is not None:
        raise OptionError("--output is for --ray FILE: give it, too")
    sampling = replace(sampling, seed=0 if given.compare and given.seed is None else given.seed)
    if given.lookahead_parallel:
        splittable(given.drafter, config)
    texts = read_texts(given.prompt, given.prompt_file, given.prompts, given.limit, given.log)
    with joined(given.lookahead_parallel) as ranks:
        answered(given, sampling, texts, ranks)


def answered(given: GenerateOptions, sampling: SamplingParams, texts: Sequence[str], ranks: Ranks | None) -> None:
    """Open the model and answer all prompts. Of several ranks the first shows and keeps the answers."""
    leads = ranks is None or ranks.leads
    log, memory = (given.log, given.memory) if leads else (None, None)
    llm = llm_of(given, ranks=ranks)
    requests = open_all(llm, texts, given.chat_template, sampling, given.system)
    answers = [
        *answer_all(
            llm, texts, requests, sampling, log, memory, compare=given.compare, quiet=given.as_json or not leads
        )
    ]
    if ranks is not None and leads and not given.as_json:
        show_ranks(llm, ranks)
    if given.as_json and leads:
        facts = {**conditions(llm, given.model, given.lora).as_dict(), "drafter": llm.drafter_name}
        facts |= {"ranks": ranks.as_dict()} if ranks is not None else {}
        terminal.print_json({**facts, "results": [answer.as_dict() for answer in answers]})


def sampling_of(given: GenerateOptions) -> SamplingParams:
    """The sampling options. Errors: OptionError, RequestError."""
    sampling = SamplingParams(
        temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, min_p=given.min_p, seed=given.seed
    )
    sampling = replace(sampling, presence_penalty=given.presence_penalty, frequency_penalty=given.frequency_penalty)
    sampling = replace(
        sampling, repetition_penalty=given.repetition_penalty, stop=tuple(given.stop or ()), ignore_eos=given.ignore_eos
    )
    sampling = replace(sampling, min_tokens=given.min_tokens, max_tokens=given.max_new_tokens)
    return replace(sampling, prediction=read_prediction(given.prediction))


def llm_of(given: GenerateOptions, sizes: EngineSizes | None = None, ranks: Ranks | None = None) -> LLM:
    """The model behind the options. Errors: LoadError, OptionError, RequestError."""
    return open_llm(
        given.model,
        given.drafter,
        given.speculative_config,
        given.dtype,
        given.exactness,
        given.threads,
        given.adapter,
        memory=given.memory,
        no_cache=given.no_cache,
        lora=given.lora,
        quantization=given.quantization,
        kv_cache_dtype=given.kv_cache_dtype,
        device=given.device,
        engine=sizes or EngineSizes(),
        ranks=ranks,
    )


def read_texts(
    prompt: str | None, prompt_file: Path | None, prompts: Path | None, limit: int | None, log: Path | None
) -> Sequence[str]:
    """The prompts; that the log can be written is checked before anything is loaded. Errors: RequestError."""
    texts = prompts_of(prompt, prompt_file, prompts, limit)
    if log is not None:
        from selfdraft.files.token_log import check_log

        check_log(log)
    return texts


def read_prediction(path: Path | None) -> str:
    """The text that the answer may resemble; empty without a file. Errors: RequestError."""
    try:
        return path.read_text("utf-8") if path is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--prediction {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its times, and with --compare its speed against plain decoding."""

    prompt: str
    output: CompletionOutput
    seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float | None
    """After the first tokens; None when there were no others."""
    comparison: Comparison | None

    def as_dict(self) -> dict[str, object]:
        """One object of the JSON document."""
        output, speed = self.output, self.decode_tokens_per_second
        return {
            "prompt": self.prompt,
            "text": output.text,
            "token_ids": list(output.token_ids),
            "sources": list(output.sources),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "seconds": round(self.seconds, 4),
            "first_token_seconds": round(self.first_token_seconds, 4),
            "decode_tokens_per_second": speed and round(speed, 2),
            **output.stats.as_dict(),
            **({"compare": self.comparison.as_dict()} if self.comparison is not None else {}),
        }


def answer_all(
    llm: LLM,
    texts: Sequence[str],
    requests: Sequence[Request],
    sampling: SamplingParams,
    log: Path | None,
    memory: Path | None,
    *,
    compare: bool,
    quiet: bool,
) -> Iterator[Answer]:
    """The answers to all prompts, each kept in the files that ask for it as soon as it is there."""
    from selfdraft.files.token_log import append

    for text, request in zip(texts, requests, strict=True):
        ids = list(request.tokens)
        if len(texts) > 1 and not quiet:
            show_heading(text)
        answer = answer_one(llm, text, request, sampling, compare=compare, quiet=quiet)
        if log is not None:
            append(log, llm.logged(ids, list(answer.output.token_ids), sampling))
        if memory is not None:
            llm.save_memory(memory)
        yield answer


def answer_one(
    llm: LLM, text: str, request: Request, sampling: SamplingParams, *, compare: bool, quiet: bool
) -> Answer:
    """One answer, shown as it comes unless `quiet`."""
    from selfdraft.prove.compare import compare as against_plain

    ids, clock, last = list(request.tokens), Clock(), None
    try:
        for piece in llm.pieces(request):
            last = piece
            clock.saw(piece.num_output_tokens)
            if not quiet:
                show_piece(piece)
    except KeyboardInterrupt:
        if last is not None and not quiet:
            show_figures(last.stats, clock, llm.drafter_name)
        raise
    assert last is not None
    output = last.output
    times = (clock.seconds, clock.first or 0.0, clock.speed(len(output.token_ids)))
    if not quiet:
        show_figures(output.stats, clock, llm.drafter_name)
        note_full_context(last, sampling.max_tokens, llm)
    if not compare:
        return Answer(text, output, *times, None)
    comparison = against_plain(llm.engine_for("none"), llm.engine, lambda: llm.requests(ids, sampling)[0])
    if not quiet:
        show_comparison(comparison, llm.drafter_name)
    return Answer(text, output, *times, comparison)


def show_heading(prompt: str) -> None:
    """The beginning of a prompt above its answer, where there are several."""
    line = " ".join(prompt.split())
    terminal.out.print(Text(f"\n> {line[:100]}{'...' if len(line) > 100 else ''}", style="bold"))


def show_comparison(result: Comparison, drafter: str) -> None:
    """Speed against plain decoding, or why there is none to tell."""
    if not result.texts_equal:
        terminal.show_red("the texts DIFFER from plain decoding: no speed-up is given")
        return
    line = f"plain {result.plain_tokens_per_second:.1f} tokens/s, {drafter} {result.drafted_tokens_per_second:.1f}"
    line += f" tokens/s: {result.speedup:.2f}x; texts equal: yes (whole answers, median of {result.runs} runs each)"
    terminal.show_dim(line)
    if result.reason:
        terminal.show_dim(result.reason)


verb = as_verb(GenerateOptions, generate)
