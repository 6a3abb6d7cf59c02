"""The verb `chat`: a conversation with a model at the terminal, loaded here or behind a server."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    Config,
    Device,
    Dtype,
    EngineSizes,
    KvCacheDtype,
    Lora,
    MaxNew,
    NoCache,
    Quantized,
    Threads,
    as_verb,
    open_llm,
    opening_of,
    parse_config,
)
from selfdraft.cli.remote_chat import converse, remote_model
from selfdraft.errors import OptionError
from selfdraft.types import SamplingParams

if TYPE_CHECKING:
    from selfdraft.llm import LLM

Model = Annotated[
    str | None,
    typer.Option(
        help="A checkpoint folder, a GGUF file, a hub name, 'smollm2' (downloaded on first use), or the toy 'pocket'. "
        f"Default: {DEFAULT_MODEL}. With --url the server's name of it; default: the one that it has."
    ),
]
Url = Annotated[
    str | None, typer.Option(help="Talk with a server of OpenAI's API, such as http://127.0.0.1:8000/v1, instead.")
]
KeyFile = Annotated[
    Path | None, typer.Option(help="A file with the API key for --url; or set SELFDRAFT_API_KEY.", metavar="FILE")
]
LOADING = ("adapter", "lora", "quantization", "dtype", "kv_cache_dtype", "threads", "no_cache")
"""Options that say how a model is loaded here: with --url the server has done that."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The options of the verb, in the order of its help."""

    model: Model = None
    url: Url = None
    api_key_file: KeyFile = None
    drafter: Drafter = None
    speculative_config: Config = None
    adapter: Adapters = None
    lora: Lora = None
    quantization: Quantized = "auto"
    system: System = None
    max_new_tokens: MaxNew = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    kv_cache_dtype: KvCacheDtype = "auto"
    threads: Threads = None
    no_cache: NoCache = False


def chat(given: ChatOptions) -> None:
    """Talk with a model through its template. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    sampling = SamplingParams(
        temperature=given.temperature, top_p=given.top_p, seed=given.seed, max_tokens=given.max_new_tokens
    )
    opening = opening_of(given.system)
    if given.url is not None:
        with remote_model(given.url, given.api_key_file, given.model, fields_of(given)) as remote:
            terminal.note(f"{remote.name} at {remote.url}")
            converse(ask, remote.reply, opening)
        return
    if given.api_key_file is not None:
        raise OptionError("--api-key-file has no use without --url")
    llm = open_llm(
        given.model or DEFAULT_MODEL,
        given.drafter,
        given.speculative_config,
        given.dtype,
        "bitwise",
        given.threads,
        given.adapter,
        no_cache=given.no_cache,
        lora=given.lora,
        quantization=given.quantization,
        kv_cache_dtype=given.kv_cache_dtype,
        device=given.device,
        engine=EngineSizes(prefix_caching=True),
    )
    converse(ask, lambda messages: reply(llm, messages, sampling), opening)


def fields_of(given: ChatOptions) -> dict[str, object]:
    """What the options put into every request to a server. Errors: OptionError for those that it cannot be told."""
    defaults = {field.name: field.default for field in fields(given)}
    odd = next((name for name in LOADING if getattr(given, name) != defaults[name]), None)
    if odd is not None:
        raise OptionError(f"--{odd.replace('_', '-')} has no use with --url: the server has loaded the model")
    if given.drafter is not None and given.speculative_config is not None:
        raise OptionError("--drafter and --speculative-config say the same to a server: give one of them")
    config = parse_config(given.speculative_config)
    if given.drafter is not None:
        config = {"method": given.drafter}
    asked = {"top_p": given.top_p if given.top_p != 1.0 else None, "seed": given.seed, "speculative_config": config}
    return {
        "max_tokens": given.max_new_tokens,
        "temperature": given.temperature,
        **{name: value for name, value in asked.items() if value is not None},
    }


def reply(llm: LLM, messages: list[dict[str, str]], sampling: SamplingParams) -> str:
    """The model's answer, shown as it comes; after Ctrl-C the text so far. Errors: RequestError."""
    last, clock = None, Clock()
    try:
        for piece in llm.stream(llm.render(messages), sampling):
            last = piece
            clock.saw(piece.num_output_tokens)
            show_piece(piece)
    except KeyboardInterrupt:
        terminal.write("\n")
        terminal.note("stopped; the text so far stays in the conversation")
    else:
        show_figures(piece.stats, clock, llm.drafter_name)
        note_full_context(piece, sampling.max_tokens, llm)
    return last.output.text if last is not None else ""


def ask() -> str | None:
    """A line of the user; None at its end."""
    try:
        said = terminal.out.input(Text("> ", style="bold"))
    except (EOFError, KeyboardInterrupt):
        terminal.out.print()
        return None
    return said.strip() or None


verb = as_verb(ChatOptions, chat)
