"""The toy drafter of CONTRIBUTING.md is run as it stands there: small, and it joins the oracle by one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfdraft import drafters
from selfdraft.errors import OptionError
from selfdraft.testing import check_drafter
from selfdraft.types import SamplingParams
from tests.models import run, tiny_target

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
ERRORS = PAGE.parent / "recipes" / "troubleshooting.py"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the toy drafter, entered into the table by the very line of the page."""
    source, line = blocks()[:2]
    monkeypatch.setattr(drafters, "NAMES", dict(drafters.NAMES))
    names: dict[str, object] = {"NAMES": drafters.NAMES}
    exec(source + line, names)
    return "ping_pong"


def test_the_toy_is_under_30_lines() -> None:
    assert len([line for line in blocks()[0].splitlines() if line.strip()]) < 30


@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=40), SamplingParams(temperature=0.9, max_tokens=40)])
def test_the_toy_keeps_the_text(toy: str, sampling: SamplingParams) -> None:
    prompts = [[5, 6, 5, 6], [1], list(range(30))]
    plain = run(tiny_target(slots=2), "none", prompts, sampling, slots=2)
    drafted = run(tiny_target(slots=2), toy, prompts, sampling, slots=2)
    assert [s.tokens for s in drafted] == [s.tokens for s in plain]
    assert sum(s.stats.num_draft_tokens for s in drafted) > 0


def test_the_toy_is_built_with_checked_options(toy: str) -> None:
    target = tiny_target()
    assert drafters.build(toy, target, {"num_speculative_tokens": 2})
    with pytest.raises(OptionError, match="no option 'window_size': it belongs to lookahead"):
        drafters.build(toy, target, {"window_size": 2})


def test_the_oracle_of_the_page_proves_the_toy() -> None:
    names: dict[str, object] = {}
    toy, _, proof, _ = blocks()
    exec(toy + proof, names)
    names["test_ping_pong"]()  # type: ignore[operator]


@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=40), SamplingParams(temperature=0.9, max_tokens=40)])
def test_the_drafter_with_a_pass_of_its_own_keeps_the_text(sampling: SamplingParams) -> None:
    names: dict[str, Any] = {}
    exec(blocks()[3], names)
    check_drafter(names["LowerHalf"])
    prompts = [[5, 6, 5, 6], [1], list(range(30))]
    target = tiny_target(slots=2)
    plain = run(tiny_target(slots=2), "none", prompts, sampling, slots=2)
    drafted = run(target, names["LowerHalf"](target), prompts, sampling, slots=2)
    assert [s.tokens for s in drafted] == [s.tokens for s in plain]
    assert sum(s.stats.num_draft_tokens for s in drafted) > 0


def test_the_page_of_errors_is_what_the_source_says() -> None:
    done = subprocess.run([sys.executable, str(ERRORS), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
