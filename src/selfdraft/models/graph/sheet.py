"""The sheet of a pass: all numbers that change from pass to pass, in one block that is sent to the device at once."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from selfdraft.core.rows import Rows

PATH = 128
"""Places of a path behind what a slot remembers, for which an ordinary sheet has room."""
MOVES = 32
"""Most rows that are put into their places at the beginning of a pass."""
COLUMNS = ("tokens", "positions", "slots", "bases", "places", "seen")
"""One number for each row; see `Lines`."""
Move = tuple[int, int, int]
"""(slot, from place, to place)"""


class Event(Protocol):
    """A point in the work of a device, as `torch.cuda.Event` has it."""

    def record(self) -> None:
        """The point is here: behind all that was asked for so far."""

    def synchronize(self) -> None:
        """Wait until the device has come to the point."""


@dataclass(frozen=True, slots=True)
class Lines:
    """What a pass has to know of each of its rows, in columns.

    A row stands at `places` of its slot. It sees the first `bases` places, which the slot remembers, and behind them
    those of its own path, itself last: `seen` places in all.
    """

    tokens: SequenceOf[int]
    positions: SequenceOf[int]
    slots: list[int]
    bases: list[int]
    places: list[int]
    seen: list[int]
    paths: list[list[int]]
    spans: list[int]
    """Number of the span that a row is in."""
    gates: Mapping[int, frozenset[int]]
    """For each adapter that acts, its rows."""

    def __len__(self) -> int:
        return len(self.slots)


def lay_out(rows: Rows, gates: Mapping[int, SequenceOf[int]]) -> Lines:
    """The lines of a pass; `gates` says which rows use which adapter."""
    slots, bases, places, seen, spans = (list[int]() for _ in range(5))
    paths: list[list[int]] = []
    for number, span in enumerate(rows.spans):
        parents = span.draft.parents
        for i in range(span.size):
            above = i - 1 if i < span.pending else span.row(parents[i - span.pending])
            paths.append([*(paths[span.start + above] if above >= 0 else ()), span.base + i])
            seen.append(span.base + len(paths[-1]))
        slots += repeat(span.slot, span.size)
        bases += repeat(span.base, span.size)
        places += range(span.base, span.base + span.size)
        spans += repeat(number, span.size)
    using = {number: frozenset(mine) for number, mine in gates.items()}
    return Lines(rows.tokens, rows.positions, slots, bases, places, seen, paths, spans, using)


@dataclass(frozen=True, slots=True)
class Part:
    """The lines `first` up to `stop` of a pass that is too wide for one sheet, or all of them."""

    first: int
    stop: int
    groups: int
    """How many runs of rows of one sequence they are."""


def cut(lines: Lines, rows: int, groups: int) -> Iterator[Part]:
    """Parts of at most `rows` lines and `groups` runs of one sequence, in their order.

    Parents stand in the same part as their children or in one before it, so what a row sees is always written.
    """
    first = runs = 0
    for i, span in enumerate(lines.spans):
        new = i == first or span != lines.spans[i - 1]
        if i - first == rows or (new and runs == groups):
            yield Part(first, i, runs)
            first, runs, new = i, 0, True
        runs += new
    yield Part(first, len(lines), runs)


@dataclass(frozen=True, slots=True)
class SheetSize:
    """What a sheet has room for."""

    rows: int
    groups: int
    """Runs of rows of one sequence."""
    tile: int
    """Rows of one sequence that attention takes together."""
    gates: int = 0
    path: int = PATH

    @property
    def tiles(self) -> int:
        """Every run has at most one tile that is not full, and so has the padding."""
        return self.rows // self.tile + self.groups + 1


class Sheet:
    """One block of 32-bit numbers on the device, and two on the host that are written and sent in turn.

    `parts` are its columns: [rows] each, `gate0` ... [rows], `path` [rows, size.path], `tile_first` and `tile_rows`
    [tiles], `move_slot`, `move_from` and `move_to` [MOVES]. Rows behind the last one are padding, which sees nothing
    (`seen` is 0) and is written to a place that nobody reads; with `repeated` it is the first row again, written there:
    such padding wakes no further experts of a mixture.

    `event` makes what says that a block has been sent and may be written again; None where copies do not overlap.
    """

    def __init__(
        self,
        size: SheetSize,
        device: torch.device,
        *,
        repeated: bool = False,
        event: Callable[[], Event] | None = None,
    ) -> None:
        self.size, self.repeated = size, repeated
        gates = [f"gate{number}" for number in range(size.gates)]
        columns = [*COLUMNS, *gates, "tile_first", "tile_rows", "move_slot", "move_from", "move_to", "path"]
        sizes = [*[size.rows] * (len(COLUMNS) + len(gates)), *[size.tiles] * 2, *[MOVES] * 3, size.rows * size.path]
        self._block = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._sent = [None if event is None else event() for _ in range(2)]
        self._fills = 0
        self.parts = dict(zip(columns, torch.split(self._block, sizes), strict=True))
        self.parts["path"] = self.parts["path"].view(size.rows, size.path)
        self.gates = [self.parts[name] for name in gates]

    def blank(self, trash: int) -> None:
        """Padding alone: a pass of it changes nothing."""
        self.fill(lay_out(Rows((), (), (), ()), {}), Part(0, 0, 0), (), trash)

    def fill(self, lines: Lines, part: Part, moves: SequenceOf[Move], trash: int) -> None:
        """Write the lines of a part and send them. `trash` is a place of every slot that nobody reads."""
        chosen, count = slice(part.first, part.stop), part.stop - part.first
        padding = self.size.rows - count
        again = self.repeated and count > 0
        numbers = array("i")
        for name in COLUMNS:
            column = getattr(lines, name)[chosen]
            rest = trash if name == "places" else column[0] if again else 0
            numbers.extend([*column, *repeat(rest, padding)])
        for number in range(self.size.gates):
            on = lines.gates.get(number, frozenset())
            column = [int(row in on) for row in range(part.first, part.stop)] if on else [0] * count
            numbers.extend([*column, *repeat(column[0] if again else 0, padding)])
        for column in self._tiles(lines.spans[chosen], padding if again else 0):
            numbers.extend([*column, *repeat(0, self.size.tiles - len(column))])
        for column in zip(*moves, *repeat((0, trash, trash), MOVES - len(moves)), strict=True):
            numbers.extend(column)
        paths = lines.paths[chosen]
        for path in [*paths, *([paths[0]] * padding if again else ())]:
            numbers.extend(path)
            numbers.frombytes(bytes(4 * (self.size.path - len(path))))
        numbers.frombytes(bytes(4 * (self._block.numel() - len(numbers))))
        self._send(numbers)

    def _tiles(self, spans: SequenceOf[int], repeated: int) -> tuple[list[int], list[int]]:
        """First row and number of rows of every tile: rows of one span, then the padding that is to be computed."""
        first, many, last = list[int](), list[int](), -2
        for i, span in enumerate([*spans, *repeat(-1, repeated)]):
            if span != last or many[-1] == self.size.tile:
                first.append(i)
                many.append(0)
            many[-1] += 1
            last = span
        assert len(first) <= self.size.tiles, "`cut` keeps to the groups of a sheet"
        return first, many

    def _send(self, numbers: array[int]) -> None:
        turn = self._fills % 2
        self._fills += 1
        sent = self._sent[turn]
        if sent is not None and self._fills > 2:
            sent.synchronize()
        self._hosts[turn].copy_(torch.frombuffer(numbers, dtype=torch.int32))
        self._block.copy_(self._hosts[turn], non_blocking=True)
        if sent is not None:
            sent.record()


def tensors(sheet: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """Columns as indices."""
    return [sheet[name].long() for name in names]
