"""Chains out of any drafter, for engines that cannot verify a tree: one path of candidates, without probes."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.protocols import Drafter
from selfdraft.types import Budget


class Chains:
    """A drafter whose drafts are chains of at most `most` candidates: another drafter, asked for one path.

    Drafters that grow their trees by likelihood (`drafting/mixing.py`) grow a chain instead; of every other tree the
    first path stays. Token ids are below `vocab`.
    """

    def __init__(self, drafter: Drafter, most: int, vocab: int) -> None:
        self.drafter, self.most, self.vocab = drafter, most, vocab

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        rooms = [
            replace(one, max_nodes=min(one.max_nodes, self.most), max_probe_depth=0, chain=True) for one in budgets
        ]
        drafts = self.drafter.draft(sequences, rooms)
        return [draft.clip(room, self.vocab)[0] for draft, room in zip(drafts, rooms, strict=True)]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.drafter.observe(sequences, results)
