"""The two verbs of every drafter whose sources cost no pass: trees of what they say, cut where a row does not pay."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.alignment import Aligned
from selfdraft.drafting.context_tree import ContextTree
from selfdraft.drafting.estimators import TRUSTED
from selfdraft.drafting.mask_prediction import Pace
from selfdraft.drafting.mixing import Credit, Merger
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.sources import Alignments, Contexts, Copies, Reader, Source, Successors
from selfdraft.types import Budget, Clock, within


@dataclass(frozen=True, slots=True)
class Sources:
    """Which sources a drafter has."""

    request: bool = False
    """The request's own text: its contexts, the longest match, the alignment that a broken match leaves behind."""
    prediction: bool = False
    """The prediction of a request that has one."""
    recycling: bool = False
    """The model's runners-up at every row that was run: needs logits."""


class Note:
    """What is known about one sequence: its sources, and how far they have read."""

    def __init__(self, sequence: Sequence, sources: Sources, memory: Memory | None, credit: Credit) -> None:
        self._readers: list[tuple[Reader, int]] = []
        """With the first place that each one reads."""
        self._read = 0
        self.successors = Successors("recycling", sequence) if sources.recycling else None
        found: list[Source] = [self.successors] if self.successors else []
        if sources.request:
            own = self._reader(Reader(ContextTree(), own=True))
            found += [Contexts("context", own), Copies("copy", own), Alignments("align", own)]
        if memory is not None:
            past = self._reader(Reader(memory.tree))
            found += [Contexts("memory", past), Alignments("memory-align", past)]
        if sources.prediction and sequence.sampling.prediction:
            tree = ContextTree(token for token in sequence.sampling.prediction if isinstance(token, int))
            told = self._reader(Reader(tree, aligned=Aligned(0)), sequence.prompt_length)
            found += [Alignments("prediction", told), Copies("prediction-copy", told)]
        self.merger = Merger(found, credit)
        self.catch_up(sequence)

    def _reader(self, reader: Reader, first: int = 0) -> Reader:
        self._readers.append((reader, first))
        return reader

    def catch_up(self, sequence: Sequence) -> None:
        """Read what the sequence has got since."""
        for place in range(self._read, len(sequence.tokens)):
            for reader, first in self._readers:
                if place >= first:
                    reader.push(sequence.tokens[place])
        self._read = len(sequence.tokens)

    def learn(self, sequence: Sequence) -> None:
        """Score every source by the new tokens, then read them."""
        self.merger.score(sequence.tokens[self._read :])
        self.catch_up(sequence)


class Drafting:
    """`draft` and `observe` over some sources: at most `nodes` candidates, each as likely as a row is dear.

    `min_probability` is that price, or None: then it is measured with `clock`, in seconds. Before it is known, trees
    start small. `memory` gets every output that is finished. What sources are worth outlives a request, what they read
    does not.
    Errors: OptionError for values out of range.
    """

    def __init__(
        self,
        sources: Sources,
        nodes: int,
        min_probability: float | None,
        clock: Clock,
        memory: Memory | None = None,
    ) -> None:
        within("num_speculative_tokens", nodes, 1, 256)
        if min_probability is not None:
            within("min_probability", min_probability, 0.0, 1.0)
        self.sources, self.most, self.memory = sources, nodes, memory
        self.pace = Pace(min_probability)
        self.credit = Credit()
        self.clock = clock
        self._began = 0.0
        self._drafted = 0
        self._notes: WeakKeyDictionary[Sequence, Note] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        self._began, self._drafted = self.clock(), len(sequences)
        most = self._room()
        prices = self._prices(sequences, most)
        drafts = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            room = Budget(min(budget.nodes, most), budget.depth, budget.reach)
            drafts.append(self._ready(sequence).merger.tree(room, prices))
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if len(sequences) == self._drafted and all(result.tokens for result in results):
            rows = sum(1 + len(result.draft) for result in results)  # a prefill would be counted as dear rows
            self.pace.observe(rows, self.clock() - self._began, sum(len(result.tokens) for result in results))
        self._drafted = 0
        for sequence in sequences:
            if sequence in self._notes:
                self._notes[sequence].learn(sequence)
        if self.sources.recycling:
            self._recycle(sequences, results)
        self._forget(sequences)

    def _recycle(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """Keep the runners-up of every row that was run."""
        for sequence, result in zip(sequences, results, strict=True):
            if not result.tokens or sequence.finished:
                continue
            if (successors := self._note(sequence).successors) is not None:
                successors.learn(sequence.tokens[-1 - len(result.tokens)], result)

    def _forget(self, sequences: SequenceOf[Sequence]) -> None:
        """Drop the notes of those that have ended; the memory keeps what they said."""
        for sequence in sequences:
            if sequence.finished:
                self._notes.pop(sequence, None)
                if self.memory is not None:
                    self.memory.add(sequence.output)

    def _note(self, sequence: Sequence) -> Note:
        note = self._notes.get(sequence)
        if note is None:
            note = self._notes[sequence] = Note(sequence, self.sources, self.memory, self.credit)
        return note

    def _ready(self, sequence: Sequence) -> Note:
        """The note of a sequence that is drafted for now."""
        return self._note(sequence)

    def _prices(self, sequences: SequenceOf[Sequence], most: int) -> SequenceOf[float]:
        """What each node of a tree must bring, in tokens."""
        return [self.pace.price] * most

    def _room(self) -> int:
        """Most nodes now. The first steps differ in size: what a row costs is not seen in steps of one size."""
        steps = self.pace.time.steps
        return self.most if self.pace.fixed is not None or steps >= TRUSTED else min(self.most, 2**steps)
