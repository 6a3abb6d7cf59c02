"""Why drafts were rejected on the prompts of a bench: one more run of each, after all that was timed."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.bench.measure import take
from selfdraft.bench.rows import Ledger
from selfdraft.bench.run import PLAIN, Bench, seeded, turns
from selfdraft.bench.tasks import Item
from selfdraft.prove.rejections import Explained, Summary


@dataclass(slots=True)
class Explanation:
    """What became of the tokens of one drafter in one task."""

    summary: Summary
    texts_equal: bool
    """Every text was that of plain decoding."""


def explain(bench: Bench, name: str, items: SequenceOf[Item], ledger: Ledger, examples: int) -> dict[str, Explanation]:
    """The explanations of a task by drafter, plain decoding and other engines left out.

    Engines are fresh, so drafters learn from prompt to prompt as they do in use. The ledger has the rows of `run`.
    """
    drafting = [one for one in bench.contenders if one.edition is None and one.method != PLAIN]
    engines = bench.engines(drafting)
    watched = {label: Explained(engine.drafter, examples) for label, engine in engines.items()}
    equal = dict.fromkeys(engines, True)
    for label, engine in engines.items():
        engine.drafter = watched[label]
    for item, seed in seeded(items, bench.seed):
        for question in turns(bench, name, item, seed, ledger):
            wanted = question.plain_text(ledger)
            for label, engine in engines.items():
                equal[label] &= take(engine, question.request()(), bench.settle).text == wanted
    return {label: Explanation(one.summary(), equal[label]) for label, one in watched.items()}
