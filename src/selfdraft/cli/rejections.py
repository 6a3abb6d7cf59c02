"""What `bench --explain` shows: why drafts were rejected, by kind, and examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from selfdraft.cli import terminal
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from rich.table import Table

    from selfdraft.bench.rows import Ledger
    from selfdraft.bench.run import Bench
    from selfdraft.bench.tasks import Item
    from selfdraft.llm import LLM

SOURCES = 6
"""Most sources in the line of them."""
SHOWN = 40
"""Most characters of the text before a place, from its end."""


def explain_all(
    setting: Bench, items: dict[str, list[Item]], ledger: Ledger, llm: LLM, most: int, *, quiet: bool
) -> dict[tuple[str, str], JsonObject]:
    """(task, drafter) -> what became of its tokens, with at most `most` examples."""
    from selfdraft.bench.explain import explain

    found: dict[tuple[str, str], JsonObject] = {}
    with terminal.progress(len(items), quiet=quiet, what="explaining") as advance:
        for name, questions in items.items():
            for label, one in explain(setting, name, questions, ledger, most).items():
                told = one.summary.as_dict(lambda ids: llm.decode(ids, skip_special_tokens=False))
                found[name, label] = {"texts_equal": one.texts_equal, **told}
            advance()
    return found


def show_rejections(records: Sequence[JsonObject]) -> None:
    """A table by kind, the sources and the examples of every drafter that was explained."""
    for record in records:
        found = record["rejections"]
        if found is None:
            continue
        title = f"\n{record['task']}, {record['drafter']}: what became of {terminal.counted(found['tokens'], 'token')}"
        terminal.out.print(Text(title, style="bold"))
        terminal.out.print(_table(found))
        if found["sources"]:
            terminal.out.print(f"accepted of drafted, by source: {_sources(found['sources'])}")
        for number, example in enumerate(found["examples"], 1):
            terminal.out.print(f"{number:3}. {_example(example)}")
        if not found["texts_equal"]:
            terminal.show_red("a text of this run DIFFERS from plain decoding")


def _table(found: JsonObject) -> Table:
    """Tokens by what became of them, rejections by kind."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=22)
    for head in ("tokens", "of all", "of rejected", "stated chance"):
        table.add_column(head, justify="right", no_wrap=True)
    whole = found["tokens"]
    hits = found["accepted"]
    table.add_row("accepted", str(hits["count"]), _per_cent(hits["count"], whole), "", _chance(hits))
    table.add_row("rejected", str(found["rejected"]), _per_cent(found["rejected"], whole))
    for kind, one in found["kinds"].items():
        cells = (str(one["count"]), _per_cent(one["count"], whole), _per_cent(one["count"], found["rejected"]))
        table.add_row(f"  {kind}", *cells, _chance(one))
    missing = sum(found["undrafted"].values())
    table.add_row("not drafted", str(missing), _per_cent(missing, whole))
    for why, count in found["undrafted"].items():
        table.add_row(f"  {why}", str(count), _per_cent(count, whole))
    return table


def _per_cent(count: int, of: int) -> str:
    return f"{100 * count / of:.0f} %" if of else "-"


def _chance(tally: JsonObject) -> str:
    return "-" if tally["mean_chance"] is None else f"{tally['mean_chance']:.2f}"


def _sources(sources: JsonObject) -> str:
    """The sources that proposed most."""
    told = [f"{name} {one['accepted']} of {one['accepted'] + one['rejected']}" for name, one in sources.items()]
    rest = f", and {len(told) - SOURCES} more" if len(told) > SOURCES else ""
    return ", ".join(told[:SOURCES]) + rest


def _example(one: JsonObject) -> str:
    """One rejection in a line."""
    stated = "" if one["chance"] is None else f", stated chance {one['chance']:.2f}"
    others = f", beside {terminal.counted(len(one['others']), 'other')}" if one["others"] else ""
    margin = "banned" if one["margin"] is None else f"{one['margin']:.2f} nats behind"
    rank = one["chosen_rank_in_draft"]
    cut = f"; its rank in the draft was {rank}, but limits cut it" if rank is not None else ""
    return (
        f"{one['kind']}: behind {_quoted(one['before'][-SHOWN:])} {one['sources']} proposed "
        f"{_quoted(one['drafted']['text'])} (depth {one['depth']}{stated}{others}; the target's number "
        f"{one['drafted_rank_in_target']}, {margin}); the target chose {_quoted(one['chosen']['text'])}{cut}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
