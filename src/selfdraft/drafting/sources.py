"""Candidate sources that need no forward pass: n-gram contexts, longest match, alignment, earlier top-k.

A source says, at any place of a token tree, which tokens may follow and of what kind its evidence is. How much a kind
is worth is measured (`mixing.py`).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias
from weakref import ref

from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result
from selfdraft.drafting.alignment import COPIED, FOLLOWED, KINDS, Aligned, Match, kind_of_match, realign
from selfdraft.drafting.context_tree import BELIEFS, SILENCE, ContextTree, Guesses, State
from selfdraft.drafting.successors import Answers, likeliest, order_of_learning, topk

ANCHOR = 2
"""A match of 2 tokens or more leaves an alignment behind when it breaks."""
SUCCESSORS = 8
"""Runners-up that are kept behind a token, as in the paper."""


Standing: TypeAlias = Any
"""Where a source stands in its text: what that is, only the source itself knows."""


class Source(Protocol):
    """One source of candidates, for one request. A state that is false has nothing to say."""

    name: str
    beliefs: tuple[float, ...]
    """Prior acceptance of a candidate of each kind of evidence."""

    @property
    def state(self) -> Standing:
        """Where the source stands at the end of the text."""

    def step(self, state: Standing, token: int) -> Standing:
        """The state one token on."""

    def guess(self, state: Standing) -> Guesses:
        """What may follow."""


class Reader:
    """Reads a request's tokens beside an original: the request's own text, earlier outputs, or a prediction."""

    def __init__(self, tree: ContextTree, *, own: bool = False, aligned: Aligned | None = None) -> None:
        self.tree = tree
        self.own = own
        self.match = Match(tree)
        self.aligned = aligned
        self.contexts: State = tree.state if own else []
        self._read: list[int] = tree.text if own else []

    def push(self, token: int) -> None:
        """The request's next token. Constant time, amortised."""
        match, original, aligned = self.match, self.tree.text, self.aligned
        length = match.length
        broken = length >= ANCHOR and not (match.place < len(original) and original[match.place] == token)
        if broken:
            aligned = Aligned(match.place)
        if aligned is not None:
            aligned = realign(original, aligned, token)
        if self.own:
            self.tree.push(token)
            self.contexts = self.tree.state
        else:
            self._read.append(token)
            self.contexts = self.tree.step(self.contexts, token)
        match.push(self._read, self.contexts)
        if aligned is not None and match.length > (length if broken else ANCHOR + aligned.run):
            aligned = None
        self.aligned = aligned


class Contexts:
    """What followed the last one to six tokens."""

    beliefs: tuple[float, ...] = BELIEFS

    def __init__(self, name: str, reader: Reader) -> None:
        self.name, self.reader = name, reader
        self.step, self.guess = reader.tree.step, reader.tree.guess

    @property
    def state(self) -> State:
        return self.reader.contexts


class Copies:
    """What followed the longest match. A state is the place where the copy goes on, and the length so far."""

    beliefs: tuple[float, ...] = COPIED

    def __init__(self, name: str, reader: Reader) -> None:
        self.name, self.reader = name, reader
        self._original = reader.tree.text

    @property
    def state(self) -> tuple[int, int] | None:
        match = self.reader.match
        return (match.place, match.length) if match.length else None

    def step(self, state: tuple[int, int], token: int) -> tuple[int, int] | None:
        place, length = state
        return (place + 1, length + 1) if place < len(self._original) and self._original[place] == token else None

    def guess(self, state: tuple[int, int]) -> Guesses:
        place, length = state
        original = self._original
        return {original[place]: kind_of_match(length)} if place < len(original) and original[place] >= 0 else SILENCE


class Alignments:
    """What stands where a broken copy would be by now, and one token further."""

    beliefs: tuple[float, ...] = FOLLOWED

    def __init__(self, name: str, reader: Reader) -> None:
        self.name, self.reader = name, reader
        self._original = reader.tree.text

    @property
    def state(self) -> Aligned | None:
        return self.reader.aligned

    def step(self, state: Aligned, token: int) -> Aligned | None:
        return realign(self._original, state, token)

    def guess(self, state: Aligned) -> Guesses:
        original, place, kind = self._original, state.place, state.kind
        if place >= len(original) or original[place] < 0:
            return SILENCE
        if place + 1 >= len(original) or original[place + 1] < 0 or original[place + 1] == original[place]:
            return {original[place]: kind}
        return {original[place]: kind, original[place + 1]: kind + KINDS}


class Successors:
    """The model's likeliest tokens behind a token when it was last asked there. A state is a token and its place.

    A sampled request's runners-up are ordered with the noise that the target will use at the place.
    Source: Token Recycling (arXiv 2408.08696), section 3.
    """

    beliefs: tuple[float, ...] = (0.45, 0.12, *[0.04] * (SUCCESSORS - 2))

    def __init__(self, name: str, sequence: Sequence) -> None:
        self.name = name
        self._of = ref(sequence)  # the drafter's note must not keep its sequence alive
        self._greedy = sequence.sampling.greedy
        self._guesses: dict[int, Guesses] = {}
        self._answers = Answers()
        self.awake = True
        """Whether it says anything."""

    @property
    def _sequence(self) -> Sequence:
        sequence = self._of()
        assert sequence is not None, "whoever asks has it"
        return sequence

    @property
    def state(self) -> tuple[int, int] | None:
        tokens = self._sequence.tokens
        return (tokens[-1], len(tokens)) if self.awake else None

    def step(self, state: tuple[int, int], token: int) -> tuple[int, int]:
        return token, state[1] + 1

    def guess(self, state: tuple[int, int]) -> Guesses:
        token, place = state
        if self._greedy:
            return self._guesses.get(token, SILENCE)
        found = self._answers.guess(token, self._sequence, place, SUCCESSORS)[0]
        return {follower: rank for rank, follower in enumerate(found)}

    def learn(self, last: int, result: Result) -> None:
        """Every row of text teaches, `last` being the token before the draft; what the text took counts most."""
        if result.logits is None:
            return
        draft, tokens = result.draft, [last, *result.draft.tokens]
        rows = 1 + draft.num_candidates  # masks, behind them, are no text
        logits = result.logits[:rows]
        known = None if result.top is None else (result.top[0][:rows], result.top[1][:rows])
        order = order_of_learning(rows, result.path)
        if self._greedy:
            best = (topk(logits, SUCCESSORS)[1] if known is None else known[1][:, :SUCCESSORS]).tolist()
            guesses = [dict(zip(found, range(SUCCESSORS), strict=False)) for found in best]
            for row in order:
                self._guesses[tokens[row]] = guesses[row]
            return
        scores, ids = likeliest(logits, self._sequence.sampling, known=known)
        for row in order:
            self._answers.learn(tokens[row], scores[row], ids[row], probe=False)
