"""The verb `tune`: this machine measured, or the best settings of a drafter found. One file for each sub-command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from selfdraft.cli.tune import layer_skip, lookahead, machine, s3d, task

METHODS = {"auto": "machine", "layer_skip": "layer-skip", "s3d": "s3d", "lookahead": "lookahead"}
"""What --method, the older spelling, calls the sub-commands."""


def forwarded(arguments: Sequence[str]) -> list[str]:
    """The arguments behind `tune` with a sub-command first: --method's, or the machine's when none is named.

    Errors: typer.BadParameter when there is no such method.
    """
    if arguments and (arguments[0] == "--help" or not arguments[0].startswith("-")):
        return [*arguments]
    method, rest = "auto", list[str]()
    words = iter(arguments)
    for word in words:
        name, sign, value = word.partition("=")
        if name == "--method":
            method = value if sign else next(words, "")
        else:
            rest.append(word)
    if method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise typer.BadParameter(f"{method!r} is not one of {names}", param_hint="'--method'")
    return [METHODS[method], *rest]


class SubCommands(TyperGroup):
    """The sub-commands of `tune`, of which one is understood when none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, parsed with a sub-command first. Errors: typer.BadParameter."""
        try:
            return super().parse_args(ctx, forwarded(args))
        except typer.BadParameter as error:
            error.ctx = error.ctx or ctx
            raise


app = typer.Typer(
    cls=SubCommands,
    add_completion=False,
    rich_markup_mode=None,
    help="""Measure this machine, or tune a drafter.

    Without a command the machine is measured, with the options of 'tune machine'. The older spelling, --method
    layer_skip and its like, still works. What the figures mean: docs/tune.md.""",
)
app.command("machine")(machine.tune_machine)
app.command("layer-skip")(layer_skip.tune_layer_skip)
app.command("s3d")(s3d.tune_s3d)
app.command("lookahead")(lookahead.tune_lookahead)
app.command("task")(task.tune_task)
