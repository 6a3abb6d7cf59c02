"""Typer verbs, thin over llm.py and the rooms. A user's mistake ends with one line and exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from selfdraft.cli import (
    bench,
    chat,
    doctor,
    generate,
    perplexity,
    pull,
    replay,
    results,
    serve,
    terminal,
    train,
    tune,
    verify,
)
from selfdraft.errors import SelfdraftError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Decode several tokens per forward pass with no second model. The text is exactly what it would have been.",
)
VERBS = (
    generate.verb,
    chat.verb,
    serve.verb,
    pull.pull,
    results.results,
    replay.replay,
    verify.verify,
    doctor.doctor,
    perplexity.verb,
    train.train,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selfdraft {version('selfdraft')}")
        raise typer.Exit


@app.callback()
def _before(
    shown: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop."),
    ] = False,
) -> None:
    """What stands before the verb: options of the program itself."""


for verb in VERBS:
    app.command()(verb)
app.add_typer(bench.app, name="bench")
app.add_typer(tune.app, name="tune")

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""typer's error for what it cannot parse; it has no public name that all versions share."""


def main() -> None:
    """Entry point: runs a verb and turns errors into one line and an exit code."""
    terminal.silence_libraries()
    terminal.replace_unencodable()
    try:
        # typer returns the code of an Exit, and 130 for Ctrl-C
        code = app(prog_name="selfdraft", standalone_mode=False) or 0
    except SelfdraftError as error:
        terminal.show_error(str(error))
        code = 2
    except UsageError as error:
        _explain(error)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        if error.errno not in terminal.FULL:
            raise
        terminal.give_up_output()
        terminal.show_error(f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        code = 2
    if code == 130:
        terminal.note("interrupted")
    sys.exit(code)


def _explain(error: Any) -> None:
    """A usage error in one line; without any argument typer's error is the help."""
    message = error.format_message().replace("Value error, ", "").rstrip(".?")
    where = error.ctx.command_path if error.ctx else "selfdraft"
    if message.startswith("Usage:"):
        terminal.err.print(message)
    else:
        terminal.show_error(f"{message}; see {where} --help")
