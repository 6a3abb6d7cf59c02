"""No test looks at a real clock: its outcome would depend on the machine and on what else runs there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfdraft import LLM
from selfdraft.drafters import NAMES, build, options_of
from selfdraft.drafting.estimators import TRUSTED
from selfdraft.tune.sublayer_times import clock_of
from selfdraft.types import SamplingParams
from tests.clocks import Passes, Ticking, on_passes
from tests.models import run, tiny_llama, tiny_target

LOOKS = ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time.time", "process_time", "sleep")
REASONS = {
    "killing.py": "processes are killed at random moments; the result must be the same at every moment",
    "test_tune_skip.py": "processes are killed at random moments; the result must be the same at every moment",
    "test_bench_measure.py": "the clock of the measurements is replaced by one that ticks",
    "test_bench_peers.py": "waits, up to ten minutes, until another process is gone",
    "test_bench_sandbox.py": "waits, up to ten minutes, until another process is gone",
    "fake_server.py": "sleeps in the virtual time of its event loop",
    "serving.py": "waits, up to ten minutes, until a server has started or has nothing left to do",
    "ranks.py": "waits, up to a few minutes, until processes have ended, and tells when; nothing is asserted of it",
    "test_ray_llm.py": "waits, up to fifteen minutes, until a server answers, and a minute until it tells its counters",
    "test_vllm_engine.py": "waits, up to ten minutes, until another process answers",
    "planted/__main__.py": "prints how long a bug took",
}


def looks(tree: ast.Module) -> Iterator[str]:
    """Where a clock is read or waited for: by import, or as an attribute of `time`; texts in quotes do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield f"{node.lineno}: from time"
        elif isinstance(node, ast.Import) and any(alias.name == "time" for alias in node.names):
            yield f"{node.lineno}: import time"
        elif isinstance(node, ast.Attribute) and node.attr in LOOKS:
            yield f"{node.lineno}: {node.attr}"


def test_no_test_looks_at_a_clock_without_a_reason() -> None:
    root = Path(__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if list(looks(ast.parse(path.read_text())))}
    assert found == {*REASONS}


@pytest.mark.parametrize("line", ["import time", "from time import sleep", "x.perf_counter()", "a.sleep(1)"])
def test_it_can_tell(line: str) -> None:
    assert list(looks(ast.parse(line)))
    assert not list(looks(ast.parse("code = 'import time'\ntimed(timeout=3)")))


def test_the_clock_is_no_option_and_comes_from_the_target() -> None:
    clock = Ticking()
    target = tiny_target()
    target.clock = clock
    for name, factory in NAMES.items():
        assert "clock" not in options_of(factory)
        drafter = build(name, target)
        assert getattr(drafter, "clock", clock) is clock, name
    assert clock_of(target) is clock


def test_a_front_door_hands_it_on() -> None:
    clock = Ticking(0.001)
    llm = LLM(tiny_llama(), drafter="lookahead", clock=clock)
    assert llm.target.clock is clock
    before = clock.now
    llm.generate([3, 4, 5], SamplingParams(max_tokens=8))
    assert clock.now > before


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("none", "lookup", "suffix")])
def test_the_same_clock_gives_the_same_drafts(name: str) -> None:
    """Whatever a machine does meanwhile: two runs draft the same trees, node by node."""
    sampling, said = SamplingParams(max_tokens=12 * TRUSTED, temperature=1.0, seed=3), []
    for _ in range(2):
        texts = run(tiny_target(), name, [[1, 2, 3], [4, 5, 4, 5]], sampling)
        said.append([(s.stats.num_draft_tokens, s.stats.num_draft_passes, s.stats.acceptance_histogram) for s in texts])
    assert said[0] == said[1]
    assert sum(tokens for tokens, *_ in said[0]) > 0 or name == "prediction"


def test_a_clock_that_passes_move() -> None:
    clock = Passes(whole=2.0, short=0.5, row=0.25)
    target = on_passes(tiny_target(), clock)
    run(target, "none", [[1, 2, 3]], SamplingParams(max_tokens=3))
    assert target.clock() == 3 * 2.0 + (3 + 1 + 1) * 0.25
