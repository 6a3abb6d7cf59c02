"""The command line as a user meets it: what was typed, and what came back."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from typer.main import get_command

from selfdraft import cli
from selfdraft.cli.tune import forwarded


@dataclass(frozen=True)
class Done:
    """Exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> Any:
        return json.loads(self.out)


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """Runs `selfdraft` with arguments in this process, errors and exit code included."""
    monkeypatch.setattr(sys, "argv", ["selfdraft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    code = ending.value.code
    return Done(code if isinstance(code, int) else 0, *capsys.readouterr())


def one_line(done: Done, words: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert done.err.count("error:") == 1
    assert words in done.err


def command_of(words: Sequence[str]) -> Any:
    """The command that these words behind `selfdraft` begin with: a verb, or a sub-command of one."""
    if words[0] == "tune":
        words = ["tune", *forwarded(words[1:])]
    command: Any = get_command(cli.app)
    for word in words:
        if word not in getattr(command, "commands", ()):
            break
        command = command.commands[word]
    return command
