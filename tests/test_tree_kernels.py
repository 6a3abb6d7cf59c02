"""Triton's tree attention without a GPU: what it says in the interpreter, and what it compiles to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree_kernels import ARCHITECTURES, CASES, WIDTHS, lines

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install 'selfdraft[gpu]'"
)
ERROR = 1e-6


def told(what: str, folder: Path, **environment: str) -> dict[str, dict[str, float]]:
    """What `tests.tree_kernels` prints, in a process of its own; what it compiles is kept in `folder`."""
    command = [sys.executable, "-m", "tests.tree_kernels", what]
    around = os.environ | {"TRITON_CACHE_DIR": str(folder)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=around, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_the_kernels_say_what_the_specification_says(tmp_path: Path) -> None:
    said = told("interpreted", tmp_path, TRITON_INTERPRET="1")
    assert {*said["errors"]} == {*CASES}
    assert max(said["errors"].values()) < ERROR, said
    assert {*said["equal"].values()} == {len(lines())}


def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    """For each architecture and width of heads, without a GPU."""
    said = told("compiled", tmp_path)
    assert len(said) == 2 * len(ARCHITECTURES) * len(WIDTHS)
    assert not {name: counted for name, counted in said.items() if counted["spilled"]}
