"""Real drafting rounds, replayed on the drafts of a teacher-forced pass: no model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.tune.layer_skip.teacher_forcing import Forced, Text


@dataclass(slots=True)
class Replay:
    """Rounds of all texts. With a threshold of 0 they are the very rounds of real drafting.

    With another threshold only the length of a draft behind its first wrong token is an estimate.
    """

    tokens: int = 0
    accepted: int = 0
    drafted: dict[int, int] = field(default_factory=dict)
    """Draft tokens of a round -> number of rounds."""

    @property
    def rounds(self) -> int:
        return sum(self.drafted.values())

    @property
    def links(self) -> int:
        return sum(drafts * rounds for drafts, rounds in self.drafted.items())

    @property
    def acceptance(self) -> float:
        """Accepted share of the draft tokens."""
        return self.accepted / self.links if self.links else 0.0

    def speed(self, draft: float, verify: Callable[[int], float]) -> float:
        """Speed-up over plain steps: `draft` is the cost of a link, `verify(m)` of a step with m drafts."""
        seconds = self.links * draft + sum(rounds * verify(drafts) for drafts, rounds in self.drafted.items())
        return self.tokens / seconds


def replay(
    texts: SequenceOf[Text],
    forced: Forced,
    drafts: int,
    *,
    threshold: float = 0.0,
    edge: Callable[[int], int] | None = None,
) -> Replay:
    """Rounds of at most `drafts` tokens that end behind the first confidence below `threshold`.

    `edge` is `Target.edge`: drafts end before it.
    """
    found = Replay()
    first = 0
    for text in texts:
        for base, size, right in _rounds(text, forced, first, drafts, threshold, edge):
            found.tokens += right + 1
            found.accepted += right
            found.drafted[size] = found.drafted.get(size, 0) + 1
            assert base + right + 1 < len(text.tokens)
        first += len(text.bases)
    return found


def _rounds(
    text: Text, forced: Forced, first: int, most: int, threshold: float, edge: Callable[[int], int] | None
) -> Iterator[tuple[int, int, int]]:
    """(base, draft tokens, accepted ones) of every round."""
    base, end = text.prompt_length, len(text.tokens)
    while base < end - 1:
        cap = min(most, end - base - 2)
        if edge is not None:
            cap = min(cap, edge(base) - 1 - base)
        at = first + base - text.prompt_length
        size = right = 0
        while size < cap:
            right += right == size and bool(forced.right[at, size])
            size += 1
            sure = float(forced.confidence[at, size - 1]) >= threshold
            if not sure or int(forced.drafts[at, size - 1]) in text.ends:
                break
        yield base, size, right
        base += right + 1
