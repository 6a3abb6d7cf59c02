"""The planted bugs still fit the code, and a sample of them is caught; `python -m tests.planted` replays them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted.bugs import BUGS, Bug

SAMPLE = ("prompt-penalty", "signed-shift", "end-in-block")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_fits(bug: Bug) -> None:
    assert not bug.stale, f"{bug.file} has changed: write the bug anew"
    assert bug.old != bug.new


def test_names_are_unique() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 14


def test_a_sample_is_caught() -> None:
    command = [sys.executable, "-m", "tests.planted", *SAMPLE]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SAMPLE)} of {len(SAMPLE)}" in done.stdout
