"""A view of a stock model, traced and written down as a tape.

The stock forward runs once on tensors without contents; what it did, down to torch's basic operations, is translated
one by one. An operation that is not in the tables below makes the model one for the plain path. The numbers of rows
and of rows asked for are primes that no size of the model is a multiple of: so a dimension is recognised as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.runner import codes
from selfdraft.models.runner.codes import (
    COPY,
    CUBE,
    EMBED,
    GATED,
    GELU,
    GELU_TANH,
    LAYER_NORM,
    MAXIMUM,
    MINIMUM,
    PICK,
    POW,
    RSQRT,
    SQRT,
    SQUARE,
)
from selfdraft.models.runner.fuse import fused
from selfdraft.models.runner.graph import VIEWS, Graph, Node, record
from selfdraft.models.runner.tape import TYPES, Buffer, Instr, Kind, Operand, Slot, Tape, assemble
from selfdraft.models.runner.trace_ops import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BIG = 1 << 40
"""Stride of the dimension of rows in the layouts below: nothing else has it, and nothing merges with it."""
PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197)
UNARY = {
    f"{name}.default": int(getattr(codes, name.upper()))
    for name in ("neg", "exp", "rsqrt", "sqrt", "tanh", "sigmoid", "silu", "relu", "cos", "sin", "abs", "reciprocal")
}
BINARY = {
    "add": codes.ADD,
    "sub": codes.SUB,
    "mul": codes.MUL,
    "div": codes.DIV,
    "maximum": MAXIMUM,
    "minimum": MINIMUM,
}
REDUCING = {"sum.dim_IntList": codes.SUM, "mean.dim": codes.MEAN, "amax.default": codes.AMAX}
"""What torch calls the codes of codes.py."""
ROWS = -1
"""The format of a table that is not packed: row after row."""
SAME = frozenset({"clone", "contiguous", "lift_fresh_copy", "lift_fresh", "dropout"})


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A traced tensor: its layout [as a tensor without contents] in a buffer, the rows BIG elements apart."""

    buffer: Buffer
    layout: Tensor

    @property
    def offset(self) -> int:
        return int(self.layout.storage_offset())


Known: TypeAlias = Value | Tensor | SequenceOf[Value | Tensor | None] | None
"""What a node of the graph stands for: a traced tensor, a constant, or the tensors of an operation with several."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A tape, and what the pass told while it was traced."""

    tape: Tape
    calls: tuple[tuple[int, int | None], ...]
    """(layer, window) of every attention call."""
    heads: dict[int, tuple[int, int, int]]
    """Key heads, width of keys and width of values of each layer."""
    vocab: int
    notes: int
    """Width of the hidden states that are noted on the way; 0: none are."""


class Weights(Protocol):
    """Where weights lie that rows are multiplied by."""

    def floats(self, weight: Tensor) -> Tensor:
        """What products read of weights [out, in]: a `Packer` packs them."""


@torch.no_grad()
def trace(model: PreTrainedModel, packer: Weights, *, embedded: bool, resuming: bool) -> Traced:
    """Write down the forward pass of a view, its weights packed by `packer`. `embedded`: it starts from embeddings;
    `resuming`: the view takes hidden states from the call (`view.resuming`).

    Errors: RunnerUnavailable says which operation is in the way.
    """
    writer, calls = _recorded(model, packer, embedded=embedded, resuming=resuming)
    return writer.write(calls)


@torch.no_grad()
def instructions(model: PreTrainedModel, weights: Weights, *, embedded: bool) -> list[Instr]:
    """The pass of a view as instructions, in an order in which they could run; see `trace`.

    Errors: RunnerUnavailable.
    """
    return _recorded(model, weights, embedded=embedded, resuming=False)[0].instructions()[0]


def _recorded(
    model: PreTrainedModel, packer: Weights, *, embedded: bool, resuming: bool
) -> tuple[_Writer, tuple[tuple[int, int | None], ...]]:
    """What translates the pass of a view, and the attention calls in it."""
    rows, asked = _marks(model)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    dtype, device = weight.dtype, weight.device
    if dtype not in (torch.float32, torch.bfloat16):
        raise RunnerUnavailable(f"the fast runner computes in float32 and bfloat16, not in {dtype}")
    hidden = int(model.config.get_text_config().hidden_size)
    recorder = Recorder()

    def forward(tokens: Tensor, positions: Tensor, wanted: Tensor, embeds: Tensor, entering: Tensor) -> list[Tensor]:
        recorder.hidden = entering if resuming else None
        recorder.calls.clear()
        start = {"inputs_embeds": embeds} if embedded else {"input_ids": tokens}
        said = model(**start, position_ids=positions, use_cache=False, logits_to_keep=wanted, selfdraft=recorder).logits
        noted = None if recorder.hidden is entering else recorder.hidden
        return [said] if noted is None else [said, noted]

    ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
    wanted = torch.zeros(asked, dtype=torch.int64, device=device)
    states = torch.zeros(1, rows, hidden, dtype=dtype, device=device)
    try:
        graph = record(forward, (ids, ids, wanted, states, states))
    except Exception as error:  # whatever stops the trace, the plain path is there
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunnerUnavailable(f"its forward pass cannot be traced: {line}") from error
    return _Writer(graph, packer, rows, asked), tuple(recorder.calls)


def _marks(model: nn.Module) -> tuple[int, int]:
    """Two primes that divide no size in the model."""
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    free = [prime for prime in PRIMES if all(size % prime for size in sizes)]
    if len(free) < 2:
        raise RunnerUnavailable("the sizes of the model leave no mark for the number of rows")
    return free[0], free[1]


class _Writer:
    """Translates the nodes of one traced graph."""

    def __init__(self, graph: Graph, packer: Weights, rows: int, asked: int) -> None:
        self.graph, self.packer, self.rows, self.asked = graph, packer, rows, asked
        self.multiplied = _multiplied(graph)
        self.instrs: list[Instr] = []
        self.heads: dict[int, tuple[int, int, int]] = {}
        self.known: dict[Node, Known] = {}

    def write(self, calls: tuple[tuple[int, int | None], ...]) -> Traced:
        instrs, vocab, notes = self.instructions()
        return Traced(assemble(instrs), calls, self.heads, vocab, notes)

    def instructions(self) -> tuple[list[Instr], int, int]:
        """What the pass does, the size of the vocabulary, and the width of the states that it notes."""
        slots = (Slot.TOKENS, Slot.POSITIONS, Slot.ASKED, Slot.EMBEDS, Slot.ENTERING)
        for node, slot in zip(self.graph.inputs, slots, strict=True):
            self.known[node] = self._input(node.value, slot)
        for node in self.graph.nodes:
            self.known[node] = self._call(node)
        said = [self.known[node] for node in self.graph.outputs]
        outputs = [self._fresh_output(value, slot) for value, slot in zip(said, OUTPUTS, strict=False)]
        notes = outputs[1].buffer.width if len(outputs) > 1 else 0
        return fused(self.instrs), outputs[0].buffer.width, notes

    def _input(self, example: Tensor, slot: Slot) -> Value:
        width = math.prod(size for size in example.shape if size not in (self.rows, self.asked))
        return self._lay(Buffer(example.dtype, width, self.asked in example.shape, slot), example.shape)

    def _fresh_output(self, value: Known, slot: Slot) -> Value:
        """The value as the whole contents of a buffer of its own, in a slot."""
        if not isinstance(value, Value):
            raise RunnerUnavailable("what the model says does not depend on its input")
        whole = value.layout.numel() == value.buffer.width * (self.asked if value.buffer.answers else self.rows)
        if value.buffer.slot is not None or not whole or not self._plain(value):
            value = self._copied(value)
        value.buffer.slot = slot
        return value

    def _call(self, node: Node) -> Known:
        target = node.target
        if target is None:
            return self._part(node)
        args, kwargs = tree_map(lambda one: self.known[one] if isinstance(one, Node) else one, (node.args, node.kwargs))
        name = str(target)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Value) for leaf in leaves):
            constant: Known = target(*args, **kwargs)
            return constant
        if name == "selfdraft.attend.default":
            return self._attend(*args)
        if name == "selfdraft.gated.default":
            return self._gated(*args)
        if name == "selfdraft.blocks.default":
            return self._blocks(node.value, *args)
        if name == "selfdraft.block_rows.default":
            return self._block_rows(node.value, *args[:-1])
        space, _, short = name.partition(".")
        if space == "aten":
            family = short.partition(".")[0]
            example = node.value
            if family in VIEWS:
                return self._view(target, *args, **kwargs)
            if family in SAME:
                same: Known = args[0]
                return same
            if short in DIRECT:
                return DIRECT[short](self, example, *args, **kwargs)
            if short in UNARY:
                return self._each(UNARY[short], example, args[0])
            if family in BINARY and not (kwargs or len(args) > 2):
                return self._each(BINARY[family], example, *args)
            if short in REDUCING:
                return self._reduce(REDUCING[short], example, *args, **kwargs)
        raise RunnerUnavailable(f"the fast runner does not know the operation {name}")

    def _part(self, node: Node) -> Known:
        """One of several tensors that an operation returned."""
        several = None if node.source is None else self.known[node.source]
        assert isinstance(several, list | tuple)
        assert node.part is not None
        found: Known = several[node.part]
        return found

    # Layouts

    def _lay(self, buffer: Buffer, shape: SequenceOf[int]) -> Value:
        """The buffer as a tensor of this shape, the numbers of a row in order."""
        steps, step = [], 1
        for size in reversed(shape):
            if size in (self.rows, self.asked):
                steps.append(BIG)
            else:
                steps.append(step)
                step *= size
        if step != buffer.width or sum(size in (self.rows, self.asked) for size in shape) != 1:
            raise RunnerUnavailable(f"a tensor of shape {tuple(shape)} is not one row for each token")
        return Value(buffer, torch.empty_strided(tuple(shape), steps[::-1], dtype=buffer.dtype, device="meta"))

    def _new(self, example: Tensor) -> Value:
        if example.dtype not in TYPES:
            raise RunnerUnavailable(f"the fast runner does not compute in {example.dtype}")
        width = math.prod(size for size in example.shape if size not in (self.rows, self.asked))
        return self._lay(Buffer(example.dtype, width, self.asked in example.shape), example.shape)

    def _view(self, target: OpOverload, value: Value, *rest: object, **options: object) -> Value | list[Value]:
        try:
            seen = target(value.layout, *rest, **options)
        except RuntimeError:  # what torch can see as a view of its own copy is none of ours yet
            value = self._copied(value)
            try:
                seen = target(value.layout, *rest, **options)
            except RuntimeError as error:
                raise RunnerUnavailable(f"a view mixes rows: {error}") from error
        if isinstance(seen, Tensor):
            return Value(value.buffer, seen)
        return [Value(value.buffer, one) for one in seen]

    def _plain(self, value: Value) -> bool:
        """The numbers of a row lie in order, without gaps."""
        step = 1
        for size, stride in reversed([*zip(value.layout.shape, value.layout.stride(), strict=True)]):
            if size == 1 or stride == BIG:
                continue
            if stride != step:
                return False
            step *= size
        return True

    def _copied(self, value: Value) -> Value:
        copy = self._new(value.layout)
        self._write(COPY, copy, value)
        return copy

    def _contiguous(self, value: Value) -> Value:
        return value if self._plain(value) else self._copied(value)

    # Instructions

    def _write(self, code: int, out: Value, *inputs: Value | Tensor) -> None:
        """A glue instruction over all numbers of `out`; inputs are broadcast to it."""
        shape = out.layout.shape
        parts = [out, *(self._broadcast(one, shape) for one in inputs)]
        dims, steps = _merge(self._loops(parts), len(parts))
        operands = [_operand(part, step) for part, step in zip(parts, steps, strict=True)]
        self.instrs.append(Instr(Kind.GLUE, code, operands[0], tuple(operands[1:]), dims))

    def _broadcast(self, one: Value | Tensor, shape: torch.Size) -> Value | Tensor:
        if isinstance(one, Value):
            return Value(one.buffer, one.layout.expand(shape))
        if one.dtype not in TYPES:
            one = one.to(torch.float32)
        wide = one.expand(shape)
        if any(size in (self.rows, self.asked) and wide.stride(i) != 0 for i, size in enumerate(shape)):
            raise RunnerUnavailable("a constant depends on the number of rows")
        return wide

    def _loops(self, parts: SequenceOf[Value | Tensor]) -> list[tuple[int, tuple[int, ...]]]:
        """(size, step of each part) of every dimension that a row has."""
        layouts = [part.layout if isinstance(part, Value) else part for part in parts]
        return [
            (size, tuple(layout.stride(i) for layout in layouts))
            for i, size in enumerate(layouts[0].shape)
            if size not in (1, self.rows, self.asked)
        ]

    def _each(self, code: int, example: Tensor, *inputs: Value | Tensor | float) -> Value:
        out = self._new(example)
        self._write(code, out, *(self._number(one) for one in inputs))
        return out

    def _number(self, one: Value | Tensor | float) -> Value | Tensor:
        return one if isinstance(one, Value | Tensor) else torch.tensor(float(one), dtype=torch.float32)

    def _to_copy(self, example: Tensor, x: Value, **_: object) -> Value:
        return x if example.dtype == x.layout.dtype else self._each(COPY, example, x)

    def _gelu(self, example: Tensor, x: Value, approximate: str = "none") -> Value:
        return self._each(GELU if approximate == "none" else GELU_TANH, example, x)

    def _pow(self, example: Tensor, x: Value, power: float) -> Value:
        short = {2: SQUARE, 3: CUBE, 0.5: SQRT, -0.5: RSQRT}.get(power)
        return self._each(POW, example, x, power) if short is None else self._each(short, example, x)

    def _rsub(self, example: Tensor, x: Value, other: float) -> Value:
        return self._each(BINARY["sub"], example, other, x)

    def _zeros(self, example: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros((), dtype=example.dtype).expand(example.shape)

    def _clamp(self, example: Tensor, x: Value, low: float | None = None, high: float | None = None) -> Value:
        if low is not None:
            x = self._each(MAXIMUM, example, x, low)
        return x if high is None else self._each(MINIMUM, example, x, high)

    def _cat(self, example: Tensor, parts: SequenceOf[Value | Tensor], dim: int = 0) -> Value:
        out = self._new(example)
        start = 0
        for part in parts:
            size = (part.layout if isinstance(part, Value) else part).shape[dim]
            self._write(COPY, Value(out.buffer, out.layout.narrow(dim, start, size)), part)
            start += size
        return out

    def _stack(self, example: Tensor, parts: SequenceOf[Value | Tensor], dim: int = 0) -> Value:
        wide = [
            Value(part.buffer, part.layout.unsqueeze(dim)) if isinstance(part, Value) else part.unsqueeze(dim)
            for part in parts
        ]
        return self._cat(example, wide, dim)

    def _reduce(self, code: int, example: Tensor, x: Value, dims: SequenceOf[int], *_: object, **__: object) -> Value:
        if [dim % x.layout.ndim for dim in dims] != [x.layout.ndim - 1]:
            raise RunnerUnavailable(f"the fast runner sums over the last dimension only, not over {list(dims)}")
        out = self._new(example)
        kept = x.layout.shape[:-1]
        self._last_dim(code, out, Value(out.buffer, out.layout.view(kept)), x, ())
        return out

    def _last_dim(
        self, code: int, out: Value, flat: Value, x: Value, rest: tuple[Tensor | None, ...], epsilon: float = 0.0
    ) -> None:
        """An instruction that reads the innermost dimension whole; `flat` is the output without it."""
        outer = Value(x.buffer, x.layout.select(-1, 0))
        dims, steps = _merge(self._loops([flat, outer]), 2, most=3)
        wide, inner = x.layout.shape[-1], x.layout.stride(-1)
        same = out.layout.shape == x.layout.shape
        operands = (
            Operand(out.buffer, out.offset, (*steps[0][1:], out.layout.stride(-1) if same else 0)),
            Operand(x.buffer, x.offset, (*steps[1][1:], inner)),
        )
        others = tuple(None if one is None else Operand(one) for one in rest)
        self.instrs.append(
            Instr(Kind.GLUE, code, operands[0], (operands[1], *others), (*dims[1:], wide), numbers=(epsilon, 0.0))
        )

    def _layer_norm(
        self,
        example: Tensor,
        x: Value,
        shape: SequenceOf[int],
        weight: Tensor | None,
        bias: Tensor | None,
        epsilon: float,
    ) -> list[Value | None]:
        if len(shape) != 1:
            raise RunnerUnavailable("the fast runner norms over the last dimension only")
        out = self._new(example)
        rest = tuple(None if one is None else one.contiguous() for one in (weight, bias))
        self._last_dim(LAYER_NORM, out, Value(out.buffer, out.layout.select(-1, 0)), x, rest, epsilon)
        return [out, None, None]

    def _embedding(self, example: Tensor, weight: Tensor, ids: Value, *_: object) -> Value:
        if not isinstance(weight, Tensor) or not isinstance(ids, Value) or ids.buffer.width != 1:
            raise RunnerUnavailable("the fast runner embeds one id for each row")
        shared = weight.data_ptr() in self.multiplied
        table, code = (self.packer.floats(weight), 0) if shared else (weight.contiguous(), ROWS)
        return self._embed(example, ids, table, code, *weight.shape)

    def _embed(self, example: Tensor, ids: Value, table: Tensor, code: int, count: int, wide: int) -> Value:
        """Rows out of a table of `count` rows of `wide` numbers."""
        out = self._new(example)
        more = (table.data_ptr(), wide, count, code)
        self.instrs.append(Instr(Kind.GLUE, EMBED, _operand(out), (_operand(ids),), more=more, keep=(table,)))
        return out

    def _index(self, example: Tensor, x: Value, at: SequenceOf[Value | None]) -> Value:
        """The rows asked for."""
        if not isinstance(x, Value) or len(at) != 2 or at[0] is not None or not isinstance(at[1], Value):
            raise RunnerUnavailable("the fast runner picks rows only")
        x = self._contiguous(x)
        out = self._new(example)
        size = out.buffer.width * out.buffer.dtype.itemsize
        self.instrs.append(Instr(Kind.GLUE, PICK, _operand(out), (_operand(x), _operand(at[1])), more=(0, size)))
        return out

    def _mm(self, example: Tensor, x: Value, weight: Tensor) -> Value:
        return self._linear(example, x, weight, None)

    def _addmm(self, example: Tensor, bias: Tensor, x: Value, weight: Tensor, **scales: object) -> Value:
        if scales or not isinstance(bias, Tensor):
            raise RunnerUnavailable("the fast runner adds plain biases only")
        return self._linear(example, x, weight, bias.expand(weight.shape[1]).contiguous())

    def _linear(self, example: Tensor, x: Value, weight: Tensor, bias: Tensor | None) -> Value:
        """x [n, in] @ weight [in, out]."""
        if not isinstance(x, Value) or not isinstance(weight, Tensor) or weight.dtype != x.layout.dtype:
            raise RunnerUnavailable("the fast runner multiplies rows by weights of their own type only")
        x = self._contiguous(x)
        return self._product(example, x, self.packer.floats(weight.t()), bias, 0, *weight.t().shape)

    def _product(
        self, example: Tensor, x: Value, packed: Tensor, bias: Tensor | None, code: int, count: int, wide: int
    ) -> Value:
        """A linear layer of `count` outputs and `wide` inputs; `code` is 0 for floats, else that of a format."""
        out = self._new(example)
        more = (packed.data_ptr(), 0 if bias is None else bias.data_ptr(), count, wide)
        kept = (packed,) if bias is None else (packed, bias)
        self.instrs.append(Instr(Kind.LINEAR, code, _operand(out), (_operand(x),), more=more, keep=kept))
        return out

    def _blocks(
        self, example: Tensor, x: Value, packed: Tensor, bias: Tensor | None, code: int, count: int, wide: int
    ) -> Value:
        bias = None if bias is None else bias.to(x.layout.dtype).contiguous()
        return self._product(example, self._contiguous(x), packed, bias, code, count, wide)

    def _block_rows(self, example: Tensor, ids: Value, packed: Tensor, code: int, count: int, wide: int) -> Value:
        if ids.buffer.width != 1:
            raise RunnerUnavailable("the fast runner embeds one id for each row")
        return self._embed(example, ids, packed, code, count, wide)

    def _bmm(self, example: Tensor, one: Value | Tensor, other: Value | Tensor) -> Value:
        """An outer product, as rotary embeddings are made; no other."""
        inner = (one.layout if isinstance(one, Value) else one).shape[-1]
        if inner != 1:
            raise RunnerUnavailable("the fast runner multiplies rows by constants only")
        return self._each(BINARY["mul"], example, one, other)

    def _attend(
        self, q: Value, k: Value, v: Value, layer: int, window: int, scale: float, cap: float, sinks: Tensor | None
    ) -> Value:
        """Heads may lie anywhere, the numbers of one must be together."""
        heads, keyed, wide, deep = q.layout.shape[1], k.layout.shape[1], q.layout.shape[3], v.layout.shape[3]
        self.heads[layer] = (keyed, wide, deep)
        q, k, v = (part if part.layout.stride(-1) == 1 else self._copied(part) for part in (q, k, v))
        buffer = Buffer(q.layout.dtype, heads * deep)
        out = self._lay(buffer, (1, self.rows, heads, deep))
        kept = () if sinks is None else (sinks.float().contiguous(),)
        address = kept[0].data_ptr() if kept else 0
        inputs = tuple(Operand(part.buffer, part.offset, (0, part.layout.stride(1), 0, 1)) for part in (q, k, v))
        self.instrs.append(
            Instr(
                Kind.ATTEND,
                0,
                _operand(out),
                inputs,
                more=(layer, window, heads, keyed, wide, deep, address),
                numbers=(scale, cap),
                keep=kept,
            )
        )
        return out

    def _gated(self, y: Value, x: Value, down: Tensor, up: Tensor, number: int) -> Value:
        y, x = self._contiguous(y), self._contiguous(x)
        (wide, rank), deep = down.shape, up.shape[1]
        down, up = self.packer.floats(down.t()), self.packer.floats(up.t())
        out = self._new(y.layout)
        self.instrs.append(
            Instr(
                Kind.GLUE,
                GATED,
                _operand(out),
                (_operand(y), _operand(x)),
                (1, 1, 1, deep),
                more=(down.data_ptr(), up.data_ptr(), wide, rank, Slot.GATES + number),
                keep=(down, up),
            )
        )
        return out


OUTPUTS = (Slot.LOGITS, Slot.HIDDEN)
DIRECT: dict[str, Callable[..., Known]] = {
    "mm.default": _Writer._mm,
    "addmm.default": _Writer._addmm,
    "bmm.default": _Writer._bmm,
    "embedding.default": _Writer._embedding,
    "index.Tensor": _Writer._index,
    "cat.default": _Writer._cat,
    "stack.default": _Writer._stack,
    "native_layer_norm.default": _Writer._layer_norm,
    "_to_copy.default": _Writer._to_copy,
    "gelu.default": _Writer._gelu,
    "pow.Tensor_Scalar": _Writer._pow,
    "rsub.Scalar": _Writer._rsub,
    "clamp.default": _Writer._clamp,
    "zeros_like.default": _Writer._zeros,
    "new_zeros.default": _Writer._zeros,
}
"""Translations by name. Functions, not a writer's methods: it would hold itself, and with it the weights of a trace."""


def _multiplied(graph: Graph) -> set[int]:
    """Addresses of the weights that rows are multiplied by: a table among them is not kept twice."""
    names = {"aten.mm.default": 1, "aten.addmm.default": 2}
    found = [node.args[names[str(node.target)]] for node in graph.nodes if str(node.target) in names]
    return {one.data_ptr() for one in found if isinstance(one, Tensor)}


def _operand(part: Value | Tensor, steps: tuple[int, ...] = (0, 0, 0, 0)) -> Operand:
    if isinstance(part, Value):
        return Operand(part.buffer, part.offset, steps)
    return Operand(part, 0, steps)  # a tensor's address is that of its first number


def _merge(
    loops: list[tuple[int, tuple[int, ...]]], parts: int, most: int = 4
) -> tuple[tuple[int, int, int, int], list[tuple[int, int, int, int]]]:
    """Join neighbouring dimensions where every part steps evenly. Returns four sizes, and four steps for each part.

    Errors: RunnerUnavailable when more than `most` are left.
    """
    joined: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in loops:
        if joined and all(a == b * size for a, b in zip(joined[-1][1], steps, strict=True)):
            joined[-1] = (joined[-1][0] * size, steps)
        else:
            joined.append((size, steps))
    if len(joined) > most:
        raise RunnerUnavailable(f"an operation runs over {len(joined)} dimensions")
    blank = 4 - len(joined)
    sizes = (*(1 for _ in range(blank)), *(size for size, _ in joined))
    found = [(*(0 for _ in range(blank)), *(steps[i] for _, steps in joined)) for i in range(parts)]
    return sizes, found  # type: ignore[return-value]
