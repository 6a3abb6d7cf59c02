"""The verb `chat`: a conversation with a model at the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from selfdraft.cli import terminal
from selfdraft.cli.answers import Clock, Drafter, Seed, System, Temperature, TopP, show_figures, show_piece
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    Config,
    Dtype,
    EngineSizes,
    Lora,
    MaxNew,
    Model,
    NoCache,
    Threads,
    open_llm,
    opening_of,
)
from selfdraft.errors import RequestError
from selfdraft.types import SamplingParams

if TYPE_CHECKING:
    from selfdraft.llm import LLM


def chat(
    model: Model = DEFAULT_MODEL,
    drafter: Drafter = None,
    speculative_config: Config = None,
    adapter: Adapters = None,
    lora: Lora = None,
    system: System = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    no_cache: NoCache = False,
) -> None:
    """Talk with a model through its template. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_new_tokens)
    llm = open_llm(
        model,
        drafter,
        speculative_config,
        dtype,
        "bitwise",
        threads,
        adapter,
        no_cache=no_cache,
        lora=lora,
        engine=EngineSizes(prefix_caching=True),
    )
    opening = opening_of(system)
    messages = [*opening]
    while (said := ask()) is not None:
        messages.append({"role": "user", "content": said})
        try:
            answer = reply(llm, messages, sampling)
        except RequestError as error:
            terminal.show_error(f"{error}; the conversation starts anew")
            messages = [*opening]
        else:
            messages.append({"role": "assistant", "content": answer})


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
    return last.output.text if last is not None else ""


def ask() -> str | None:
    """A line of the user; None at its end."""
    try:
        said = terminal.out.input(Text("> ", style="bold"))
    except (EOFError, KeyboardInterrupt):
        terminal.out.print()
        return None
    return said.strip() or None
