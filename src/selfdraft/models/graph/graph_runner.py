"""The fast path on a GPU: every kind of decoding pass is captured once and replayed with another sheet.

Graphs differ in the view of the model, the number of rows, how far rows see, and whether mask ids may be among the
tokens. Prefills run call by call, each in a pass of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from selfdraft.core.rows import Rows, chain_rows
from selfdraft.errors import RunnerUnavailable
from selfdraft.models.adapters import Gate, MaskAdapter, gate_rows
from selfdraft.models.attention import Plan
from selfdraft.models.graph.capture import Capture, Replay
from selfdraft.models.graph.parts import joined, parts_of
from selfdraft.models.graph.plain_glue import Glue
from selfdraft.models.graph.plain_tree_attention import Attention, Reach
from selfdraft.models.graph.sheet import MOVES, PATH, Event, Lines, Move, Part, Sheet, SheetSize, cut, lay_out
from selfdraft.models.graph.stacked_cache import StackedCache, shapes_of
from selfdraft.models.graph.static_pass import StaticPlan
from selfdraft.models.graph.tape_pass import Given, TapePass
from selfdraft.models.kinds import first_line
from selfdraft.models.runner.tape import Slot
from selfdraft.types import Clock, PassVariant, Skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of rows for which there are graphs, where bits need not be the same in all of them."""
PIECE = 256
"""Positions of a piece of keys."""
TILE_ROWS = 16
"""Query rows of a tile of attention, heads that share keys beneath each other."""
SPARE = 256
"""Places behind the context: rows of a draft stand there for a moment."""
TRIALS = 5
"""How often the replays of a pass are timed."""


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """How passes become graphs.

    `classes`: numbers of rows, ascending. With one class alone all decoding passes have one shape: the level 'bitwise'.
    `shortest`: places that the least of graphs sees; the next see 4 times as many each. `most`: graphs that are kept.
    `places`: those of a slot at first; None: all of the context, and some behind it for drafts. `event` makes what
    guards the blocks of a sheet (`Sheet`). `glue` runs what stands between products and attention, in
    passes that are tapes (`tape_pass.py`); None: they are the stock forward, as are those that cannot be tapes.
    """

    capture: Capture
    attention: Attention
    classes: tuple[int, ...] = CLASSES
    piece: int = PIECE
    shortest: int = 1024
    most: int = 64
    places: int | None = None
    event: Callable[[], Event] | None = None
    glue: Glue | None = None

    @property
    def one_class(self) -> bool:
        return len(self.classes) == 1

    def __str__(self) -> str:
        if self.one_class:
            return f"graphs, one class of {self.classes[0]} rows"
        return f"graphs, classes of {self.classes[0]} to {self.classes[-1]} rows"


class Host(Protocol):
    """What a graph runner asks of its target."""

    adapters: tuple[MaskAdapter, ...]
    gate: Gate
    """Which rows of the running pass use which adapter."""
    slots: int
    vocab: int
    runs: str
    """How passes are run, and why not fast if they are not."""
    last: Plan | StaticPlan | None
    """The plan of the last pass."""

    def eager(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        """A pass that is run call by call: answers of the rows that ask for them."""

    def view_for(self, short: PassVariant | None, *, gated: bool) -> PreTrainedModel:
        """The model as a pass uses it, with adapters or without."""

    def embeds(self, tokens: Tensor) -> Tensor:
        """Embeddings [1, n, hidden] of tokens [1, n], mask ids among them."""


@dataclass(frozen=True, slots=True)
class Key:
    """What graphs differ in."""

    view: int
    """The id of a view, which the graph keeps."""
    rows: int
    length: int
    path: int
    masked: bool
    """Mask ids may be among the tokens, and adapters act."""


@dataclass(eq=False, slots=True)
class Graph:
    """One kind of pass. `replay` is None until it is captured."""

    model: PreTrainedModel
    sheet: Sheet
    plan: StaticPlan
    run: Callable[[], Tensor]
    """The pass call by call: answers [rows, vocab] of all rows."""
    said: Tensor | None = None
    """Answers, in fixed memory."""
    replay: Replay | None = None
    uses: int = 0


class GraphRunner:
    """Runs the passes of one target, of weights on one device, over its cache.

    Errors: RunnerUnavailable, when it is made.
    """

    def __init__(
        self, host: Host, view: PreTrainedModel, places: int, settings: GraphSettings, *, experts: bool = False
    ) -> None:
        weight = next(p for p in view.parameters() if p.is_floating_point())
        self.device = weight.device
        notes = shapes_of(view, self.device)
        if not notes.layers:
            raise RunnerUnavailable("graphs need a model whose layers attend through the attention interface")
        self.host, self.settings = host, settings
        self.cache = StackedCache(host.slots, places, notes.layers, weight.new_empty(0, dtype=notes.dtype))
        shared = max(layer.heads // layer.key_heads for layer in notes.layers.values())
        self.tile = max(1, TILE_ROWS // shared)
        self._experts = experts
        self._view, self._weight = view, weight
        self._moves: dict[int, list[Move]] = {}
        """By slot, rows that the next pass has to put into their places."""
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._sheets: dict[tuple[int, int], Sheet] = {}
        self._fixed = self._addresses()
        self._captures = True
        self._tapes: dict[tuple[int, bool], tuple[PreTrainedModel, TapePass | str]] = {}
        """Of views, with masks or without: the tape, or why there is none."""
        self._tape(view, masked=False)

    def __str__(self) -> str:
        if self.settings.glue is None:
            return str(self.settings)
        plain = self._tape(self._view, masked=False)
        why = "" if isinstance(plain, TapePass) else f"; small kernels are not fused: {plain}"
        return f"{self.settings}{why or ', small kernels fused'}"

    @property
    def fused(self) -> bool:
        """Whether the plain pass is a tape with fused glue."""
        return isinstance(self._tape(self._view, masked=False), TapePass)

    @property
    def edges(self) -> int:
        """Drafts end where a piece of keys does, where bits are promised; 0: anywhere.

        A key is read with its whole piece or along the path of a row; both say the same, but may round otherwise.
        """
        return self.settings.piece if self.settings.one_class else 0

    def forward(self, rows: Rows, short: PassVariant | None) -> Tensor:
        """What `Target.forward` says, in memory of its own."""
        said = []
        self._make_room(rows)
        for part in parts_of(rows):
            if part.decodes:
                said.append((part, self._decode(part.rows, short)))
            else:
                self.flush()
                said.append((part, self.host.eager(part.rows, short)))
        return joined(said)

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """Remember rows of the last pass; those that are out of place are moved by the next one."""
        moves = [(slot, base + row, base + i) for i, row in enumerate(order) if row != i]
        if slot in self._moves:
            self.flush()
        if moves:
            self._moves[slot] = moves

    @torch.inference_mode()
    def flush(self) -> None:
        """Put into place now what was kept: before anything but a graph reads the cache."""
        for slot, moves in self._moves.items():
            self.cache.move(slot, [source for _, source, _ in moves], [to for _, _, to in moves])
        self._moves.clear()

    def warm_up(self) -> Iterator[int]:
        """Capture the graphs of plain passes, the largest first; yields how many are left."""
        sizes = sorted(self.settings.classes, reverse=True)
        for left, size in zip(range(len(sizes) - 1, -1, -1), sizes, strict=True):
            with torch.inference_mode():
                lines = lay_out(chain_rows([(0, 0, 0)]), {})
                graph = self._graph(self.host.view_for(None, gated=False), size, lines, masked=False)
                if graph.replay is None:
                    self._try_capture(graph)
            yield left

    @torch.inference_mode()
    def seconds(self, clock: Clock, times: int) -> float:
        """Of one replay of the least plain pass, which nothing else delays: the median of some trials of so many.

        Errors: RunnerUnavailable where it cannot be captured.
        """
        lines = lay_out(chain_rows([(0, 0, 0)]), {})
        graph = self._graph(self.host.view_for(None, gated=False), self.settings.classes[0], lines, masked=False)
        if graph.replay is None:
            self._try_capture(graph)
        if graph.replay is None or graph.said is None:
            raise RunnerUnavailable(self.host.runs)
        trials = []
        for _ in range(TRIALS):
            graph.said[0, 0].item()  # waits for what was asked for before
            began = clock()
            for _ in range(times):
                graph.replay()
            graph.said[0, 0].item()
            trials.append((clock() - began) / times)
        return median(trials)

    def close(self) -> None:
        """Let go of all graphs."""
        for graph in self._graphs.values():
            if graph.replay is not None:
                graph.replay.close()
        self._graphs.clear()
        self._sheets.clear()
        self._tapes.clear()

    def _decode(self, rows: Rows, short: PassVariant | None) -> Tensor:
        acting: dict[int, list[int]] = {}
        if rows.probing:
            acting = gate_rows(rows, self.host.adapters, self.host.vocab, skipped=isinstance(short, Skip))
        model = self.host.view_for(short, gated=bool(acting))
        lines = lay_out(rows, acting)
        answered = set(rows.logit_rows)
        said: list[Tensor] = []
        for part in cut(lines, self.settings.classes[-1], self._groups(self.settings.classes[-1])):
            logits = self._run(model, lines, part, masked=bool(acting))
            said += _picked(logits, [row - part.first for row in range(part.first, part.stop) if row in answered])
        return said[0] if len(said) == 1 else torch.cat(said) if said else self._nothing()

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.host.vocab, dtype=self._weight.dtype, device=self.device)

    def _run(self, model: PreTrainedModel, lines: Lines, part: Part, *, masked: bool) -> Tensor:
        """Answers [rows, vocab] of one part of a pass, valid until the next one."""
        count = part.stop - part.first
        size = next(size for size in self.settings.classes if size >= count and self._groups(size) >= part.groups)
        graph = self._graph(model, size, lines, masked=masked)
        graph.uses += 1
        if graph.replay is None and self._captures and (self.settings.one_class or graph.uses > 1):
            self._try_capture(graph)
        graph.sheet.fill(lines, part, self._taken(), self.cache.trash)
        self.host.last = graph.plan
        if graph.replay is None:
            return graph.run()
        graph.replay()
        assert graph.said is not None, "made when it was captured"
        return graph.said

    def _groups(self, size: int) -> int:
        """Runs of rows of one sequence for which sheets of so many rows have room."""
        return min(size, self.host.slots)

    def _taken(self) -> list[Move]:
        """The moves that a sheet takes along; where they are too many, all are done now."""
        if sum(map(len, self._moves.values())) > MOVES:
            self.flush()
        moves = [*chain.from_iterable(self._moves.values())]
        self._moves.clear()
        return moves

    def _graph(self, model: PreTrainedModel, size: int, lines: Lines, *, masked: bool) -> Graph:
        """The graph for such a pass, made where there is none."""
        if self._addresses() != self._fixed:  # weights or cache have moved: graphs would use the old memory
            self.close()
            self._fixed = self._addresses()
        length = self.settings.shortest
        while length < max(lines.seen):
            length *= 4
        path = PATH
        while path < max(map(len, lines.paths)):
            path *= 2
        key = Key(id(model), size, min(length, self.cache.places), path, masked)
        if key not in self._graphs:
            self._graphs[key] = self._made(model, key)
            if len(self._graphs) > self.settings.most:
                _, oldest = self._graphs.popitem(last=False)
                if oldest.replay is not None:
                    oldest.replay.close()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _made(self, model: PreTrainedModel, key: Key) -> Graph:
        sheet = self._sheet(key.rows, key.path)
        reach = Reach(key.length, self.settings.piece, self.tile)
        keys, values, stacks = dict(self.cache.keys), dict(self.cache.values), tuple(self.cache.stacks)
        plan = StaticPlan(keys, values, stacks, sheet.parts, reach, self.settings.attention)
        gate = self.host.gate

        def run_tape(tape: TapePass) -> Tensor:
            tokens = sheet.parts["tokens"]
            inputs = {Slot.TOKENS: tokens, Slot.POSITIONS: sheet.parts["positions"]}
            if key.masked:
                inputs[Slot.EMBEDS] = self.host.embeds(tokens.long()[None])
            return tape(inputs, Given(plan, sheet.gates, key.rows))

        def run() -> Tensor:
            plan.begin()
            tape = self._tape(model, masked=key.masked)
            if isinstance(tape, TapePass):
                try:
                    return run_tape(tape)
                except Exception as error:
                    if tape.ran:  # its kernels are there, so it is something else
                        raise
                    self._tapes[id(model), key.masked] = model, first_line(error)
                    plan.begin()
            tokens, positions = (sheet.parts[name].long()[None] for name in ("tokens", "positions"))
            given = {"inputs_embeds": self.host.embeds(tokens)} if key.masked else {"input_ids": tokens}
            gate.columns = sheet.gates if key.masked else None
            try:
                said = model(**given, position_ids=positions, use_cache=False, logits_to_keep=0, selfdraft=plan)
            finally:
                gate.columns = None
            answers: Tensor = said.logits[0]
            return answers

        return Graph(model, sheet, plan, run)

    def _tape(self, model: PreTrainedModel, *, masked: bool) -> TapePass | str:
        """The tape of a view, or why its passes are the stock forward."""
        glue, key = self.settings.glue, (id(model), masked)
        if glue is None:
            return "not asked for"
        if key not in self._tapes:  # the view is kept, so that its id stays its own
            self.host.gate.traced = True
            try:
                self._tapes[key] = model, TapePass(model, glue, embedded=masked)
            except RunnerUnavailable as error:
                self._tapes[key] = model, str(error)
            finally:
                self.host.gate.traced = False
        return self._tapes[key][1]

    def _sheet(self, rows: int, path: int) -> Sheet:
        """All graphs of so many rows read the same sheet."""
        if (rows, path) not in self._sheets:
            size = SheetSize(rows, self._groups(rows), self.tile, len(self.host.adapters), path)
            made = Sheet(size, self.device, repeated=self._experts, event=self.settings.event)
            self._sheets[rows, path] = made
        return self._sheets[rows, path]

    def _try_capture(self, graph: Graph) -> None:
        """Capture a pass. Where that fails, none is captured any more, and `runs` says why."""
        graph.sheet.blank(self.cache.trash)  # the runs before a capture must neither move nor write what counts
        try:
            said = graph.said = torch.empty_like(graph.run())

            def run() -> None:
                said.copy_(graph.run())

            graph.replay = self.settings.capture(run, [said])
        except RuntimeError as error:
            self._captures = False
            self.host.runs = f"eager: a pass cannot be captured: {first_line(error)}"

    def _addresses(self) -> tuple[int, ...]:
        return (self._weight.data_ptr(), self.cache.places, *(stack.data_ptr() for stack in self.cache.stacks))

    def _make_room(self, rows: Rows) -> None:
        last = max(span.base + span.size for span in rows.spans)
        if last >= self.cache.places:
            self.flush()
        self.cache.reserve(last)
        for span in rows.spans:
            self.cache.claim(span.slot, span.base, span.size)


def _picked(logits: Tensor, rows: SequenceOf[int]) -> list[Tensor]:
    """Copies of the answers of some rows, run by run: no index is sent to the device.

    Copies, since a graph writes the next pass's answers into the same memory.
    """
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return [logits[first:stop].clone() for first, stop in runs]
