"""The README does not rot: its Python runs as written, its commands name verbs and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from selfdraft.drafters import NAMES, options_of
from selfdraft.models.checkpoint.embedded import installed
from tests.terminal import command_of

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.skipif(installed("smollm2") is None, reason="smollm2 is not installed: run 'selfdraft pull smollm2'")
def test_the_python_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/tune.md", "docs/bench.md", "docs/training.md"])
def test_the_commands_exist(page: str) -> None:
    lines = re.findall(r"^selfdraft ([^#\n]*)", (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line)
        command = command_of(words)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_table_lists_every_drafter_and_option() -> None:
    for name, factory in NAMES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", TEXT, re.MULTILINE)
        assert [option for option in options_of(factory) if f"`{option}`" not in row] == []
