"""A run in parts: one that fails does not end the run, and what is done is written at once."""

from __future__ import annotations

import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from gpu_runs.bench import Bench
from selfdraft.files.atomic import whole_file
from selfdraft.models.device import gpu_facts

LONG = ("all", "end", "why")
"""What stands in the file alone."""
Figure = dict[str, object]
"""What was measured: its name (`figure`), of what (`shape`, `tokens` ...), its `value` and `unit`."""


class CheckFailed(Exception):
    """A figure that came before is not what it must be."""


@dataclass
class Run:
    """One run: what it has found so far, and the file that it is written into."""

    verb: str
    bench: Bench
    folder: Path
    minutes: float = 9.0
    parts: list[dict[str, object]] = field(default_factory=list)
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.began = self.bench.clock()
        self.conditions = {**conditions(self.bench), "clocks_before": clocks(self.bench)}

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
                for figure in part():
                    figures.append(figure)
            except CheckFailed as error:
                note["failed"] = str(error)
            except Exception as error:  # whatever breaks here: the next part may still say something
                note["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
                note["trace"] = traceback.format_exc()[-2000:]
            self.bench.let_go()
        note["seconds"] = round(self.bench.clock() - began, 1)
        self.write()

    def write(self) -> None:
        """Everything so far, as one JSON file."""
        self.conditions["clocks_after"] = clocks(self.bench)
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
