"""Token trees out of sources that need no forward pass, and the drafter that is nothing but such a tree.

`SourceTree` keeps what was read of each request, makes its tree, and learns from the verified tokens. It is a part of
`auto` and `cascade`. `SourceTreeDrafter` is a whole drafter: `context`, `recycling`, `prediction` and `merged`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.alignment import Aligned
from selfdraft.drafting.context_tree import ContextTree
from selfdraft.drafting.cost_guard import LossBudget
from selfdraft.drafting.cost_model import RowCost
from selfdraft.drafting.mask_prediction import Ahead, MaskTokens
from selfdraft.drafting.mask_source import MASKS, MaskGroups, MaskSource
from selfdraft.drafting.mixing import Credit, Merger, TaskProfile
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.sources import Alignments, Contexts, Copies, Reader, Source, Successors
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.types import Budget, Clock, flag, within

RECYCLING = "recycling"
"""Name of the source that takes the model's own runners-up: its tokens are shown under it."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Which sources a drafter has."""

    request: bool = False
    """The request's own text: its contexts, the longest match, the alignment that a broken match leaves behind."""
    prediction: bool = False
    """The prediction of a request that has one."""
    recycling: bool = False
    """The model's runners-up at every row that was run: needs logits."""


def wanted_masks(masks: MaskTokens | None, wanted: object) -> MaskTokens | None:
    """The model's trained masks, if they are `wanted` and there are any. Errors: OptionError when that is no bool."""
    return masks if flag("masks", wanted) else None


def every_source(recycling: object) -> Sources:
    """All sources, the model's runners-up only with `recycling`. Errors: OptionError when that is no bool."""
    return Sources(request=True, prediction=True, recycling=flag("recycling", recycling))


class RequestSources:
    """What is known about one sequence: its sources, and how far they have read."""

    def __init__(
        self,
        sequence: Sequence,
        sources: Sources,
        memory: Memory | None,
        credit: Credit,
        masks: MaskTokens | None,
        clock: Clock,
    ) -> None:
        self._readers: list[tuple[Reader, int]] = []
        """With the first place that each one reads."""
        self._read = 0
        self.successors = Successors(RECYCLING, sequence) if sources.recycling else None
        self.masks = MaskSource(masks.shift, clock) if masks else None
        found: list[Source] = [source for source in (self.successors, self.masks) if source]
        if sources.request:
            own = self._reader(Reader(ContextTree(), own=True))
            found += [Contexts("context", own), Copies("copy", own), Alignments("align", own)]
        if memory is not None:
            past = self._reader(Reader(memory.tree))
            found += [Contexts("memory", past), Alignments("memory-align", past)]
        if sources.prediction and sequence.sampling.prediction:
            tree = ContextTree(token for token in sequence.sampling.prediction if isinstance(token, int))
            predicted = self._reader(Reader(tree, aligned=Aligned(0)), sequence.prompt_length)
            found += [Alignments("prediction", predicted), Copies("prediction-copy", predicted)]
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

    def resume(self, sequence: Sequence) -> None:
        """Read what came in steps that drafted nothing; what masks said is of an older place then."""
        if self.masks is not None and self._read < len(sequence.tokens):
            self.masks.update([], -1)
        self.catch_up(sequence)

    def learn(self, sequence: Sequence) -> None:
        """Score every source by the new tokens, then read them."""
        self.merger.score(sequence.tokens[self._read :])
        self.catch_up(sequence)


class SourceTree:
    """Trees of at most `nodes` candidates out of `sources`; the notes of each request, and what all requests taught.

    `masks`: trained mask tokens are a source, too. Their rows hang in the trees, unless `hang` is false: then somebody
    hands in what they say (`foresee`). `memory` gets every output that is finished. What sources are worth
    outlives a request, what they read does not; `before`: what was learned earlier on text of the same kind.
    The successor table costs time at every step: it is read as long as what it alone brought is worth that (`book`).
    So it is with masks, where somebody books what they bring (`book_masks`).
    Errors: OptionError for values out of range.
    """

    def __init__(
        self,
        sources: Sources,
        nodes: int,
        clock: Clock,
        memory: Memory | None = None,
        masks: MaskTokens | None = None,
        before: TaskProfile | None = None,
        *,
        hang: bool = True,
    ) -> None:
        within("num_speculative_tokens", nodes, 1, 256)
        self.sources, self.most, self.memory, self.clock = sources, nodes, memory, clock
        self.trained = masks
        self.groups = MaskGroups(masks) if masks and hang else None
        self.beside = self.groups.tables if self.groups else None
        """What is asked of the rows of a step beside likeliest tokens."""
        self.credit = Credit(before)
        self.successors = LossBudget()
        """What reading the successor table may still lose."""
        self.masks = LossBudget()
        """What masks may still lose."""
        self._reading = self._masking = 0.0
        """Seconds that the table, and masks, took of the host in this step."""
        self._notes: WeakKeyDictionary[Sequence, RequestSources] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Requests that there are notes of."""
        return len(self._notes)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._notes

    def draft(
        self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget], row_costs: SequenceOf[float]
    ) -> list[Draft]:
        """A tree for each sequence whose i-th node is at least as likely as `row_costs[i]`."""
        return [self.tree(one, budget, row_costs) for one, budget in zip(sequences, budgets, strict=True)]

    def tree(
        self, sequence: Sequence, budget: Budget, row_costs: SequenceOf[float], path: SequenceOf[int] = ()
    ) -> Draft:
        """The tree under the end of a sequence, or under tokens (`path`) that are thought to come behind it."""
        note = self._note(sequence)
        note.resume(sequence)
        if note.successors is not None:
            note.successors.awake = not self.successors.paused
        room = replace(budget, max_nodes=min(budget.max_nodes, self.most, len(row_costs)))
        return note.merger.tree(room, row_costs, path)

    def foresee(self, sequence: Sequence, ahead: list[Ahead]) -> None:
        """What masks say of the places behind the last token, until the next one is known."""
        note = self._note(sequence)
        note.resume(sequence)
        assert note.masks is not None, "the drafter has masks"
        note.masks.update(ahead, sequence.tokens[-1])

    def with_masks(
        self,
        sequences: SequenceOf[Sequence],
        drafts: SequenceOf[Draft],
        budgets: SequenceOf[Budget],
        row_costs: SequenceOf[float],
    ) -> list[Draft]:
        """The trees with the mask rows that are worth their place; `row_costs[i]`: of the i-th row of a tree."""
        self._masking = 0.0
        if self.groups is None or self.masks.rests(sequences):
            return list(drafts)
        began, hung = self.clock(), []
        for sequence, draft, budget in zip(sequences, drafts, budgets, strict=True):
            source = self._note(sequence).masks
            assert source is not None, "there are groups, so every request has the source"
            deepest = min(budget.max_probe_depth, sequence.remaining - 1)
            hung.append(self.groups.hang(source, draft, row_costs[len(draft) :], deepest))
            self._masking, source.seconds = self._masking + source.seconds, 0.0
        self._masking += self.clock() - began
        return hung

    def learn(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """Score every source by the new tokens, read them, and keep what the rows that were run say of the next."""
        for sequence, result in zip(sequences, results, strict=True):
            note = self._notes.get(sequence)
            if note is not None and result.tokens:
                note.learn(sequence)
                if note.masks is not None:
                    began = self.clock()
                    if self.groups is not None:
                        self.groups.learn(note.masks, sequence, result)
                    else:
                        note.masks.update([], -1)
                    self._masking += self.clock() - began
        if not self.sources.recycling:
            return
        if self.successors.paused:
            self.successors.rest(len(sequences))
            return
        began = self.clock()
        for sequence, result in zip(sequences, results, strict=True):
            if result.tokens and not sequence.finished and (table := self._note(sequence).successors) is not None:
                table.learn(sequence.tokens[-1 - len(result.tokens)], result)
        self._reading = self.clock() - began

    def book(self, results: SequenceOf[Result], plain: float) -> None:
        """Book what the successor table brought and took in this step. `plain`: seconds of a plain step."""
        if self._reading:
            brought = sum(only_from(RECYCLING, result) for result in results) / len(results)
            self.successors.book(brought - self._reading / plain, len(results))
        self._reading = 0.0

    def book_masks(self, results: SequenceOf[Result], tokens: Callable[[int, float], float]) -> None:
        """Book what masks brought and took in this step.

        `tokens(rows, seconds)` come anyway in the time that so many of the step's rows added, and those seconds.
        """
        rows = sum(len(result.draft) - result.draft.num_candidates for result in results)
        if self.groups is not None and not self.masks.paused:
            brought = sum(only_from(MASKS, result) for result in results)
            self.masks.book((brought - tokens(rows, self._masking)) / len(results), len(results))
        self._masking = 0.0

    def forget(self, sequences: SequenceOf[Sequence]) -> None:
        """Drop the notes of those that have ended; the memory keeps their outputs."""
        for sequence in sequences:
            if sequence.finished:
                self._notes.pop(sequence, None)
                if self.memory is not None:
                    self.memory.add(sequence.output)

    def _note(self, sequence: Sequence) -> RequestSources:
        note = self._notes.get(sequence)
        if note is None:
            note = self._notes[sequence] = RequestSources(
                sequence, self.sources, self.memory, self.credit, self.trained, self.clock
            )
        return note


def only_from(source: str, result: Result) -> int:
    """Accepted tokens that would not have been there without a source: from the first on that no other one named."""
    sources = [result.draft.sources[node] for node in result.path]
    return len(sources) - sources.index(source) if source in sources else 0


class SourceTreeDrafter:
    """A drafter that is one `SourceTree`: a node must be at least as likely as a row is dear.

    `min_probability` fixes the cost of a row in tokens; with None it is measured with `clock`.
    Errors: OptionError for values out of range.
    """

    def __init__(
        self,
        sources: Sources,
        nodes: int,
        min_probability: float | None,
        clock: Clock,
        memory: Memory | None = None,
        masks: MaskTokens | None = None,
        before: TaskProfile | None = None,
    ) -> None:
        self.tree = SourceTree(sources, nodes, clock, memory, masks, before)
        self.memory, self.beside = memory, self.tree.beside
        self.row_cost = RowCost(min_probability)
        self.timer = StepTimer(clock)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        self.timer.start(len(sequences))
        most = min(self.tree.most, self.row_cost.most_rows)
        costs = [self.row_cost.tokens] * most
        return self.tree.with_masks(sequences, self.tree.draft(sequences, budgets, costs), budgets, costs)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if (seconds := self.timer.seconds(results)) is not None:
            rows = sum(1 + len(result.draft) for result in results)
            self.row_cost.observe(rows, seconds, sum(len(result.tokens) for result in results))
        self.tree.learn(sequences, results)
        self.tree.forget(sequences)
