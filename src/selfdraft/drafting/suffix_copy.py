"""Drafts by copying what followed the longest earlier match, as long as a copied token pays.

Acceptance is estimated by (recent accuracy of copies in this request, match length). A step takes some 20 microseconds,
a tenth of the tree of all sources. Source of the index: SAM-Decoding (arXiv 2411.10666).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafting.alignment import COPIED, kind_of_match
from selfdraft.drafting.context_tree import BREAK
from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.suffix_automaton import SuffixAutomaton, repeated
from selfdraft.types import Budget

SOURCE = "copy"
AHEAD = 32
"""Tokens that are copied at most."""
ACCURACIES = 4
"""Classes of the recent accuracy of copies in the same request."""
PRIOR, FADE = 4.0, 0.998


class RequestCopy:
    """What is known of one request: its text, a prediction before it, and the copy that was looked up last."""

    def __init__(self, sequence: Sequence) -> None:
        prediction = [token for token in sequence.sampling.prediction if isinstance(token, int)]
        self.index = SuffixAutomaton()
        self.text = [*prediction, BREAK] if prediction else []
        for token in self.text:
            self.index.push(token)
        self.read = 0
        self.length = 0
        """Of the match."""
        self.copied: list[int] = []
        self.held = Mean(guess=0.5, prior=1.0, fade=0.9)
        """Whether first tokens of copies were right lately."""

    def look_up(self, sequence: Sequence) -> None:
        """Read what the sequence has got since, and find the copy. Constant time per token, amortised."""
        tokens, push = sequence.tokens, self.index.push
        for place in range(self.read, len(tokens)):
            self.text.append(tokens[place])
            push(tokens[place])
        self.read = len(tokens)
        self.length, end = self.index.match()
        self.copied = self.text[end : end + AHEAD] if self.length else []
        if BREAK in self.copied:
            del self.copied[self.copied.index(BREAK) :]
        elif 0 < len(self.copied) < AHEAD:  # it runs into its own end
            self.copied = repeated(self.copied, AHEAD)


class SuffixCopy:
    """Chains of copied tokens. What a copy is worth outlives a request; what was read does not."""

    def __init__(self) -> None:
        self._notes: WeakKeyDictionary[Sequence, RequestCopy] = WeakKeyDictionary()
        self._means = [[Mean(belief, PRIOR, FADE) for belief in COPIED] for _ in range(ACCURACIES)]
        """By class of how copies held lately, and class of match length."""
        self._chances = [[mean.value for mean in means] for means in self._means]
        """Their values."""

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether it has drafted for the sequence."""
        return sequence in self._notes

    def draft(
        self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget], prices: SequenceOf[float]
    ) -> list[Draft]:
        """For each sequence the copy, as long as its i-th token is at least as likely as `prices[i]`."""
        return [self._one(sequence, budget, prices) for sequence, budget in zip(sequences, budgets, strict=True)]

    def observe(self, sequences: SequenceOf[Sequence]) -> None:
        """Score the copies by what came, drafted or not. To be called after the tokens were committed."""
        for sequence in sequences:
            note = self._notes.get(sequence)
            if note is None or note.read == len(sequence.tokens):
                continue
            recent = _recent_accuracy(note)
            means, chances = self._means[recent], self._chances[recent]
            came = sequence.tokens[note.read :]
            if note.copied:
                note.held.observe(float(note.copied[0] == came[0]))
            for depth, (copied, token) in enumerate(zip(note.copied, came, strict=False)):
                kind = kind_of_match(note.length + depth)
                means[kind].observe(float(copied == token))
                chances[kind] = means[kind].value
                if copied != token:
                    break

    def _one(self, sequence: Sequence, budget: Budget, prices: SequenceOf[float]) -> Draft:
        note = self._notes.get(sequence)
        if note is None:
            note = self._notes[sequence] = RequestCopy(sequence)
        note.look_up(sequence)
        most = min(len(note.copied), budget.max_depth, budget.max_nodes, len(prices))
        chances, reached, scores = self._chances[_recent_accuracy(note)], 1.0, list[float]()
        for depth in range(most):
            own = chances[kind_of_match(note.length + depth)]
            reached *= own
            if reached < prices[depth]:
                break
            scores.append(own)
        return Draft.chain(note.copied[: len(scores)], SOURCE, scores) if scores else EMPTY


def _recent_accuracy(note: RequestCopy) -> int:
    """The class of how often copies were right lately."""
    return min(int(ACCURACIES * note.held.value), ACCURACIES - 1)
