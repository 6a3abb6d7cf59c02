"""The public names: they are listed, they are there, and each one says what it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

import selfdraft

NAMES = {
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Piece",
    "RequestOutput",
    "SamplingParams",
    "SelfdraftError",
    "Skip",
    "Stats",
    "generate",
    "load_drafter",
}


def test_they_are_these() -> None:
    """A name that comes or goes is a change for users: CHANGELOG.md."""
    assert {*selfdraft.__all__} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_there_and_documented(name: str) -> None:
    found = getattr(selfdraft, name)
    assert found.__doc__
    assert name in dir(selfdraft)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, selfdraft; print([m for m in ('torch', 'transformers', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
