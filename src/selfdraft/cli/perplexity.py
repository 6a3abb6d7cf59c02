"""The verb `perplexity`: how well a model predicts a text, exactly as it is run here, alone or beside a second one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Conditions,
    Device,
    Dtype,
    KvCacheDtype,
    Lora,
    Model,
    NoCache,
    Quantized,
    Threads,
    as_verb,
    check_options,
    conditions,
    open_llm,
)
from selfdraft.errors import OptionError
from selfdraft.types import Quantization

if TYPE_CHECKING:
    from selfdraft.llm import LLM
    from selfdraft.prove.perplexity import Perplexity

Against = Annotated[
    str | None, typer.Option(help="A second model with the same tokenizer, the reference: what --model takes.")
]
AgainstDtype = Annotated[
    str | None, typer.Option(help="Its dtype; alone: the same model again in this dtype. Default: as --dtype.")
]
AgainstQuantization = Annotated[
    Literal["auto", "none", "int8", "int4"] | None,
    typer.Option(help="Its quantization; alone: the same model again so. Default: as --quantization."),
]
AgainstKvCacheDtype = Annotated[
    Literal["auto", "int8"] | None,
    typer.Option(help="How it stores keys and values; alone: the same model again so. Default: as --kv-cache-dtype."),
]


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """The options of the verb, in the order of its help."""

    text: Annotated[
        Path | None,
        typer.Argument(
            help="A text file, or a jsonl file with text or prompt in each line. Default: a text of this package."
        ),
    ] = None
    model: Model = DEFAULT_MODEL
    lora: Lora = None
    quantization: Quantized = "auto"
    against: Against = None
    against_dtype: AgainstDtype = None
    against_quantization: AgainstQuantization = None
    against_kv_cache_dtype: AgainstKvCacheDtype = None
    tokens: Annotated[int, typer.Option(help="Predict at most this many tokens.", min=1)] = 20_000
    window: Annotated[int, typer.Option(help="Tokens that are read together; each window begins anew.")] = 512
    dtype: Dtype = "auto"
    device: Device = "auto"
    kv_cache_dtype: KvCacheDtype = "auto"
    threads: Threads = None
    no_cache: NoCache = False
    as_json: AsJson = False


def perplexity(given: PerplexityOptions) -> None:
    """Measure how well a model predicts a text, as it is run here.

    With a second model also how far the two are apart: perplexities, KL divergence, equal argmax.
    """
    read, name = text_of(given.text)
    subjects = subjects_of(given)
    check_subjects(subjects)
    opened = [subject.open(given.threads, no_cache=given.no_cache, device=given.device) for subject in subjects]
    found = measured(opened, subjects, read, given.window, given.tokens, quiet=given.as_json)
    facts = [conditions(llm, subject.model, subject.lora) for llm, subject in zip(opened, subjects, strict=True)]
    if given.as_json:
        told = dict(zip(("conditions", "against_conditions"), (one.as_dict() for one in facts), strict=False))
        terminal.print_json({"text": name, "window": given.window, **found.as_dict(), **told})
    else:
        show_perplexity(found, facts, name, given.window)


def subjects_of(given: PerplexityOptions) -> list[Subject]:
    """The model, and the second one where there is one."""
    first = Subject(given.model, given.dtype, given.lora, given.quantization, given.kv_cache_dtype)
    differs = given.against, given.against_dtype, given.against_quantization, given.against_kv_cache_dtype
    if all(one is None for one in differs):
        return [first]
    second = Subject(
        given.against or given.model,
        given.against_dtype or given.dtype,
        given.lora if given.against is None else None,
        given.against_quantization or given.quantization,
        given.against_kv_cache_dtype or given.kv_cache_dtype,
    )
    return [first, second]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and how it is opened."""

    model: str
    dtype: str
    lora: Path | None
    quantization: Quantization = "auto"
    kv_cache_dtype: Literal["auto", "int8"] = "auto"

    def open(self, threads: int | None, *, no_cache: bool, device: str) -> LLM:
        """The model behind it. Errors: LoadError, OptionError."""
        loading = partial(
            open_llm,
            no_cache=no_cache,
            lora=self.lora,
            quantization=self.quantization,
            device=device,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return loading(self.model, "none", None, self.dtype, "bitwise", threads)


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Errors: OptionError, LoadError, for options that are wrong before anything is loaded."""
    for subject in subjects:
        check_options(subject.model, None, None, subject.dtype, subject.lora)
    if len(set(subjects)) < len(subjects):
        raise OptionError(
            f"--against {subjects[0].model} is the model itself, run in the same way: give another, --against-dtype, "
            "--against-quantization or --against-kv-cache-dtype"
        )


def text_of(path: Path | None) -> tuple[str, str]:
    """(the text, what it is called). Errors: RequestError for a file that is no text."""
    from selfdraft.bench.sample_text import NAME, sample_text
    from selfdraft.files.plain_text import read_text

    return (sample_text(), NAME) if path is None else (read_text(path), str(path))


def measured(
    opened: Sequence[LLM], subjects: Sequence[Subject], text: str, window: int, tokens: int, *, quiet: bool
) -> Perplexity:
    """The figures of one model or two, with a bar of progress. Errors: OptionError, RequestError."""
    from selfdraft.prove.perplexity import perplexity as run
    from selfdraft.prove.perplexity import windows_of

    ids, begin = read_alike(opened, subjects, text, tokens)
    context = min(llm.target.max_length for llm in opened)
    windows = windows_of(ids, size=window, most=tokens, context=context, begin=begin)
    against = opened[1].target if len(opened) > 1 else None
    with terminal.progress(len(windows), quiet=quiet, what="reading") as advance:
        return run(opened[0].target, windows, against=against, known=max(len(begin), 1), advance=advance)


def read_alike(
    opened: Sequence[LLM], subjects: Sequence[Subject], text: str, tokens: int
) -> tuple[list[int], list[int]]:
    """(token ids of the text, ids before every window), the same for all models.

    Errors: OptionError for a model without a tokenizer, and where two have other vocabularies or tokenizers.
    """
    from selfdraft.prove.perplexity import tokens_of

    found = []
    for llm, subject in zip(opened, subjects, strict=True):
        if llm.tokenizer is None:
            raise OptionError(f"{subject.model} has no tokenizer: no text can be read with it")
        found.append(tokens_of(llm.tokenizer, text, tokens))
    names, sizes = [subject.model for subject in subjects], [llm.target.vocab for llm in opened]
    if len(set(sizes)) > 1:
        raise OptionError(
            f"{names[0]} chooses among {sizes[0]} tokens and {names[1]} among {sizes[1]}: "
            "compare models of one vocabulary"
        )
    if found[0] != found[-1]:
        first, second = ([*begin, *ids] for ids, begin in found)
        place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        place = min(len(first), len(second)) if place is None else place
        said = [str(ids[place]) if place < len(ids) else "nothing" for ids in (first, second)]
        raise OptionError(
            f"{names[0]} and {names[1]} have other tokenizers: token {place} of the text is {said[0]} for the first "
            f"and {said[1]} for the second; compare models of one tokenizer"
        )
    return found[0]


def show_perplexity(found: Perplexity, facts: Sequence[Conditions], text: str, window: int) -> None:
    """What was read, a table with one row for each model, and how far the two are apart."""
    from rich.table import Table

    terminal.out.print(
        f"{text}: {terminal.counted(f'{found.tokens:,}', 'token')} predicted, in "
        f"{terminal.counted(found.windows, 'window')} of {window}"
    )
    table = Table("model", "weights", "runner", box=None, pad_edge=False)
    for head in ("nats per token", "perplexity", "standard error"):
        table.add_column(head, justify="right", no_wrap=True)
    for one, fact in zip((found.model, found.against), facts, strict=False):
        if one is not None:
            figures = (f"{one.nats.value:.4f}", f"{one.perplexity:.4f}", f"{one.error:.4f}")
            table.add_row(fact.model, fact.numbers, fact.runner, *figures)
    terminal.out.print(table)
    if found.against is not None:
        terminal.out.print(
            f"perplexity {found.percent:+.3f} % (standard error {found.percent_error:.3f}), mean KL divergence "
            f"{found.divergence.value:.6f} nats, equal argmax {100 * found.equal_argmax / found.tokens:.2f} %"
        )


verb = as_verb(PerplexityOptions, perplexity)
