"""The tables of docs/gpu.md, made of what the runs have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from gpu_runs.parts import Figure

NOT = "not measured"
BEGIN, END = "<!-- figures of recipes/gpu.py -->", "<!-- end of figures -->"
SHAPES = ("1b", "8b")
TITLES = {"1b": "1B", "8b": "8B"}
FEW = (1, 16, 64)
ANSWERS = {"sharegpt": "chat (sharegpt)", "instructcoder": "code editing (instructcoder)"}
PLAIN = (
    "transformers", "transformers, static cache, compiled", "ours, call by call", "ours, graphs",
    "ours, graphs, fused glue", "ours, graphs of one row", "ours, graphs of one row, fused glue",
)  # fmt: skip


class Unreadable(Exception):
    """A file that is no result of a run; says which."""


class Figures:
    """All figures of some files, by what they are of; of equal ones the last counts."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.conditions: dict[str, object] = {}
        self._all: list[tuple[str, Figure]] = []
        for file in files:
            try:
                whole = json.loads(file.read_text("utf-8"))
                self.conditions = whole["conditions"]
                self._all += [(whole["verb"], figure) for part in whole["parts"] for figure in part["figures"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise Unreadable(f"{file}: not what a run of recipes/gpu.py writes ({type(error).__name__})") from error

    def find(self, verb: str, name: str, **of: object) -> Figure | None:
        """The figure with this name of a run's file, and with these values."""
        found = [
            figure for run, figure in self._all
            if run == verb and figure.get("figure") == name and all(figure.get(key) == v for key, v in of.items())
        ]  # fmt: skip
        return found[-1] if found else None

    def cell(self, verb: str, name: str, show: Callable[[Figure], str], **of: object) -> str:
        """A cell of a table."""
        found = self.find(verb, name, **of)
        return NOT if found is None else show(found)


def number(digits: int, key: str = "value", unit: str = "", factor: float = 1.0) -> Callable[[Figure], str]:
    """Shows a number of a figure."""

    def show(figure: Figure) -> str:
        value = figure.get(key)
        return f"{factor * value:.{digits}f}{unit}" if isinstance(value, int | float) else NOT

    return show


def tables(files: SequenceOf[Path]) -> str:
    """All tables, as Markdown."""
    found = Figures(files)
    return "\n\n".join([_conditions(found), _speed(found), _plain(found), _contexts(found)]) + "\n"


def _conditions(found: Figures) -> str:
    card = found.conditions.get("gpu")
    if not card:
        return "No run on a GPU is recorded."
    names = (
        "compute_capability",
        "driver",
        "cuda",
        "cudnn",
        "torch",
        "triton",
        "transformers",
        "dtype",
        "clocks_after",
    )
    rest = ", ".join(f"{name.replace('_', ' ')} {found.conditions.get(name)}" for name in names)
    return f"{card}; {rest}."


def _rows(head: SequenceOf[str], lines: Iterable[SequenceOf[str]]) -> str:
    shown = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def _speed(found: Figures) -> str:
    def line(title: str, name: str, show: Callable[[Figure], str], **of: object) -> list[str]:
        return [title, *(found.cell("speed", name, show, shape=shape, **of) for shape in SHAPES)]

    drafted = {"drafter": "auto", "temperature": 0.0}
    lines = [
        line("bound of memory, ms a token", "bound", number(2)),
        line("plain decoding, ms a token", "plain", number(2)),
        line("plain decoding, share of the bound", "plain by bound", number(0, unit=" %")),
        line("T(16) by T(1), 4,096 tokens", "T(n), classes", number(2, "by_T(1)"), tokens=4096, rows=16),
        line("T(64) by T(1), 4,096 tokens", "T(n), classes", number(2, "by_T(1)"), tokens=4096, rows=64),
        *(
            line(f"`auto`, times plain, {title}", "recorded answers", number(2, "times_plain", "x"), log=log, **drafted)
            for log, title in ANSWERS.items()
        ),
        line(
            "host's share of a step, `auto`, chat", "recorded answers", number(1, "host_share", " %", 100),
            log="sharegpt", **drafted,
        ),
        line(
            "accepted tokens as `selfdraft replay` counts", "recorded answers",
            lambda figure: "equal" if figure["accepted_as_replay"] else "NOT EQUAL", log="sharegpt", **drafted,
        ),
        line("exactness", "level", lambda figure: str(figure["value"])),
        line("tokens that differ from plain", "tokens that differ", lambda f: f"{f['value']} of {f['tokens']}"),
    ]  # fmt: skip
    return _rows(["", *(TITLES[shape] for shape in SHAPES)], lines)


def _plain(found: Figures) -> str:
    lines = [
        [name, *(found.cell("check", name, number(2, unit=" ms"), shape=shape) for shape in SHAPES)] for name in PLAIN
    ]
    return _rows(["plain decoding behind 512 tokens", *(TITLES[shape] for shape in SHAPES)], lines)


def _contexts(found: Figures) -> str:
    lines = [
        [f"{TITLES[shape]}, {tokens:,} tokens{more}",
         *(found.cell("time", f"T(n){more}", number(2, unit=" ms"), shape=shape, tokens=tokens, rows=n) for n in FEW)]
        for shape in SHAPES for tokens in (512, 4096, 16384) for more in ("", ", fused glue")
    ]  # fmt: skip
    lines += [
        [f"{TITLES[shape]}, small kernels a block{more}",
         found.cell("time", f"kernels: small{more}", number(1), shape=shape), "", ""]
        for shape in SHAPES for more in ("", ", fused glue")
    ]  # fmt: skip
    return _rows(["pass of", "1 row", "16 rows", "64 rows"], lines)


def write(page: Path, files: SequenceOf[Path]) -> None:
    """Put the tables into the page, between its two marks. Errors: Unreadable."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise Unreadable(f"{page} has not the two lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{tables(files)}{END}{after}", "utf-8")
