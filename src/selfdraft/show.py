"""What a person sees: streamed text coloured by source, one line of figures, tables."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.color import ColorSystem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from selfdraft.bench.compare import Comparison
    from selfdraft.llm import Piece
    from selfdraft.types import Stats

out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

COLOURS = {"lookup": "green", "suffix": "cyan", "lookahead": "magenta", "layer_skip": "yellow"}
"""Colour of accepted draft tokens by source; those of other drafters are blue."""

SAMPLE_PROMPTS = (
    "def fibonacci(n):\n",
    "Once upon a time there was a little dog who liked",
    "Natalia has 12 apples. She gives 5 apples to her friend. How many apples",
)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began


def hush() -> None:
    """Keep the libraries' own progress bars and notices away from the text."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def piece(new: Piece) -> None:
    """A piece of streamed text in the colour of its last accepted draft token."""
    drafted = [source for source in new.sources if source != "target"]
    colour = COLOURS.get(drafted[-1].split("+")[0], "blue") if drafted else ""
    plain = not colour or out.color_system is None
    # rich would widen tabs and drop control characters
    write(new.text if plain else Style(color=colour).render(new.text, color_system=ColorSystem.STANDARD))


def write(text: str) -> None:
    """Text to the output, as it is."""
    out.file.write(text)
    out.file.flush()


def heading(prompt: str) -> None:
    line = " ".join(prompt.split())
    out.print(Text(f"\n> {line[:100]}{'...' if len(line) > 100 else ''}", style="bold"))


def figures(stats: Stats, seconds: float, drafter: str) -> None:
    """The one line of figures that ends an answer."""
    speed = stats.num_output_tokens / seconds if seconds else 0.0
    line = f"{counted(stats.num_output_tokens, 'token')} in {counted(stats.num_steps, 'step')}"
    line += f" ({stats.mean_acceptance_length:.2f} a step), {speed:.1f} tokens/s"
    if stats.num_draft_tokens:
        line += f", {drafter}: {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} draft tokens accepted"
    else:
        line += f", {drafter}"
    write("\n")
    err.print(Text(line, style="dim"))


def counted(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending if number != 1 else ''}"


def comparison(result: Comparison, drafter: str) -> None:
    """Speed against plain decoding, or why there is none to tell."""
    if not result.texts_equal:
        err.print(Text("the texts DIFFER from plain decoding: no speed-up is given", style="bold red"))
        return
    line = f"plain {result.plain_tokens_per_second:.1f} tokens/s, {drafter} {result.drafted_tokens_per_second:.1f}"
    line += f" tokens/s: {result.speedup:.2f}x; texts equal: yes (median of {result.runs} runs each)"
    err.print(Text(line, style="dim"))


def verification(result: dict[str, Any], decode: Callable[[SequenceOf[int]], str]) -> None:
    """The verdict, and each mismatch with its place, both tokens and the logit gap."""
    for mismatch in result["mismatches"]:
        said = [f"{t} {decode([t])!r}" if t is not None else "the end" for t in (mismatch["expected"], mismatch["got"])]
        gap = f"{mismatch['gap']:.6g}" if mismatch["gap"] is not None else "unknown"
        out.print(
            f"prompt {mismatch['prompt']}, {mismatch['drafter']}: token {mismatch['position']} is {said[1]}, "
            f"expected {said[0]}; logit gap {gap}"
        )
    count = len(result["mismatches"])
    against = {"plain": "plain decoding", "hf": "transformers' greedy"}[result["against"]]
    out.print(
        f"{result['tokens_compared']} tokens compared with {against}, {counted(count, 'mismatch', 'es')} "
        f"({counted(result['prompts'], 'prompt')} x {', '.join(result['drafters'])}; {result['dtype']})"
    )
    if result["logit_rows_compared"]:
        out.print(f"logits bit-equal: {result['logit_rows_equal']} of {result['logit_rows_compared']} rows")
    if not result["mismatches"] and result["tokens_compared"]:
        out.print(f"95 % upper bound on mismatches per token: {3 / result['tokens_compared']:.1e}")


def diagnosis(result: dict[str, Any]) -> None:
    """The doctor's table."""
    facts = result["machine"]
    out.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value is not None))
    heads = ("dtype", "asked", "shapes", "tokens equal", "logit bits equal", "found")
    table = Table(*heads, box=None, pad_edge=False)
    for trial in result["trials"]:
        table.add_row(
            trial["dtype"],
            trial["exactness"],
            trial["shapes"],
            f"{trial['tokens_equal']}/{trial['tokens']}",
            f"{trial['rows_bitwise_equal']}/{trial['rows']}",
            trial["level"],
        )
    out.print(table)
    for trial in result["trials"]:
        if trial["exactness"] == "bitwise":
            out.print(f"{trial['dtype']}: {trial['promised']} promised, {trial['level']} found; {trial['why']}")


def document(value: Any) -> None:
    write(json.dumps(value, ensure_ascii=False) + "\n")


def complain(message: str) -> None:
    """An error, on one line of the error stream."""
    note(f"error: {message}")


def note(message: str) -> None:
    """One line on the error stream."""
    err.print(Text(" ".join(message.split())))


def ask() -> str | None:
    """A line of the user; None at its end."""
    try:
        said = out.input(Text("> ", style="bold"))
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None
    return said.strip() or None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on the error stream."""
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
