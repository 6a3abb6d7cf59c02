"""No guesses: plain decoding, the yardstick."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import ClassVar

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.protocols import Needs, Target
from selfdraft.types import Budget


class NoDrafter:
    """Every step emits one token."""

    needs: ClassVar[Needs] = Needs(tokens_only=True)

    def __init__(self, target: Target) -> None:
        pass

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [EMPTY] * len(sequences)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass
