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
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from math import log1p
from weakref import WeakKeyDictionary

from torch import Tensor

from selfdraft.core.noise import gumbel_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.estimators import TRUSTED, Acceptance, Mean, StepTime
from selfdraft.drafting.successors import Answers, likeliest
from selfdraft.drafting.trials import Trials
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget, within

SOURCE = "lookahead"
PROMPT, TEXT, WINDOW, ANSWERS = "prompt", "text", "window", "answers"
"""Where a guess comes from: an n-gram of the prompt, of the output, of the window, or runners-up of answered rows."""
CONTEXT = 4
"""Tokens before its key by which a tuple is ranked."""
BRANCHES = 3
"""Branches out of runners-up under the last token."""
PLAIN, GUESSES, WINDOWED, GIVEN = range(4)
"""Ways to run a step with `adaptive`: no rows; guesses that pay; those and a window that follows its price; W, N and G
as they were given, exactly as without `adaptive`."""


class Pool:
    """What followed each token: at most `most` tuples of `size` - 1 tokens per key, the least recent goes first.

    Each tuple knows its source (what the text itself has said is never the window's merit) and what stood before its
    key when it was last seen. Keys before `prompt` belong to the prompt.
    """

    def __init__(self, size: int, most: int, prompt: int = 0) -> None:
        self.size, self.most, self.prompt = size, most, prompt
        self._tuples: dict[int, dict[tuple[int, ...], tuple[str, tuple[int, ...]]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tuples.values()))

    def add(self, key: int, followers: tuple[int, ...], source: str = WINDOW, before: SequenceOf[int] = ()) -> None:
        """Note that `followers` came after `before` and `key`, as the most recent of the key's tuples."""
        known = self._tuples.setdefault(key, {})
        entry = known.pop(followers, None)
        known[followers] = entry if entry and source == WINDOW else (source, tuple(before))
        if len(known) > self.most:
            del known[next(iter(known))]

    def feed(self, tokens: list[int], start: int) -> int:
        """Add every n-gram of `tokens` whose key is at `start` or later; returns where the next feed starts."""
        stop = max(len(tokens) - self.size + 1, start)
        for place in range(start, stop):
            source = PROMPT if place < self.prompt else TEXT
            before = tokens[max(place - CONTEXT, 0) : place]
            self.add(tokens[place], tuple(tokens[place + 1 : place + self.size]), source, before)
        return stop

    def followers(self, key: int) -> list[tuple[int, ...]]:
        """The tuples of `key`, most recent first."""
        return list(reversed(self._tuples.get(key, ())))

    def ranked(self, text: list[int]) -> list[tuple[tuple[int, ...], str, int]]:
        """The last token's (tuple, source, how many tokens before it agree): longest agreement first, then recency."""
        found = []
        for followers in self.followers(text[-1]):
            source, before = self._tuples[text[-1]][followers]
            pairs = zip(reversed(before), reversed(text[:-1][-CONTEXT:]), strict=False)
            found.append((followers, source, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))))
        return sorted(found, key=lambda one: -one[2])

    def latest(self, key: int) -> tuple[int, ...]:
        """The most recent tuple of `key`, or an empty one."""
        return next(reversed(self._tuples.get(key, {})), ())


class Window:
    """W columns of N - 1 cells. Column i is a Jacobi trajectory: its cell on level l stands at position last + l + i.

    Cell (0, 0) is the last known token, so the window is W (N - 1) - 1 probes, level by level: level 0 is a chain
    under that token, and cell (l, i) hangs under cell (l - 1, i). Source: section 3.1 and figure 3 of the paper.
    """

    def __init__(self, width: int, height: int, pool: Pool, fed: int) -> None:
        self.width, self.height, self.pool = width, height, pool
        self.columns: list[list[int]] = []
        self.ages: list[int] = []
        """How many of a column's cells, counted from the deepest, are answers of the model or text."""
        self.base = -1
        """Length of the text under which the window stands."""
        self.fed = fed
        """The first token that is not yet the key of an n-gram in the pool."""
        self._guesses = 0

    def tokens(self) -> list[int]:
        """Tokens of the probes, in the order of `window_parents`."""
        return [column[level] for level in range(self.height) for column in self.columns][1:]

    def restart(self, text: list[int], *, filled: bool = True) -> None:
        """Stand under the end of `text` with guesses only, or without any cell where it is not run."""
        self.columns, self.ages, self.base = [], [], len(text)
        self.fed = self.pool.feed(text, self.fed)
        if filled:
            self._fill(text)

    def resize(self, width: int, text: list[int]) -> None:
        """Give up columns at the right end, or add some."""
        self.width = width
        del self.columns[width:], self.ages[width:]
        self._fill(text)

    def learn(self, answers: list[int], text: list[int]) -> None:
        """Harvest, then move on to the end of `text`, which grew by at least one token.

        `answers` are what the model says after the deepest cell of the first columns; columns without one are given
        up. Shifting a column up by its answer moves it one position on; each further new token drops one at the left.
        """
        columns, ages = [], []
        for column, age, answer in zip(self.columns, self.ages, answers, strict=False):
            if age >= self.height - 1:
                self.pool.add(column[0], (*column[1:], answer))
            columns.append([*column[1:], answer])
            ages.append(age + 1)
        dropped = len(text) - self.base - 1
        self.columns, self.ages, self.base = columns[dropped:], ages[dropped:], len(text)
        if self.columns:
            self.columns[0][0] = text[-1]
        self.fed = self.pool.feed(text, self.fed)
        self._fill(text)

    def copies(self, text: list[int]) -> list[tuple[int, ...]]:
        """What followed the last token in n-grams of the text that are not complete yet; the copy repeats itself."""
        for place in range(len(text) - 2, self.fed - 1, -1):
            if text[place] == text[-1]:
                copied = text[place + 1 :]
                return [tuple((copied * self.height)[: self.height])]
        return []

    def _fill(self, text: list[int]) -> None:
        """Add columns at the right end: what the pool has behind the last one, else tokens of the text."""
        while len(self.columns) < self.width:
            first = text[-1]
            if self.columns:
                behind = self.pool.latest(self.columns[-1][0])
                first = behind[0] if behind else self._guess(text)
            cells = self.pool.latest(first)[: self.height - 1]
            self.ages.append(self.height - 1 if cells else 0)
            self.columns.append([first, *(cells or [self._guess(text) for _ in range(self.height - 1)])])

    def _guess(self, text: list[int]) -> int:
        """A token of the text; which one is a hash of how many were guessed so far (Fibonacci hashing)."""
        self._guesses += 1
        return text[(self._guesses * 2654435769 % 2**32) * len(text) >> 32]


def window_parents(width: int, height: int) -> list[int]:
    """Parents of a window's probes, as `Draft.with_probes` counts them; probe l * width + i - 1 is cell (l, i)."""
    first = list(range(ROOT, width - 2))  # level 0 without cell (0, 0), which is ROOT
    return first + [probe - width for probe in range(width - 1, width * height - 1)]


@dataclass(frozen=True, slots=True)
class Guess:
    """A path that may follow the last token: its source, its rank among all of that step, and what it is worth."""

    tokens: tuple[int, ...]
    source: str
    rank: int
    matched: int = 0
    """Tokens before the last one that agree with where the path was seen."""
    from_window: bool = False
    """Without the window it would not have been guessed."""


@dataclass(slots=True)
class Node:
    """A node of the trie of all guesses, run or not: the text tells about every one of them how good it was."""

    token: int
    parent: int
    depth: int
    guess: Guess
    """Who said it first; rather one that needs no window."""
    chance: float = 1.0
    """Estimated probability that the whole path down to here is accepted."""

    @property
    def kind(self) -> tuple[str, int, int, int]:
        return self.guess.source, self.guess.matched, min(self.guess.rank, 3), self.depth


def trie(guesses: SequenceOf[Guess]) -> list[Node]:
    """All guesses with shared prefixes merged, in topological order; the first guess that says a node owns it."""
    nodes: list[Node] = []
    known: dict[tuple[int, int], int] = {}
    for guess in guesses:
        above = ROOT
        for depth, token in enumerate(guess.tokens, 1):
            node = known.get((above, token))
            if node is None:
                node = known[above, token] = len(nodes)
                nodes.append(Node(token, above, depth, guess))
            elif nodes[node].guess.from_window and not guess.from_window:
                nodes[node].guess = guess
            above = node
    return nodes


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What the n-gram pool was good for, in one request or in all so far."""

    size: int = 0
    """Tuples in the pool now; of all requests those that are still running."""
    steps: int = 0
    hits: int = 0
    """Steps in which some guess was there for the last token."""
    accepted: dict[str, int] = field(default_factory=dict)
    """Accepted tokens by source: prompt, text, window, answers."""
    ranks: int = 0
    """Sum of the ranks of the accepted guesses; 0 is the first."""
    accepting_steps: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.steps if self.steps else 0.0

    @property
    def mean_rank(self) -> float:
        """Mean rank of the guess whose tokens were accepted, over the steps that accepted any."""
        return self.ranks / self.accepting_steps if self.accepting_steps else 0.0

    def as_dict(self) -> dict[str, object]:
        rates = {"hit_rate": round(self.hit_rate, 4), "mean_rank": round(self.mean_rank, 4)}
        return {**asdict(self), **rates}


@dataclass(slots=True)
class _Counts:
    """The running counts behind `PoolStatistics`."""

    steps: int = 0
    hits: int = 0
    accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys((PROMPT, TEXT, WINDOW, ANSWERS), 0))
    ranks: int = 0
    accepting_steps: int = 0

    def book(self, nodes: list[Node], path: list[int]) -> None:
        self.steps += 1
        self.hits += bool(nodes)
        for node in path:
            self.accepted[nodes[node].guess.source] += 1
        if path:
            self.accepting_steps += 1
            self.ranks += nodes[path[-1]].guess.rank

    def freeze(self, size: int) -> PoolStatistics:
        return PoolStatistics(size, self.steps, self.hits, dict(self.accepted), self.ranks, self.accepting_steps)


TRIAL = 32
"""Steps with a window before its width moves."""
MOVE = 8
"""Steps between two moves of a size."""
COLUMNS = 64
"""Widest window that adaptation goes to."""


class Sizes:
    """W and G, moved by what rows bring and what they cost on this machine.

    The price of a row is rho dT/dn: tokens per second now, times the seconds one more row takes. What a window brings
    is counted, not tried out: accepted tokens that no guess from another source would have given. Between sizes the
    paper's scaling law speaks, gain(W) = c log(1 + W), so one measured gain tells what one column more would bring.
    """

    def __init__(self, width: int, size: int, guesses: int) -> None:
        self.width, self.size, self.guesses, self.most = width, size, guesses, 4 * guesses
        self.given = width, guesses
        """W and G as they were given."""
        self.running = True
        """Whether this step has a window whose width may move."""
        self.time, self.own, self.tokens = StepTime(), Mean(), Mean()
        self.gain = Mean()
        """Accepted tokens of a sequence's step that only the window gave."""
        self.acceptance, self.ranks = Acceptance(), Acceptance()
        self._since = self._windows = 0

    @property
    def price(self) -> float:
        """Tokens that a row has to bring; 0 until steps were measured."""
        seconds = self.time.seconds + self.own.value
        return self.tokens.value / seconds * self.time.per_row if self.time.steps >= TRUSTED and seconds else 0.0

    def step(self, tokens: int) -> None:
        """A step emitted so many tokens, of all sequences together: move what is due."""
        self.tokens.observe(tokens)
        self._since += 1
        self._windows += self.running
        if self.running and self._windows >= TRIAL and self._windows % MOVE == 0:
            self._move_window()
        if self._since % MOVE == 0 and self.price:
            pays = self.ranks.rate(self.guesses - 1) >= self.price
            self.guesses = min(max(self.guesses + (1 if pays else -1), 1), self.most)

    def _move_window(self) -> None:
        height, price = self.size - 1, self.price
        if not price:
            return
        wanted = self.gain.value / log1p(self.width) / (price * height) - 1  # where one column more just pays
        if abs(wanted - self.width) >= 1:
            self.width = min(max(self.width + (1 if wanted > self.width else -1), 1), COLUMNS)


@dataclass(slots=True)
class _Note:
    """What is known about one sequence."""

    window: Window
    answers: Answers = field(default_factory=Answers)
    counts: _Counts = field(default_factory=_Counts)
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
        for name, value in (("pool_from_prompt", pool_from_prompt), ("adaptive", adaptive)):
            if not isinstance(value, bool):
                raise OptionError(f"{name}={value!r} is neither True nor False")
        self.sizes = Sizes(window_size, ngram_size, guess_set_size)
        self.from_prompt, self.adaptive = pool_from_prompt, adaptive
        self.clock = target.clock
        self.trials = Trials(GIVEN + 1)
        self._way = GIVEN
        """How this step runs."""
        self._drafting = 0
        """Sequences that were drafted for in this step."""
        self._began = 0.0
        self._total = _Counts()
        self._drafted: tuple[float, float] = (0.0, 0.0)
        """When the last draft was ready, and how long it took together with the learning before it."""
        self._learning = 0.0
        self._notes: WeakKeyDictionary[Sequence, _Note] = WeakKeyDictionary()

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
            note = self._notes[sequence] = _Note(Window(sizes.width, sizes.size - 1, pool, fed))
        note.nodes, note.ran = [], False
        if sequence.room <= 1:
            return EMPTY  # the next token is the last one: nothing to accept, nothing to learn for
        window = note.window
        windowed = self._way in (WINDOWED, GIVEN)
        if window.base != len(sequence.tokens):
            window.restart(sequence.tokens, filled=windowed)
        note.nodes = trie(self._guesses(note, sequence, max(budget.depth, 0)))
        draft = self._candidates(note.nodes, max(budget.nodes, 0))
        if not windowed:
            return draft
        width = sizes.given[0] if self._way == GIVEN else sizes.width
        if window.width != width or len(window.columns) != width:
            window.resize(width, sequence.tokens)
        if window.width + window.height - 2 > budget.reach:
            return draft
        note.ran = True
        return draft.with_probes(window.tokens(), window_parents(window.width, window.height), SOURCE)

    def _guesses(self, note: _Note, sequence: Sequence, depth: int) -> list[Guess]:
        """Paths behind the last token, most trusted first; none goes on behind an end or below `depth`."""
        text, window = sequence.tokens, note.window
        found = [Guess(path, TEXT, 0) for path in window.copies(text)]
        most = self.sizes.given[1] if self._way == GIVEN else self.sizes.guesses
        for followers, source, matched in window.pool.ranked(text)[:most]:
            found.append(Guess(followers, source, len(found), matched, source == WINDOW))
        if self._way != GIVEN and depth:
            found += self._runners_up(note, sequence, min(depth, window.height), len(found))
        return [Guess(cut(g.tokens[:depth], sequence.ends), g.source, g.rank, g.matched, g.from_window) for g in found]

    def _runners_up(self, note: _Note, sequence: Sequence, depth: int, rank: int) -> list[Guess]:
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
        """Nodes that pay, at most so many, the likeliest first; without adaptation the first ones."""
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

    def _learn(self, note: _Note, sequence: Sequence, result: Result) -> None:
        """Score every guess by the text, then read the model's answers."""
        said = self._score(note, result)
        if note.nodes or note.ran:
            note.counts.book(note.nodes, said)
            self._total.book(note.nodes, said)
        window = note.window
        if sequence.finished:
            return
        top = None
        reads = self._way in (GUESSES, WINDOWED)
        if result.logits is not None and (reads or (note.ran and not sequence.sampling.greedy)):
            top = likeliest(result.logits, sequence.sampling)
        if reads and top is not None and window.base >= 1:
            self._recall(note.answers, sequence.tokens[window.base - 1], result, *top)
        probes = len(result.proposed) - result.proposed.candidates
        if note.ran and probes == window.width * window.height - 1:
            window.learn(self._answers(window, sequence, result, top), sequence.tokens)

    def _score(self, note: _Note, result: Result) -> list[int]:
        """The accepted guesses, from the root down. Guesses that were not run are judged by the text, too."""
        said, above, sizes = list[int](), {ROOT: 0}, self.sizes
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
                    said.append(place)
        alone = len(list(takewhile(lambda place: not note.nodes[place].guess.from_window, said)))
        if sizes.running:
            sizes.gain.observe(len(said) - alone)
        return said

    def _recall(self, answers: Answers, last: int, result: Result, scores: Tensor, ids: Tensor) -> None:
        """Note the likeliest tokens after every row; what rows of the text say stands above the rest."""
        draft = result.draft
        tokens = [last, *draft.tokens]
        rest = range(len(draft), 0, -1)  # probes first, then branches
        for row in [*rest, 0, *(node + 1 for node in result.path)]:
            answers.learn(tokens[row], scores[row], ids[row], row > draft.candidates)

    def _answers(
        self, window: Window, sequence: Sequence, result: Result, top: tuple[Tensor, Tensor] | None
    ) -> list[int]:
        """What the model says after the deepest cells, column by column, up to the first that was clipped away."""
        first = len(result.proposed) - window.width
        place = {old: new for new, old in enumerate(result.nodes)}
        rows = [1 + place[node] for node in takewhile(place.__contains__, range(first, first + window.width))]
        if top is None or sequence.sampling.greedy:
            return [result.answers[row] for row in rows]
        scores, ids = top[0][rows], top[1][rows]
        noise = gumbel_rows(sequence.seed, [window.base + window.height - 1 + i for i in range(len(rows))], ids)
        chosen = (scores + noise).argmax(-1, keepdim=True)
        return [int(token) for token in ids.gather(1, chosen).squeeze(1)]


def cut(path: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """The path up to its first end: nothing is accepted behind one."""
    stop = next((place for place, token in enumerate(path, 1) if token in ends), len(path))
    return path[:stop]
