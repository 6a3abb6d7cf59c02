"""The README does not rot: its Python runs as written, its commands name verbs and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from selfdraft.cli import app
from selfdraft.drafters import NAMES, options_of
from selfdraft.models.checkpoint.embedded import installed

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.skipif(installed("smollm2") is None, reason="smollm2 is not installed: run 'selfdraft pull smollm2'")
def test_the_python_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out


def test_the_commands_exist() -> None:
    group = get_command(app)
    lines = re.findall(r"^selfdraft (.*)$", TEXT, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        verb, *arguments = shlex.split(line)
        known = {option for parameter in group.commands[verb].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert {word for word in arguments if word.startswith("--")} <= known


def test_the_table_lists_every_drafter_and_option() -> None:
    for name, factory in NAMES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", TEXT, re.MULTILINE)
        assert [option for option in options_of(factory) if f"`{option}`" not in row] == []
