"""How many files one decode step goes through: what somebody has to open to follow a token."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest

import selfdraft
from selfdraft import LLM, SamplingParams
from tests.clocks import Ticking

ROOT = Path(selfdraft.__file__).parent


def entered(name: str, options: dict[str, object]) -> set[str]:
    """Files of this package in which a function is called in one decode step, with the tree of all sources."""
    llm = LLM("pocket", drafter=name, speculative_config={"method": name, **options}, clock=Ticking(0.01))
    (sequence,) = llm.requests("One day the red ball was red. One day the red ball", SamplingParams(max_tokens=40))
    engine = llm.engine  # asking for it is no part of a step
    engine.submit(sequence)
    for _ in range(5):
        engine.advance()
    files = set[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            files.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        engine.advance()
    finally:
        sys.setprofile(before)
    return files


@pytest.mark.parametrize(
    ("name", "options", "most"), [("none", {}, 16), ("auto", {"bits": False}, 25), ("auto", {"bits": 4}, 29)]
)
def test_a_step_stays_within_a_few_files(name: str, options: dict[str, object], most: int) -> None:
    files = entered(name, options)
    assert f"drafters/{name}.py" in files
    assert len(files) <= most, sorted(files)
