"""The seconds of a step in which every sequence was drafted for: only such steps tell what rows cost."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.core.verify import Result
from selfdraft.types import Clock


@dataclass(slots=True)
class StepTimer:
    """Times steps from where `start` is called; nobody is asked to draft in a step that only reads prompts."""

    clock: Clock
    _began: float = 0.0
    _count: int = 0

    def start(self, sequences: int) -> None:
        """A step of so many sequences begins, or goes on behind its drafting."""
        self._began, self._count = self.clock(), sequences

    def seconds(self, results: SequenceOf[Result]) -> float | None:
        """Seconds since the start; None when a prompt was read in this step: it would be counted as dear rows."""
        whole = len(results) == self._count and all(result.tokens for result in results)
        self._count = 0
        return self.clock() - self._began if whole else None
