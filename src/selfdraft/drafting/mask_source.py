"""Trained mask tokens as one source among others: where their groups hang in a tree, and what their rows said.

A group hangs under a place where acceptance may end. If it ends there, the rows of the group say what comes behind, and
the next tree asks them as it asks every other source (`mixing.py`). A mask row costs as much as any other row, so each
has to bring its price: tokens of the next step that no other source named.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import ROOT, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafting.context_tree import SILENCE, Guesses
from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.mask_prediction import Ahead, Groups, Link, MaskTokens, endings, read_group, with_groups
from selfdraft.drafting.mask_tables import MaskTables
from selfdraft.types import Clock

MASKS = "masks"
"""Name of the source: its tokens are shown under it."""
BRANCHES = 3
"""Guesses for each place."""
BINS = 6
"""Classes of stated chances."""
FIRST_GAIN = 0.3
"""Tokens that the first mask row is thought to bring before any was seen; each next one half as much."""
TRY_EVERY = 64
"""After so many steps without a group one hangs under the last token, worth its rows or not: text changes."""


class MaskSource:
    """What the masks behind the last known token said. A state is the number of a place, and the token before it."""

    beliefs: tuple[float, ...] = tuple((place + 0.5) / BINS for place in range(BINS)) * BRANCHES

    def __init__(self, link: Link, clock: Clock) -> None:
        self.name = MASKS
        self.places: list[Ahead] = []
        self.groups: Groups = {}
        """Those in the draft on its way."""
        self.seconds = 0.0
        """What asking its places has taken since somebody set this to 0."""
        self._link, self._last, self._clock = link, -1, clock
        self._known: dict[tuple[int, int], Guesses] = {}

    @property
    def state(self) -> tuple[int, int] | None:
        return (0, self._last) if self.places else None

    def step(self, state: tuple[int, int], token: int) -> tuple[int, int] | None:
        place = state[0] + 1
        return (place, token) if place < len(self.places) else None

    def guess(self, state: tuple[int, int]) -> Guesses:
        found = self._known.get(state)
        if found is None:
            began, (place, token) = self._clock(), state
            guess = self.places[place].after(token, self._link, BRANCHES)
            kinds = (rank * BINS + min(int(chance * BINS), BINS - 1) for rank, chance in enumerate(guess.chances))
            found = self._known[state] = dict(zip(guess.tokens, kinds, strict=True)) or SILENCE
            self.seconds += self._clock() - began
        return found

    def update(self, found: list[Ahead], last: int) -> None:
        """Take what masks said of the places behind the token `last`; nothing known: [], -1."""
        self.places, self._last = found, last
        self._known.clear()


@dataclass(slots=True)
class MaskGroups:
    """Hangs groups of `masks` into trees, at most `most` each, and reads them; one for all requests of a drafter."""

    masks: MaskTokens
    most: int = 6
    tables: MaskTables = field(init=False)
    """What their rows say, where it is asked of a device."""
    gains: list[Mean] = field(init=False)
    """Tokens that each mask row brings, when acceptance ended where its group hangs."""
    _waited: int = 0

    def __post_init__(self) -> None:
        self.tables = MaskTables(self.masks, BRANCHES)
        self.gains = [Mean(FIRST_GAIN / 2**place, 16.0, 0.995) for place in range(len(self.masks.ids))]

    def hang(self, source: MaskSource, tree: Draft, prices: SequenceOf[float], depth: int) -> Draft:
        """The tree with mask rows as probes; `prices[i]`: what its i-th further row must bring, in tokens.

        `depth`: deepest place that a probe may have.
        """
        sizes: list[tuple[int, int]] = []
        rows = 0
        for point, chance in endings(tree, chances_of(tree))[: self.most]:
            room = depth - (0 if point == ROOT else tree.depths[point])
            size = self._size(chance, prices, rows, room)
            if size:
                sizes.append((point, size))
                rows += size
        self._waited = 0 if rows else self._waited + 1
        tree, source.groups = with_groups(tree, sizes, self.masks.ids, MASKS)
        return tree

    def _size(self, chance: float, prices: SequenceOf[float], rows: int, room: int) -> int:
        """Masks of a group that hangs where acceptance ends with this chance; `rows` mask rows hang already."""
        if self._waited >= TRY_EVERY and not rows:
            return min(2, room, len(self.gains), len(prices))
        size = 0
        for gain in self.gains[: max(0, min(room, len(prices) - rows))]:
            if chance * gain.value < prices[rows + size]:
                break
            size += 1
        return size

    def learn(self, source: MaskSource, sequence: Sequence, result: Result) -> None:
        """Book what the last group brought, and read the one behind the end of acceptance."""
        count = len(source.places)
        brought = [0.0] * count
        for depth, node in enumerate(result.path[:count]):
            brought[depth] = float(result.draft.sources[node] == MASKS)
        for gain, tokens in zip(self.gains, brought, strict=False):
            gain.observe(tokens)
        ahead = [] if sequence.finished else read_group(source.groups, sequence, result, self.tables)
        source.update(ahead, sequence.tokens[-1])
        source.groups = {}
