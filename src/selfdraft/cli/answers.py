"""An answer as it comes, for generate and chat: text coloured by who proposed it, and the line of figures after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.color import ColorSystem
from rich.style import Style

from selfdraft.cli import terminal

if TYPE_CHECKING:
    from selfdraft.llm import LLM, Piece
    from selfdraft.types import Stats

Drafter = Annotated[str | None, typer.Option(help="Who guesses; 'none' is plain decoding. Default: auto.")]
System = Annotated[str | None, typer.Option(help="What the system message of the chat template says.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text. Default: a fresh one.")]

COLOURS = {
    "lookup": "green",
    "suffix": "cyan",
    "lookahead": "magenta",
    "layer_skip": "yellow",
    "quantised": "bright_yellow",
    "cascade": "bright_cyan",
    "rounded": "bright_cyan",
    "s3d": "bright_blue",
    "space": "bright_green",
}
"""Colour of accepted draft tokens by source; those of other drafters are blue."""


class Clock:
    """Seconds of one answer, those until its first tokens apart: they go with the length of the prompt."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.first: float | None = None
        """Seconds until the first tokens came; None before."""
        self._with_first = 0

    @property
    def seconds(self) -> float:
        """Seconds since the answer was asked for."""
        return time.perf_counter() - self._began

    def saw(self, tokens: int) -> None:
        """Note that the answer has `tokens` tokens now."""
        if self.first is None and tokens:
            self.first, self._with_first = self.seconds, tokens

    def speed(self, tokens: int) -> float | None:
        """Tokens per second of an answer that has `tokens` now, its first ones left out; None without others."""
        later = tokens - self._with_first
        return later / (self.seconds - self.first) if self.first is not None and later > 0 else None


def show_piece(piece: Piece) -> None:
    """A piece of streamed text in the colour of its last accepted draft token."""
    terminal.write(coloured(piece.text, piece.sources))


def coloured(text: str, sources: Sequence[str]) -> str:
    """A text in the colour of the last draft token among its sources; without one, or without colours, as it is."""
    drafted = [source for source in sources if source != "target"]
    colour = COLOURS.get(drafted[-1].split("+")[0], "blue") if drafted else ""
    if not colour or terminal.out.color_system is None:
        return text
    # rich would widen tabs and drop control characters
    return Style(color=colour).render(text, color_system=ColorSystem.STANDARD)


def show_figures(stats: Stats, clock: Clock, drafter: str) -> None:
    """The one line of figures that ends an answer."""
    speed = clock.speed(stats.num_output_tokens)
    line = f"{terminal.counted(stats.num_output_tokens, 'token')} in {terminal.counted(stats.num_steps, 'step')}"
    line += f" ({stats.mean_acceptance_length:.2f} a step)"
    if clock.first is not None:
        line += f", first token after {clock.first:.2f} s"
    if speed is not None:
        line += f", then {speed:.1f} tokens/s"
    if stats.num_draft_tokens:
        line += f", {drafter}: {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} draft tokens accepted"
    else:
        line += f", {drafter}"
    terminal.write("\n")
    terminal.show_dim(line)


def note_full_context(last: Piece, asked: int, llm: LLM) -> None:
    """Say of an answer of fewer tokens than were asked for that the model has no room for more."""
    if last.finish_reason == "length" and last.num_output_tokens < asked:
        terminal.show_dim(
            f"the answer ended at the {llm.target.max_length:,} tokens that the model takes, prompt and answer together"
        )
