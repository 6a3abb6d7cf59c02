"""SPACE: mask tokens behind the places where acceptance may end guess the next step's tokens in the same pass.

Source: Yi et al., "Generation Meets Verification" (arXiv 2402.11809). Unlike there the model's weights are untouched
(`models/adapters.py`), groups hang only where they are likely to be read, each mask may give several candidates, and
sampled text keeps its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_model import RowCost
from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.mask_prediction import Ahead, Groups, Guesser, read_group, with_groups
from selfdraft.drafting.mask_tables import MaskTables
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.protocols import Target
from selfdraft.types import Budget, within

SOURCE = "space"


@dataclass(slots=True)
class RequestMasks:
    """What is known about one sequence between two steps."""

    places: list[Ahead] = field(default_factory=list)
    """What the masks said of the places behind the last known token."""
    groups: Groups = field(default_factory=dict)
    """Those in the draft on its way."""


class Space:
    """Candidates: a tree over what the masks said last time. Probes: a group of masks under likely accept points."""

    def __init__(
        self,
        target: Target,
        *,
        num_speculative_tokens: int = 12,
        branches: int = 3,
        mask_groups: int = 6,
        min_probability: float | None = None,
    ) -> None:
        within("mask_groups", mask_groups, 1, 256)
        self.guesser = Guesser(num_speculative_tokens, branches, RowCost(min_probability))
        masks = target.extras.masks_for(SOURCE)
        self.masks = masks.ids
        self.groups = mask_groups
        self._shift = masks.shift
        self.beside = MaskTables(masks, branches)
        self.timer = StepTimer(target.extras.clock)
        self._held = [Mean(0.5, 4.0) for _ in self.masks]
        """For each mask, how often its guess was right when those before it were."""
        self._notes: WeakKeyDictionary[Sequence, RequestMasks] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts = [self._one(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)]
        self.timer.start(len(sequences))
        return drafts

    def _one(self, sequence: Sequence, budget: Budget) -> Draft:
        if sequence.remaining <= 1:
            return EMPTY  # the next token is the last one
        note = self._notes.setdefault(sequence, RequestMasks())
        tree = self.guesser.tree(sequence.tokens[-1], note.places, self._shift, budget, SOURCE)
        draft, note.groups = with_groups(tree, self._points(tree), self.masks, SOURCE)
        return draft

    def _points(self, tree: Draft) -> list[tuple[int, int]]:
        """(accept point, number of masks): mask j is worth its row if it is likely to be read and to matter."""
        price, room = self.guesser.row_cost.tokens, self.guesser.row_cost.most_rows
        points = []
        for point, chance in self.guesser.endings(tree)[: self.groups]:
            size = 0
            for held in self._held[:room]:
                chance *= held.value
                if chance < price and not (point == ROOT and size == 0):
                    break
                size += 1
            if size:
                points.append((point, size))
                room -= size
        return points

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.guesser.observe(results, self.timer.seconds(results))
        for sequence, result in zip(sequences, results, strict=True):
            note = self._notes.get(sequence)
            if note is None or not result.tokens:
                continue
            if sequence.finished:
                del self._notes[sequence]
                continue
            for held, depth in zip(self._held, range(min(len(result.path) + 1, len(note.places))), strict=False):
                held.observe(float(depth < len(result.path)))
            note.places = read_group(note.groups, sequence, result, self.beside)
