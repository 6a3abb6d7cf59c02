"""The planted bugs still fit the code, and a sample of them is caught; `python -m tests.planted` replays them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfdraft.files.atomic import cache_folder
from tests.planted.bugs import BUGS, Bug

SAMPLE = ("prompt-penalty", "fast-gate-open")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_fits(bug: Bug) -> None:
    assert not bug.stale, f"{bug.file} has changed: write the bug anew"
    assert bug.old != bug.new


def test_names_are_unique() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 100


def test_bugs_are_planted_in_all_that_runs_by_default() -> None:
    runner = {f"models/runner/{name}" for name in ("runner.py", "trace.py", "tape.py")}
    runner |= {f"models/runner/kernels/{name}.h" for name in ("attention", "glue", "linear", "products")}
    drafting = {f"drafting/{name}.py" for name in ("autoregressive", "suffix_copy", "mixing", "source_tree")}
    models = {
        f"models/{name}.py" for name in ("attention", "target", "adapters", "early_states", "kv_cache", "rounded")
    }
    core = {f"core/{name}.py" for name in ("tree", "rows", "verify", "commit", "sampler", "noise", "one_row")}
    rest = {"core/detokenizer.py", "engine/engine.py", "engine/step.py", "llm.py", "hf.py", "sampling.py"}
    assert runner | drafting | models | core | rest <= {bug.file for bug in BUGS}


def test_a_sample_is_caught() -> None:
    command = [sys.executable, "-m", "tests.planted", *SAMPLE]
    built = os.environ | {"SELFDRAFT_CACHE": str(cache_folder("kernels").parent)}  # what these tests have built already
    home = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=home, env=built, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SAMPLE)} of {len(SAMPLE)}" in done.stdout
