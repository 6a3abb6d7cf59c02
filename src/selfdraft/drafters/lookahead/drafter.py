"""Lookahead decoding: guess many positions ahead at once, keep the n-grams the model says, and verify those that fit.

Source: Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (arXiv 2402.02057).
Unlike the paper's code: candidates are verified from the first step on, a full match gets its bonus token, and the
window moves as far as the text did. A sampled request's window is answered with the noise that the target will use
at the cell's own place, so that its trajectories run to the sampled text, not to the greedy one. With `adaptive`
(the default) sizes follow what rows bring and cost here, the model's own runners-up are guesses, too, and short trials
find out by the clock whether that, the sizes as they were given or plain decoding is the quickest
(`drafting/trials.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar
from weakref import WeakKeyDictionary

from selfdraft.core.one_row import Ids, Scores
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters.lookahead.adaptation import Sizes
from selfdraft.drafters.lookahead.guesses import Guess, Node, cut, trie
from selfdraft.drafters.lookahead.pool import ANSWERS, TEXT, WINDOW, Pool
from selfdraft.drafters.lookahead.statistics import Counts, PoolStatistics
from selfdraft.drafters.lookahead.window import Window, window_parents
from selfdraft.drafting.successors import (
    RUNNERS_UP,
    Answers,
    choose_likeliest,
    likeliest,
    order_of_learning,
)
from selfdraft.drafting.trials import Trials
from selfdraft.protocols import Needs, Target
from selfdraft.types import Budget, flag, within

SOURCE = "lookahead"
BRANCHES = 3
"""Branches out of runners-up under the last token."""
PLAIN, GUESSES, WINDOWED, GIVEN = range(4)
"""Ways to run a step with `adaptive`: no rows; guesses that pay; those and a window that follows its price; W, N and G
as they were given, exactly as without `adaptive`."""


@dataclass(slots=True)
class RequestWindow:
    """What is known about one sequence."""

    window: Window
    answers: Answers = field(default_factory=Answers)
    counts: Counts = field(default_factory=Counts)
    nodes: list[Node] = field(default_factory=list)
    """All guesses of the step, run or not."""
    ran: bool = False
    """Whether the window's probes were proposed."""


class Lookahead:
    """Candidates: the pool's n-grams behind the last token, as a trie. Probes: the window that keeps the pool fresh.

    `adaptive`: W and G are where it starts, only rows that pay are run, and the way of a step (plain, guesses
    alone, with a window, sizes as given) is the one that took the least time per token. Otherwise W, N and G stay as
    given, as in the paper. What is learned about machine and text outlives a request; pools and windows do not.
    """

    needs: ClassVar[Needs] = Needs(runners_up=RUNNERS_UP)

    def __init__(
        self,
        target: Target,
        *,
        window_size: int = 7,
        ngram_size: int = 5,
        guess_set_size: int = 7,
        pool_from_prompt: bool = True,
        adaptive: bool = True,
    ) -> None:
        within("window_size", window_size, 1, 256)
        within("ngram_size", ngram_size, 3, 64)
        within("guess_set_size", guess_set_size, 1, 256)
        self.sizes = Sizes(window_size, ngram_size, guess_set_size)
        self.from_prompt, self.adaptive = flag("pool_from_prompt", pool_from_prompt), flag("adaptive", adaptive)
        self.clock = target.extras.clock
        self.trials = Trials(GIVEN + 1)
        self._way = GIVEN
        """How this step runs."""
        self._drafting = 0
        """Sequences that were drafted for in this step."""
        self._began = 0.0
        self._total = Counts()
        self._drafted: tuple[float, float] = (0.0, 0.0)
        """When the last draft was ready, and how long it took together with the learning before it."""
        self._learning = 0.0
        self._notes: WeakKeyDictionary[Sequence, RequestWindow] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        began = self._began = self.clock()
        if self.adaptive:
            self._way = self.trials.way
            self.sizes.running = self._way == WINDOWED
        self._drafting = len(sequences)
        if self._way == PLAIN:
            self._drafted = began, self._learning
            return [EMPTY] * len(sequences)
        drafts = [self._one(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)]
        ready = self.clock()
        self._drafted = ready, ready - began + self._learning
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        began = self.clock()
        emitted = rows = 0
        for sequence, result in zip(sequences, results, strict=True):
            emitted += len(result.tokens)
            rows += 1 + len(result.draft)
            note = None if self._way == PLAIN else self._notes.get(sequence)
            if note is not None and result.tokens:
                self._learn(note, sequence, result)
        alone = self._drafting == len(sequences) and all(result.tokens for result in results)
        if self.adaptive and alone:  # nothing was prefilled in this pass
            self.sizes.time.observe(rows, began - self._drafted[0])
            if self._way in (GUESSES, WINDOWED):
                self.sizes.own.observe(self._drafted[1])
                self.sizes.step(emitted)
        for sequence in sequences:
            if sequence.finished and sequence in self._notes:
                del self._notes[sequence]
        self._drafting = 0
        ended = self.clock()
        self._learning = ended - began
        if self.adaptive and alone:
            self.trials.step(emitted, ended - self._began)

    def statistics(self, sequence: Sequence | None = None) -> PoolStatistics:
        """What the pool was good for: in one running request, or in all so far."""
        if sequence is None:
            return self._total.freeze(sum(len(note.window.pool) for note in self._notes.values()))
        note = self._notes.get(sequence)
        return note.counts.freeze(len(note.window.pool)) if note else PoolStatistics()

    def _one(self, sequence: Sequence, budget: Budget) -> Draft:
        note, sizes = self._notes.get(sequence), self.sizes
        if note is None:
            fed = 0 if self.from_prompt else sequence.prompt_length
            most = sizes.most if self.adaptive else sizes.guesses
            pool = Pool(sizes.size, most, sequence.prompt_length)
            note = self._notes[sequence] = RequestWindow(Window(sizes.width, sizes.size - 1, pool, fed))
        note.nodes, note.ran = [], False
        if sequence.remaining <= 1:
            return EMPTY  # the next token is the last one: nothing to accept, nothing to learn for
        window = note.window
        windowed = self._way in (WINDOWED, GIVEN)
        if window.base != len(sequence.tokens):
            window.restart(sequence.tokens, filled=windowed)
        note.nodes = trie(self._guesses(note, sequence, max(budget.max_depth, 0)))
        draft = self._candidates(note.nodes, max(budget.max_nodes, 0))
        if not windowed:
            return draft
        width = sizes.given[0] if self._way == GIVEN else sizes.width
        if window.width != width or len(window.columns) != width:
            window.resize(width, sequence.tokens)
        if window.width + window.height - 2 > budget.max_probe_depth:
            return draft
        note.ran = True
        return draft.with_probes(window.tokens(), window_parents(window.width, window.height), SOURCE)

    def _guesses(self, note: RequestWindow, sequence: Sequence, depth: int) -> list[Guess]:
        """Paths behind the last token, most trusted first; none goes on behind an end or below `depth`."""
        text, window = sequence.tokens, note.window
        found = [Guess(path, TEXT, 0) for path in window.copies(text)]
        most = self.sizes.given[1] if self._way == GIVEN else self.sizes.guesses
        for followers, source, matched in window.pool.ranked(text)[:most]:
            found.append(Guess(followers, source, len(found), matched, source == WINDOW))
        if self._way != GIVEN and depth:
            found += self._runners_up(note, sequence, min(depth, window.height), len(found))
        return [
            Guess(cut(g.tokens[:depth], sequence.stop_ids), g.source, g.rank, g.matched, g.from_window) for g in found
        ]

    def _runners_up(self, note: RequestWindow, sequence: Sequence, depth: int, rank: int) -> list[Guess]:
        """Paths out of what the model answered before: some first tokens, each with its likeliest continuation."""
        text, found = sequence.tokens, list[Guess]()
        firsts, probe = note.answers.guess(text[-1], sequence, len(text), BRANCHES)
        for first in firsts:
            path, from_window = [first], probe
            while len(path) < depth:
                after, seen = note.answers.guess(path[-1], sequence, len(text) + len(path), 1)
                if not after:
                    break
                path += after
                from_window = from_window or seen
            found.append(Guess(tuple(path), ANSWERS, rank + len(found), 0, from_window))
        return found

    def _candidates(self, nodes: list[Node], most: int) -> Draft:
        """At most `most` nodes that pay, the likeliest first; without adaptation the first ones."""
        chosen = list(range(len(nodes)))
        if self._way != GIVEN:
            for node in nodes:
                above = nodes[node.parent].chance if node.parent != ROOT else 1.0
                node.chance = above * self.sizes.acceptance.rate(node.kind)
            price = self.sizes.price
            chosen = [place for place in chosen if nodes[place].chance >= price]
            chosen = sorted(chosen, key=lambda place: -nodes[place].chance)  # stable: parents stay before children
        chosen = sorted(chosen[:most])
        row = {ROOT: ROOT, **{place: row for row, place in enumerate(chosen)}}
        parents = tuple(row[nodes[place].parent] for place in chosen)
        return Draft(tuple(nodes[place].token for place in chosen), parents, (SOURCE,) * len(chosen), len(chosen))

    def _learn(self, note: RequestWindow, sequence: Sequence, result: Result) -> None:
        """Score every guess by the text, then read the model's answers."""
        hits = self._score(note, result)
        if note.nodes or note.ran:
            note.counts.book(note.nodes, hits)
            self._total.book(note.nodes, hits)
        window = note.window
        if sequence.finished:
            return
        top = None
        reads = self._way in (GUESSES, WINDOWED)
        if result.logits is not None and (reads or (note.ran and not sequence.sampling.greedy)):
            top = likeliest(result.logits, sequence.sampling, known=result.top)
        if reads and top is not None and window.base >= 1:
            self._recall(note.answers, sequence.tokens[window.base - 1], result, *top)
        probes = len(result.proposed) - result.proposed.num_candidates
        if note.ran and probes == window.width * window.height - 1:
            window.learn(self._answers(window, sequence, result, top), sequence.tokens)

    def _score(self, note: RequestWindow, result: Result) -> list[int]:
        """The accepted guesses, from the root down. Guesses that were not run are judged by the text, too."""
        hits, above, sizes = list[int](), {ROOT: 0}, self.sizes
        for place, node in enumerate(note.nodes):
            if node.parent not in above or node.depth > len(result.tokens):
                continue
            right = node.token == result.tokens[node.depth - 1]
            sizes.acceptance.observe(node.kind, right)
            if node.depth == 1 and node.guess.source != ANSWERS:
                sizes.ranks.observe(node.guess.rank, right)
            if right:
                above[place] = node.depth
                if node.depth <= len(result.path):
                    hits.append(place)
        alone = len(list(takewhile(lambda place: not note.nodes[place].guess.from_window, hits)))
        if sizes.running:
            sizes.gain.observe(len(hits) - alone)
        return hits

    def _recall(self, answers: Answers, last: int, result: Result, scores: Scores, ids: Ids) -> None:
        """Note the likeliest tokens after every row; what rows of the text say stands above the rest."""
        draft = result.draft
        tokens = [last, *draft.tokens]
        for row in order_of_learning(len(tokens), result.path):  # probes first, then branches
            answers.learn(tokens[row], scores[row], ids[row], row > draft.num_candidates)

    def _answers(self, window: Window, sequence: Sequence, result: Result, top: tuple[Scores, Ids] | None) -> list[int]:
        """What the model says after the deepest cells, column by column, up to the first that was clipped away."""
        first = len(result.proposed) - window.width
        place = {old: new for new, old in enumerate(result.nodes)}
        rows = [1 + place[node] for node in takewhile(place.__contains__, range(first, first + window.width))]
        if top is None or sequence.sampling.greedy:
            return [result.argmax[row] for row in rows]
        places = [window.base + window.height - 1 + i for i in range(len(rows))]
        return choose_likeliest(sequence, top[0][rows], top[1][rows], places)
