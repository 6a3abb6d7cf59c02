"""Replay planted bugs: copy the source, break one line, and require that the quick tests see it.

`python -m tests.planted [name ...]`; exit 1 when a bug survives, a text no longer matches, or sound code fails.
This process imports torch and transformers once, but never selfdraft; every bug runs in a fork of it that puts the
broken copy first on its path. So a bug costs its tests and not the imports. Built kernels are shared (their name is
that of their contents), below SELFDRAFT_CACHE where that is set; the rest of the cache is new for each bug.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from tests.planted.bugs import BUGS, QUICK, SOURCE, Bug

WARM = (
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
)
PATIENCE = 600
"""Seconds after which a run that does not end counts as failed."""


class FirstFailure:
    """Writes down the test that failed first."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.note.exists():
            self.note.write_text(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.note.exists():
            self.note.write_text(f"{report.nodeid} (import)")


def broken_copy(bug: Bug | None, place: Path) -> None:
    """The source below `place`, with the bug in it."""
    shutil.copytree(SOURCE, place, ignore=shutil.ignore_patterns("__pycache__"))
    if bug is not None:
        file = place / "selfdraft" / bug.file
        file.write_text(file.read_text().replace(bug.old, bug.new))


def run_tests(place: Path, note: Path, kernels: Path, instructions: str | None) -> int:
    """In the fork: 0 when all quick tests pass, 1 when one fails, 3 when not the copy was tested."""
    own = note.with_name("cache")
    own.mkdir()
    (own / "kernels").symlink_to(kernels, target_is_directory=True)
    os.environ["SELFDRAFT_CACHE"] = str(own)
    if instructions is not None:
        os.environ["SELFDRAFT_INSTRUCTIONS"] = instructions
    signal.alarm(PATIENCE)
    quiet = os.open(note.with_name("log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest objects to plugins that were imported before it
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(place))
    found = importlib.import_module("selfdraft").__file__
    if found is None or not Path(found).is_relative_to(place):
        return 3
    return int(bool(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *QUICK], plugins=[FirstFailure(note)])))


def replay(bug: Bug | None, kernels: Path) -> tuple[bool, str]:
    """(whether the quick tests failed, the test that saw it). Kernels are built into the folder `kernels`."""
    with tempfile.TemporaryDirectory() as folder:
        place, note = Path(folder).resolve() / "src", Path(folder) / "note"
        broken_copy(bug, place)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                code = run_tests(place, note, kernels, bug.instructions if bug else None)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return True, "did not end" if os.WTERMSIG(status) == signal.SIGALRM else "crashed"
        if os.WEXITSTATUS(status) == 3:
            raise SystemExit("the copy could not be tested:\n" + (Path(folder) / "log").read_text())
        return os.WEXITSTATUS(status) != 0, note.read_text() if note.exists() else ""


def left_out(bug: Bug) -> str:
    """Why this machine cannot show a bug; nothing where it can."""
    if bug.compiled and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "there is no C++ compiler"
    facts = Path("/proc/cpuinfo")
    if bug.instructions == "avx2" and not (facts.is_file() and " avx2 " in facts.read_text()):
        return "this processor has no AVX2"
    return ""


def main(names: list[str]) -> int:
    unknown = set(names) - {bug.name for bug in BUGS}
    if unknown:
        raise SystemExit(f"there is no bug {', '.join(sorted(unknown))}")
    for module in WARM:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    chosen: list[Bug | None] = [bug for bug in BUGS if bug.name in names] if names else [None, *BUGS]
    for bug in [bug for bug in chosen if bug is not None]:
        if why := left_out(bug):
            print(f"--  {bug.name:24} left out: {why}")
            chosen.remove(bug)
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(os.environ.get("SELFDRAFT_CACHE", folder)).resolve() / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        bad = sum(not as_it_should_be(bug, kernels) for bug in chosen)
    print(f"{len(chosen) - bad} of {len(chosen)} as they should be")
    return int(bad > 0)


def as_it_should_be(bug: Bug | None, kernels: Path) -> bool:
    """Whether a bug is caught, or sound code passes (None); says so."""
    start = time.monotonic()
    failed, test = (False, "") if bug and bug.stale else replay(bug, kernels)
    fine = failed == (bug is not None)
    verdict = "STALE" if bug and bug.stale else test.rpartition("::")[2] if failed else "all pass"
    name, what = (bug.name, bug.what) if bug else ("(no bug)", "sound code passes")
    print(f"{'ok ' if fine else 'BAD'} {name:24} {time.monotonic() - start:5.1f} s  {what}: {verdict}", flush=True)
    return fine


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
