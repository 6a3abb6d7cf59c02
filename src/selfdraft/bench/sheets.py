"""Rows under the same conditions, and the figures of a table made of them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.bench.rows import Row
from selfdraft.types import JsonObject


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows under the same conditions, at one temperature."""

    conditions: JsonObject
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Task, or task and group, in the order of the rows."""
        return list(dict.fromkeys(column_of(row) for row in self.rows))

    @property
    def labels(self) -> list[str]:
        """Plain decoding, drafters, then other engines."""
        ours = [row["drafter"] for row in self.rows if row.get("peer") is None]
        return list(dict.fromkeys([*ours, *(row["drafter"] for row in self.rows)]))

    def of(self, label: str, column: str | None = None) -> list[Row]:
        """The rows of a drafter, in a column or in all."""
        return [row for row in self.rows if row["drafter"] == label and column in (None, column_of(row))]


def column_of(row: Row) -> str:
    return f"{row['task']}/{row['group']}" if row["group"] else str(row["task"])


def ratio(rows: SequenceOf[Row], over: str) -> float:
    """A sum (plain_seconds, tokens) by the seconds of the same rows."""
    return float(sum(row[over] for row in rows) / sum(row["seconds"] for row in rows))


def speedup(rows: SequenceOf[Row]) -> float | None:
    """None where a text of our own engine differs, or where nothing was measured."""
    fine = rows and all(row["texts_equal"] or row.get("peer") for row in rows)
    return ratio(rows, "plain_seconds") if fine else None


def tokens_per_pass(rows: SequenceOf[Row]) -> float | None:
    """Of rows of our own engine; None where there was no pass."""
    passes = sum(row["stats"]["num_steps"] for row in rows)
    tokens = sum(row["stats"]["mean_acceptance_length"] * row["stats"]["num_steps"] for row in rows)
    return float(tokens / passes) if passes else None
