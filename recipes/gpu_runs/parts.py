"""A run in parts: one that fails does not end the run, and what is done is written at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpu_runs.bench import Bench
from selfdraft.files.atomic import whole_file
from selfdraft.models.device import gpu_facts

LONG = ("all", "end", "why")
"""What stands in the file alone."""
Figure = dict[str, object]
"""What was measured: its name (`figure`), of what (`shape`, `tokens` ...), its `value` and `unit`."""


PART_SECONDS = 240.0
"""Most that a part may take; what hangs leaves time for the others then."""
OVER = 0.5
"""Minutes behind the last moment when a part may begin, at which it is ended."""
ENDING = 30.0
"""Seconds that a process has to end by itself."""


class CheckFailed(Exception):
    """A figure that came before is not what it must be, or a part has not ended. `trace` is that of another error."""

    def __init__(self, why: str, trace: str = "") -> None:
        super().__init__(why)
        self.trace = trace


def apart(
    part: Callable[[], Iterator[Figure]], seconds: float, known: dict[Any, Any] | None = None
) -> Iterator[Figure]:
    """The figures of a part that runs in a process of its own: what hangs or breaks there spoils no other part.

    After some errors a GPU does nothing more for the process that met them. Nothing here may have used the GPU before.
    What the part adds to `known` is added here. Errors: CheckFailed, also where it does not end in time.
    """
    known = {} if known is None else known
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_tell, args=(part, there, known))
    child.start()
    there.close()
    ends, patience = time.monotonic() + seconds, 0.0
    try:
        while here.poll(max(0.0, ends - time.monotonic())):
            kind, told = here.recv()
            if kind == "figure":
                yield told
                continue
            patience = ENDING
            if kind == "failed":
                raise CheckFailed(*told)
            known.update(told)
            return
        raise CheckFailed(f"it did not end in {seconds:.0f} s")
    except EOFError:
        child.join(ENDING)
        raise CheckFailed(f"its process ended with code {child.exitcode}") from None
    finally:
        here.close()
        child.join(patience)
        if child.is_alive():
            try:
                os.killpg(child.pid or 0, signal.SIGKILL)
            except ProcessLookupError:  # it has not begun
                child.kill()
            child.join()


def _tell(part: Callable[[], Iterator[Figure]], there: Connection, known: dict[Any, Any]) -> None:
    """The other side of `apart`."""
    os.setsid()  # what it starts ends with it
    try:
        for figure in part():
            there.send(("figure", figure))
        there.send(("known", known))
    except Exception as error:
        there.send(("failed", failure(error)))


def failure(error: Exception) -> tuple[str, str]:
    """What is told of an error: one line, and where it came from unless a check has failed."""
    if isinstance(error, CheckFailed):
        return str(error), error.trace
    return f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc()[-2000:]


def shown(line: str) -> None:
    """Print at once: who ends the run has all lines then."""
    print(line, flush=True)


@dataclass
class Run:
    """One run: what it has found so far, and the file that it is written into."""

    verb: str
    bench: Bench
    folder: Path
    minutes: float = 9.0
    parts: list[dict[str, object]] = field(default_factory=list)
    say: Callable[[str], None] = shown
    facts: dict[str, object] | None = None
    """The conditions, where they are known."""
    forks: bool = False
    """Whether every part gets a process of its own; see `apart`."""

    def __post_init__(self) -> None:
        self.began = self.bench.clock()
        self.conditions = {**(self.facts or conditions(self.bench)), "clocks_before": clocks(self.bench)}

    @property
    def path(self) -> Path:
        return self.folder / f"{self.verb}.json"

    def left(self) -> float:
        """Minutes that are left."""
        return self.minutes - (self.bench.clock() - self.began) / 60

    def do(self, name: str, part: Callable[[], Iterator[Figure]]) -> None:
        """Run one part, and write what there is. Nothing begins when the time is over."""
        note: dict[str, object] = {"part": name, "figures": []}
        self.parts.append(note)
        began = self.bench.clock()
        if self.left() <= 0:
            note["failed"] = f"not begun: the {self.minutes:g} minutes were over"
        else:
            self.say(f"{self.verb}: {name} ...")
            figures: list[Figure] = []
            note["figures"] = figures
            try:
                for figure in self._said(part):
                    figures.append(figure)
                    self.write()
            except Exception as error:  # whatever breaks here: the next part may still say something
                note["failed"], trace = failure(error)
                if trace:
                    note["trace"] = trace
        note["seconds"] = round(self.bench.clock() - began, 1)
        self.conditions["clocks_after"] = clocks(self.bench)
        self.write()

    def _said(self, part: Callable[[], Iterator[Figure]]) -> Iterator[Figure]:
        if self.forks:
            yield from apart(part, min(PART_SECONDS, 60 * (self.left() + OVER)), self.bench.known)
            return
        try:
            yield from part()
        finally:
            self.bench.let_go()

    def write(self) -> None:
        """Everything so far, as one JSON file; of a part that runs, too."""
        whole = {"verb": self.verb, "conditions": self.conditions, "parts": self.parts}
        with whole_file(self.path) as part:
            part.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")

    def end(self) -> int:
        """Show the table; the exit code: 1 if a part failed."""
        for line in table(self.parts):
            self.say(line)
        self.say(f"written: {self.path}")
        return int(any("failed" in part for part in self.parts))


def conditions(bench: Bench) -> dict[str, object]:
    """What the figures depend on."""
    found: dict[str, object] = {"gpu": None, **gpu_facts(bench.device)}
    for package in ("transformers", "triton"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = None
    cudnn = torch.backends.cudnn.version() if bench.device.type == "cuda" else None
    return {**found, "cudnn": cudnn, "torch": torch.__version__, "dtype": str(bench.dtype).removeprefix("torch.")}


def clocks(bench: Bench) -> str | None:
    """The clocks of the card as nvidia-smi says them: MHz of processors and of memory, degrees, watts."""
    if bench.device.type != "cuda":
        return None
    asked = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def table(parts: SequenceOf[dict[str, object]], most: int = 60) -> list[str]:
    """At most `most` lines: every part, its figures in short, and what failed."""
    lines = []
    for part in parts:
        lines.append(
            f"{part['part']} ({part['seconds']} s)" + (f": FAILED: {part['failed']}" if "failed" in part else "")
        )
        figures = part["figures"]
        assert isinstance(figures, list)
        for figure in figures:
            shown = ", ".join(f"{key} {_short(value)}" for key, value in figure.items() if key not in LONG)
            lines.append(f"  {shown}"[: _width()])
    if len(lines) > most:
        lines = [*lines[: most - 1], f"... {len(lines) - most + 1} more lines are in the file"]
    return lines


def _width() -> int:
    return int(os.environ.get("COLUMNS", "160"))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
