"""The terminal as all verbs use it: the two streams, notes and errors, bars of progress, JSON."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def silence_libraries() -> None:
    """Keep the libraries' own progress bars and notices away from the text."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' reader of GGUF files has no other switch
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank whose store has gone would show a stack of C++
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torchao", "torch.utils._pytree", "bitsandbytes", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)


def replace_unencodable() -> None:
    """Replace what the terminal or pipe cannot take, where its encoding is not UTF-8, instead of ending in an error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def is_typed() -> bool:
    """Whether a person types what is read."""
    return sys.stdin is not None and sys.stdin.isatty()


def write(text: str) -> None:
    """Text to the output, as it is."""
    out.file.write(text)
    out.file.flush()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of the system where an output cannot take more."""


def give_up_output() -> None:
    """What is still to be written goes nowhere: else the interpreter would fail once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def dimmed(text: str) -> str:
    """A text in dim letters, where the output has such."""
    return text if out.color_system is None else Style(dim=True).render(text, color_system=ColorSystem.STANDARD)


def counted(number: object, noun: str, ending: str = "s") -> str:
    """A number with its noun, which gets an ending unless the number is 1."""
    return f"{number} {noun}{ending if number != 1 else ''}"


def print_json(value: object) -> None:
    """JSON on one line; where the output cannot take a character, its code, which means the same."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(out.file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    write(text + "\n")


def show_error(message: str) -> None:
    """An error, on one line of the error stream."""
    note(f"error: {message}")


def note(message: str) -> None:
    """One line on the error stream."""
    err.print(Text(" ".join(message.split())))


def show_dim(line: str) -> None:
    """A dim line on the error stream: figures beside the text."""
    err.print(Text(line, style="dim"))


def show_red(line: str) -> None:
    """A red line on the error stream."""
    err.print(Text(line, style="bold red"))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


@contextmanager
def progress(total: int, *, quiet: bool, what: str) -> Iterator[Callable[[], None]]:
    """A progress bar on the error stream, moved one step by each call."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
