"""Models and quantizations beside plain decoding of the bf16 one: speed, memory, and speed by memory."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selfdraft.bench.report import memory_of
from selfdraft.bench.rows import Row
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from selfdraft.bench.sheets import Sheet

MIB = 2**20
HEADS = (
    *("model", "dtype", "drafter", "tokens/s", "weights MiB", "peak MiB", "resident MiB"),
    *("speed by bf16 plain", "memory by bf16 plain", "speed by memory"),
)


@dataclass(frozen=True, slots=True)
class Standing:
    """A drafter on a model, over the prompts that the reference has, too; ratios are to plain decoding in bf16."""

    facts: JsonObject
    drafter: str
    tokens_per_second: float
    memory: JsonObject
    speed: float
    relative_memory: float | None

    @property
    def speed_by_memory(self) -> float | None:
        """The speed-memory ratio; None where memory could not be read."""
        return self.speed / self.relative_memory if self.relative_memory else None

    @property
    def cells(self) -> list[str]:
        """The cells of its row, in the order of HEADS."""
        sizes = [self.memory[name] for name in ("weights_bytes", "peak_bytes", "resident_bytes")]
        dtype = ", ".join([str(self.facts["dtype"]), *self.facts.get("blocks", {})])
        ratios = (self.speed, self.relative_memory, self.speed_by_memory)
        return [
            Path(str(self.facts["model"])).name,
            dtype,
            "plain" if self.drafter == "none" else self.drafter,
            f"{self.tokens_per_second:.1f}",
            *("-" if size is None else f"{size / MIB:.0f}" for size in sizes),
            *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        ]


def is_bf16(facts: JsonObject) -> bool:
    """Whether these conditions are those of a model in bf16 that nothing was rounded in."""
    whole = not facts.get("blocks") and not str(facts["model"]).lower().endswith(".gguf")
    return bool(facts["dtype"] == "bfloat16" and whole)


def standings(sheets: SequenceOf[Sheet]) -> list[Standing]:
    """Every drafter of our own on every model, the bf16 one first.

    Empty unless exactly one of several sheets is of a model in bf16: then there is nothing to compare with, or it is
    not clear what. A sheet without a prompt in common with it is left out.
    """
    references = [sheet for sheet in sheets if is_bf16(sheet.conditions)]
    if len(sheets) < 2 or len(references) != 1:
        return []
    plain = {_prompt(row): row for row in references[0].of("none") if "memory" in row}
    found = []
    for sheet in sorted(sheets, key=lambda one: one is not references[0]):
        base = [row for row in sheet.of("none") if _prompt(row) in plain]
        for label in sheet.labels:
            rows = [row for row in sheet.of(label) if _prompt(row) in plain and row.get("peer") is None]
            if rows and base:
                found.append(_standing(sheet.conditions, label, rows, base, [plain[_prompt(row)] for row in rows]))
    return found


def _prompt(row: Row) -> tuple[str, str]:
    return str(row["task"]), str(row["key"])


def _standing(
    facts: JsonObject, label: str, rows: SequenceOf[Row], base: SequenceOf[Row], reference: SequenceOf[Row]
) -> Standing:
    memory, wanted = memory_of(rows, base), memory_of(reference, reference)
    own, other = _speed(rows), _speed(reference)
    relative = memory["peak_bytes"] / wanted["peak_bytes"] if wanted["peak_bytes"] else None
    return Standing(facts, label, own, memory, own / other, relative)


def _speed(rows: SequenceOf[Row]) -> float:
    return float(sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows))


def table(sheets: SequenceOf[Sheet]) -> list[str]:
    """The lines of a markdown table, with a heading; none where nothing can be compared."""
    found = standings(sheets)
    if not found:
        return []
    words = "Over the prompts that both have; peak memory is weights, cache and work, resident that of the process."
    lines = ["## Models beside plain decoding in bf16", "", words, "", f"| {' | '.join(HEADS)} |"]
    lines.append("|---|---|---|" + "---:|" * (len(HEADS) - 3))
    return [*lines, *(f"| {' | '.join(one.cells)} |" for one in found), ""]
