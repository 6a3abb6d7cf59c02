"""Typer verbs, thin over llm.py and bench/. A user's mistake ends with one line and exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import json
import os
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
    help="Decode several tokens per forward pass with no second model. The text is exactly what it would have been.",
)
Model = Annotated[str, typer.Option(help="A checkpoint folder, a hub name, or 'pocket' (inside this package).")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's, but float32 where bfloat16 is slow.")
]
MaxNew = Annotated[int, typer.Option(help="Most tokens of an answer.")]
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
    ignore_eos: Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: a fresh one.")] = None,
    dtype: Dtype = "auto",
    exactness: Exact = "bitwise",
    compare: Annotated[
        bool, typer.Option(help="Also decode plainly here and say how much faster drafting was.")
    ] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or every prompt of a file; accepted draft tokens are coloured by their source."""
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
    requests = [_ids(llm, text, chat_template) for text in texts]
    results = []
    for text, ids in zip(texts, requests, strict=True):
        results.append(_answer(llm, text, ids, sampling, compare=compare, quiet=as_json, many=len(texts) > 1))
    if as_json:
        show.document({**_conditions(llm, model), "results": results})


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
            show.figures(output.stats, clock.seconds, llm.drafter_name, interrupted=True)
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

    result = compare(llm.engine_for("none"), llm.engine, lambda: llm.requests(ids, sampling, 0)[0])
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
    """Talk with a model through its chat template. Empty line or Ctrl-D ends; Ctrl-C stops an answer."""
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
            show.complain("stopped; the text so far stays in the conversation")
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
    seed: Annotated[int, typer.Option(help="Prompt i is sampled with seed + i.")] = 0,
    against: Annotated[
        Literal["plain", "hf"], typer.Option(help="Our own plain decoding, or transformers' greedy.")
    ] = "plain",
    dtype: Dtype = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prove that drafting changes nothing: every token of every drafter is compared. Exit code 1 at any mismatch."""
    from selfdraft.bench.prompts import read_prompts
    from selfdraft.bench.verify import Report
    from selfdraft.bench.verify import verify as run
    from selfdraft.drafters import table
    from selfdraft.types import SamplingParams

    names = [*table()] if drafters == "all" else [name.strip() for name in drafters.split(",") if name.strip()]
    texts = read_prompts(prompts, limit)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens)
    if against == "hf" and not sampling.plain:
        raise OptionError(f"--against hf is for greedy decoding, not for temperature {temperature}")
    llm = _open(model, "none", None, dtype, exactness, threads)
    engines = {name: llm.engine_for(name) for name in dict.fromkeys(["none", *names])}
    wanted = engines if against == "hf" and "none" in names else {n: engines[n] for n in names if n != "none"}
    requests = [_request(llm, text, sampling, seed + i) for i, text in enumerate(texts)]
    report = Report()
    pairs = engines if against == "plain" else wanted
    rounds = run(llm.model, pairs, requests, against, report)
    with show.progress(len(texts) * max(len(wanted), 1), quiet=as_json) as advance:
        for _ in rounds:
            advance()
    result = {**_conditions(llm, model), "against": against, "drafters": list(wanted), "prompts": len(texts)}
    result |= {"temperature": temperature, **report.as_dict()}
    if as_json:
        show.document(result)
    else:
        show.verification(result, llm.decode)
    raise typer.Exit(1 if report.mismatches else 0)


def _request(llm: LLM, text: str, sampling: SamplingParams, seed: int) -> Callable[[], Request]:
    from dataclasses import replace

    seeded = replace(sampling, seed=seed)
    ids = llm.requests(text, seeded, 0)[0].tokens
    return lambda: llm.requests(ids, seeded, 0)[0]


@app.command()
def doctor(
    model: Model = "pocket",
    max_new_tokens: MaxNew = 48,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say which exactness level this machine reaches, and why, by trying it."""
    from selfdraft.bench.doctor import machine, trial
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_new_tokens, ignore_eos=True)
    trials, reasons = [], {}
    for dtype in ("float32", "bfloat16"):
        for exactness in ("bitwise", "token"):
            llm = _open(model, "none", None, dtype, exactness, threads)
            requests = [_request(llm, text, sampling, 0) for text in show.SAMPLE_PROMPTS]
            shapes = f"rows x{llm.target.shapes.rows}, bucket {llm.target.shapes.bucket or 'none'}"
            trials.append(trial(llm.target, llm.engine.drafter, requests, dtype, shapes))
            reasons[f"{dtype} {exactness}"] = llm.exactness.why
    result: dict[str, Any] = {"machine": machine(), "model": model, "why": reasons}
    result["trials"] = [{**{n: getattr(t, n) for n in t.__slots__}, "level": t.level} for t in trials]
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
    show.hush()
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


def _ids(llm: LLM, text: str, chat_template: bool) -> list[int]:
    return llm.render([{"role": "user", "content": text}]) if chat_template else llm.encode(text)


def _conditions(llm: LLM, model: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    from selfdraft.bench.doctor import machine

    dtype = str(next(llm.model.parameters()).dtype).removeprefix("torch.")
    return {
        "model": model,
        "drafter": llm.drafter_name,
        "dtype": dtype,
        "exactness": {"level": llm.exactness.level, "why": llm.exactness.why},
        "machine": machine(),
    }


def main() -> None:
    """Entry point: runs a verb and turns errors into one line and an exit code."""
    try:
        app(standalone_mode=False)
    except SelfdraftError as error:
        show.complain(str(error))
        sys.exit(2)
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        show.complain("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
