"""README and docs do not rot: their Python runs as written, their commands name verbs and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from selfdraft.drafters import NAMES, options_of
from selfdraft.models.checkpoint.embedded import installed
from tests.terminal import command_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/methods/*.md"))]
RUN = [README, ROOT / "docs" / "usage.md", ROOT / "docs" / "drafters.md"]
"""Pages whose Python is run."""


@pytest.mark.skipif(installed("smollm2") is None, reason="smollm2 is not installed: run 'selfdraft pull smollm2'")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_python_runs_as_written(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    assert "print(" not in "".join(blocks) or capsys.readouterr().out


def commands(page: Path) -> list[str]:
    """Lines of a page that call selfdraft; a line that ends in a backslash goes on with the next."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in fenced if language in ("", "sh", "bash", "console")]
    return re.findall(r"^(?:\$ )?selfdraft (.*)$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_exist(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)
        command = command_of(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line


def test_there_are_commands_to_look_at() -> None:
    assert len(commands(README)) >= 4
    assert sum(len(commands(page)) for page in PAGES) > 20


def test_the_table_lists_every_drafter_and_option() -> None:
    text = (ROOT / "docs" / "drafters.md").read_text()
    for name, factory in NAMES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert [option for option in options_of(factory) if f"`{option}`" not in row] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


SOURCE = ROOT / "src" / "selfdraft"
FILES = {path.relative_to(place).as_posix() for place in (ROOT, SOURCE) for path in place.rglob("*.py")}
"""Python files by their path in the repository, and by that in the package."""
TEXTS = [*PAGES, *sorted(ROOT.glob("docs/decisions/*.md")), *sorted(SOURCE.rglob("*.py"))]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    """`name.py` in pages and docstrings, also as the end of a path. The log may name what has gone."""
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text()) if page.name != "log.md" else []
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)] == []
