"""Inside a command of click that is not ours (`serve run` of Ray): whether one runs, and how it shows an error."""

from __future__ import annotations

import click


def running() -> bool:
    """Whether a command of click runs in this thread."""
    return click.get_current_context(silent=True) is not None


def as_one_line(error: Exception) -> click.ClickException:
    """The error, as such a command shows it: in one line, with exit status 1."""
    return click.ClickException(str(error))
