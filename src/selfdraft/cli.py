"""Typer verbs, thin over llm.py and bench/. A user's mistake ends with one line and exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selfdraft import show
from selfdraft.errors import OptionError, RequestError, SelfdraftError

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.llm import LLM
    from selfdraft.types import SamplingParams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Decode several tokens per forward pass with no second model. The text is exactly what it would have been.",
)
Model = Annotated[str, typer.Option(help="A checkpoint folder, a hub name, or 'pocket' (inside this package).")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's, but float32 where bfloat16 is slow.")
]
MaxNew = Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)]
Exact = Annotated[
    Literal["bitwise", "token"],
    typer.Option(help="bitwise: canonical shapes, the same bits drafted or not; token: natural shapes."),
]
Config = Annotated[
    str | None,
    typer.Option(help='The method and its options as JSON: \'{"method": "lookup", "prompt_lookup_max": 4}\'.'),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's default when not given.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; leave it out with --prompts.")] = None,
    model: Model = "pocket",
    drafter: Annotated[str | None, typer.Option(help="Who guesses; 'none' is plain decoding. Default: lookup.")] = None,
    speculative_config: Config = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A jsonl file with prompt, turns, question or text in each line.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts of the file.", min=1)] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the checkpoint's chat template.")
    ] = False,
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
    compare: Annotated[
        bool, typer.Option("--compare", help="Also decode plainly here and say how much faster drafting was.")
    ] = False,
    threads: Threads = None,
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
    )
    texts = _gather(prompt, prompts, limit)
    llm = _open(model, drafter, speculative_config, dtype, exactness, threads)
    results = []
    for text, ids in zip(texts, _ids(llm, texts, chat_template, sampling), strict=True):
        results.append(_answer(llm, text, ids, sampling, compare=compare, quiet=as_json, many=len(texts) > 1))
    if as_json:
        show.document({**_conditions(llm, model), "drafter": llm.drafter_name, "results": results})


def _answer(
    llm: LLM, text: str, ids: list[int], sampling: SamplingParams, *, compare: bool, quiet: bool, many: bool
) -> dict[str, Any]:
    """Stream one answer to the terminal (unless `quiet`) and return its record."""
    if many and not quiet:
        show.heading(text)
    if compare and sampling.seed is None:
        from dataclasses import replace

        sampling = replace(sampling, seed=0)
    clock = show.Clock()
    output = None
    try:
        for piece in llm.stream(ids, sampling):
            output = piece.output
            if not quiet:
                show.piece(piece)
    except KeyboardInterrupt:
        if output is not None and not quiet:
            show.figures(output.stats, clock.seconds, llm.drafter_name)
        raise
    assert output is not None
    record: dict[str, Any] = {"prompt": text, "text": output.text, "token_ids": list(output.token_ids)}
    record |= {"sources": list(output.sources), "finish_reason": output.finish_reason}
    record |= {"stop_reason": output.stop_reason, "seconds": round(clock.seconds, 4), **output.stats.as_dict()}
    if not quiet:
        show.figures(output.stats, clock.seconds, llm.drafter_name)
    if compare:
        record["compare"] = _compare(llm, ids, sampling, quiet=quiet)
    return record


def _compare(llm: LLM, ids: list[int], sampling: SamplingParams, *, quiet: bool) -> dict[str, object]:
    from selfdraft.bench.compare import compare

    result = compare(llm.engine_for("none"), llm.engine, lambda: llm.requests(ids, sampling)[0])
    if not quiet:
        show.comparison(result, llm.drafter_name)
    return result.as_dict()


@app.command()
def chat(
    model: Model = "pocket",
    drafter: Annotated[str | None, typer.Option(help="Who guesses; 'none' is plain decoding. Default: lookup.")] = None,
    speculative_config: Config = None,
    max_new_tokens: MaxNew = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: a fresh one.")] = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Talk with a model through its template. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_new_tokens)
    llm = _open(model, drafter, speculative_config, dtype, "bitwise", threads)
    messages: list[dict[str, str]] = []
    while (said := show.ask()) is not None:
        messages.append({"role": "user", "content": said})
        ids = llm.render(messages)
        answer, clock = "", show.Clock()
        try:
            for piece in llm.stream(ids, sampling):
                answer = piece.output.text
                show.piece(piece)
        except RequestError as error:
            show.complain(f"{error}; the conversation starts anew")
            messages.clear()
            continue
        except KeyboardInterrupt:
            show.write("\n")
            show.note("stopped; the text so far stays in the conversation")
        else:
            show.figures(piece.output.stats, clock.seconds, llm.drafter_name)
        messages.append({"role": "assistant", "content": answer})


@app.command()
def verify(
    prompts: Annotated[Path, typer.Option(help="A jsonl file with prompt, turns, question or text in each line.")],
    model: Model = "pocket",
    drafters: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1)] = None,
    max_new_tokens: MaxNew = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    seed: Annotated[int, typer.Option(help="Prompt i is sampled with seed + i.")] = 0,
    against: Annotated[
        Literal["plain", "hf"], typer.Option(help="Our own plain decoding, or transformers' greedy.")
    ] = "plain",
    dtype: Dtype = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prove that drafting changes nothing. Every token of every drafter is compared; exit code 1 at a mismatch."""
    from selfdraft.bench.prompts import read_prompts
    from selfdraft.bench.verify import Report, plainly, stock_greedy
    from selfdraft.bench.verify import verify as run
    from selfdraft.types import SamplingParams

    names = _drafters(drafters, against)
    texts = read_prompts(prompts, limit)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, ignore_eos=ignore_eos)
    if against == "hf" and not sampling.plain:
        raise OptionError(f"--against hf is for greedy decoding, not for temperature {temperature}")
    llm = _open(model, "none", None, dtype, exactness, threads)
    reference = plainly(llm.engine) if against == "plain" else stock_greedy(llm.model)
    engines = {name: llm.engine_for(name) for name in names}
    requests = [_request(llm, sampling, seed + i, ids) for i, ids in enumerate(_ids(llm, texts, False, sampling))]
    report = Report()
    with show.progress(len(texts) * len(names), quiet=as_json) as advance:
        for _ in run(llm.model, reference, engines, requests, report):
            advance()
    result = {**_conditions(llm, model), "against": against, "drafters": names, "prompts": len(texts)}
    result |= {"temperature": temperature, **report.as_dict()}
    if as_json:
        show.document(result)
    else:
        show.verification(result, llm.decode)
    raise typer.Exit(1 if report.mismatches else 0)


def _drafters(wanted: str, against: str) -> list[str]:
    """The drafters to compare; 'none' is no comparison with plain decoding. Errors: OptionError."""
    from selfdraft.drafters import table
    from selfdraft.llm import check_drafter

    names = [*table()] if wanted == "all" else [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        check_drafter(name, None)
    names = [name for name in dict.fromkeys(names) if against == "hf" or name != "none"]
    if not names:
        raise OptionError(f"--drafters {wanted!r} leaves nothing to compare; there are: {', '.join(table())}")
    return names


def _request(llm: LLM, sampling: SamplingParams, seed: int, ids: list[int]) -> Callable[[], Request]:
    from dataclasses import replace

    seeded = replace(sampling, seed=seed)
    return lambda: llm.requests(ids, seeded)[0]


@app.command()
def doctor(
    model: Model = "pocket",
    max_new_tokens: MaxNew = 48,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the exactness this machine reaches. It is tried, with two dtypes and two rules of shapes."""
    from selfdraft.bench.doctor import machine, trial
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_new_tokens, ignore_eos=True)
    trials: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        for exactness in ("bitwise", "token"):
            llm = _open(model, "none", None, dtype, exactness, threads)
            requests = [_request(llm, sampling, 0, llm.encode(text)) for text in show.SAMPLE_PROMPTS]
            shapes = str(llm.target.shapes)
            found = trial(llm.target, llm.engine.drafter, requests, dtype, shapes)
            facts = {name: getattr(found, name) for name in found.__slots__}
            trials.append({"exactness": exactness, **facts, "level": found.level})
            trials[-1] |= {"promised": llm.exactness.level, "why": llm.exactness.why}
    result: dict[str, Any] = {"machine": machine(), "model": model, "trials": trials}
    if as_json:
        show.document(result)
    else:
        show.diagnosis(result)


def _open(
    model: str,
    drafter: str | None,
    config: str | None,
    dtype: str,
    exactness: Literal["bitwise", "token"] | str,
    threads: int | None,
) -> LLM:
    """The model behind the options. Broken options are named before anything is loaded."""
    options = _json(config)
    from selfdraft.llm import LLM, check_drafter, pick_dtype
    from selfdraft.models.stock import quiet

    quiet()
    check_drafter(drafter, options)
    pick_dtype(dtype)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with show.waiting(f"loading {model}"):
        return LLM(
            model,
            drafter=drafter,
            speculative_config=options,
            dtype=dtype,
            exactness="bitwise" if exactness == "bitwise" else "token",
            max_num_seqs=1,
        )


def _json(config: str | None) -> dict[str, object] | None:
    if config is None:
        return None
    try:
        options = json.loads(config)
    except json.JSONDecodeError as error:
        raise OptionError(f"--speculative-config is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(options, dict):
        raise OptionError(f"--speculative-config must be a JSON object, not {config!r}")
    return options


def _gather(prompt: str | None, prompts: Path | None, limit: int | None) -> Sequence[str]:
    from selfdraft.bench.prompts import read_prompts

    if (prompt is None) == (prompts is None):
        raise RequestError("give one prompt, or a file with --prompts, and not both")
    if prompts is not None:
        return read_prompts(prompts, limit)
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token")
    return [prompt]


def _ids(llm: LLM, texts: Sequence[str], chat_template: bool, sampling: SamplingParams) -> list[list[int]]:
    """Token ids of all prompts. Each is checked before one of them is run. Errors: RequestError."""
    from contextlib import nullcontext

    from selfdraft.llm import naming

    checked = []
    for i, text in enumerate(texts):
        with naming(i) if len(texts) > 1 else nullcontext():
            ids = llm.render([{"role": "user", "content": text}]) if chat_template else llm.encode(text)
            llm.requests(ids, sampling)
            checked.append(ids)
    return checked


def _conditions(llm: LLM, model: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    from selfdraft.bench.doctor import machine

    dtype = str(next(llm.model.parameters()).dtype).removeprefix("torch.")
    return {
        "model": model,
        "dtype": dtype,
        "exactness": {"level": llm.exactness.level, "why": llm.exactness.why},
        "machine": machine(),
    }


UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""typer's error for what it cannot parse; it has no public name that all versions share."""


def main() -> None:
    """Entry point: runs a verb and turns errors into one line and an exit code."""
    show.hush()
    try:
        # typer returns the code of an Exit, and 130 for Ctrl-C
        code = app(prog_name="selfdraft", standalone_mode=False) or 0
    except SelfdraftError as error:
        show.complain(str(error))
        code = 2
    except UsageError as error:
        _explain(error)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        show.note("interrupted")
    sys.exit(code)


def _explain(error: Any) -> None:
    """A usage error in one line; without any argument typer's error is the help."""
    message = error.format_message().replace("Value error, ", "").rstrip(".?")
    where = error.ctx.command_path if error.ctx else "selfdraft"
    if message.startswith("Usage:"):
        show.err.print(message)
    else:
        show.complain(f"{message}; see {where} --help")
