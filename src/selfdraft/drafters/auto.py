"""The default: one tree from everything that costs no pass, as large as this machine's passes make worth while.

What a pass costs by its rows was measured (`core/profile.py`); where nothing was, the cost of a row is learned while
decoding, as in `merged`. On text where nothing is accepted it stands aside and tries again later (`core/guarded.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from selfdraft.core.guarded import Guarded
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft, chances_of
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget


class Auto(Guarded):
    """`merged`, with trees cut where the measured cost of the pass says so, and plain decoding where that is best."""

    reads = "tokens"
    predicts = True
    logit_options = ("recycling",)
    """Options that make it read logits."""

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, memory: int = 0, recycling: bool = True
    ) -> None:
        if not isinstance(recycling, bool):
            raise OptionError(f"recycling={recycling!r} is neither True nor False")
        super().__init__(num_speculative_tokens, memory, recycling)
        self.profile = target.profile

    def _trees(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts = super()._trees(sequences, budgets)
        return drafts if self.profile is None else self._cut(drafts, sequences)

    def _room(self) -> int:
        return self.most if self.profile is not None else super()._room()

    def _cut(self, drafts: list[Draft], sequences: SequenceOf[Sequence]) -> list[Draft]:
        """Of each tree the first nodes, as many as pay in one pass with all the others. Nodes come likeliest first."""
        assert self.profile is not None
        tokens, count, others = sum(s.cached for s in sequences), len(sequences), 0
        seconds = self.pace.time.seconds or self.profile.at(count, tokens, count) + self.profile.host
        rho = max(self.pace.tokens.value, float(count)) / seconds
        found = []
        for draft in drafts:
            size = self.profile.best_size(chances_of(draft), rho, tokens, count, others)
            others += size
            found.append(draft.first(size))
        return found

    def _seconds(self, sequences: SequenceOf[Sequence], rows: int) -> tuple[float, float]:
        if self.profile is None:
            return super()._seconds(sequences, rows)
        tokens, count = sum(sequence.cached for sequence in sequences), len(sequences)
        plain = self.profile.at(count, tokens, count)
        return plain + self.profile.host, self.profile.at(rows, tokens, count) - plain
