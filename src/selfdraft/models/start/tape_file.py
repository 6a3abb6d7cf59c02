"""A tape for another process: its addresses as weights in the checkpoint's files, or as small constants beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from selfdraft.files.arrays import Numbers
from selfdraft.models.runner.packing import Packer
from selfdraft.models.runner.tape import ALIGNED, ARG, INSTR, STEP, Place, Tape
from selfdraft.models.runner.trace import Traced
from selfdraft.models.start import weights
from selfdraft.models.start.weights import MappedWeights
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Coded = np.ndarray[tuple[int], np.dtype[np.void]]
OPERANDS = (("out", 1), ("inputs", 3))
"""The fields of an instruction that say where to read or write, and how many there are in each."""
CONSTANT, PACKED = -1, 1 << 32
"""Where the number of a weight could stand: CONSTANT for the constants, less for the parts of adapters, and PACKED and
more for a packed weight."""
MOST = 1 << 24
"""Bytes of constants that are kept: more would be a second copy of the weights."""


class NotKept(Exception):
    """Why a pass cannot be kept for the next start."""


@dataclass(frozen=True, slots=True)
class TapeFile:
    """What is written down of a traced pass: facts for JSON, and arrays."""

    facts: JsonObject
    arrays: Mapping[str, Numbers]


def packed(
    traced: Traced, model: PreTrainedModel, mapped: MappedWeights, packer: Packer, parts: SequenceOf[Tensor] = ()
) -> TapeFile:
    """The traced pass of a model that was loaded from the folder of these weights; `packer` packed them.

    `parts`: those of its adapters, which are no weights of the folder. Errors: NotKept.
    """
    tape = traced.tape
    held = _held(tape.kept)
    pointers = [*_pointers(tape, held)]
    sources = _Sources(model, mapped, packer, parts)
    rows = [(at, *sources.of(held[address])) for at, address in pointers]
    facts = {
        "arena": tape.arena,
        "scratch": tape.scratch,
        "stage": tape.stage,
        "packed": sources.packed,
        "calls": traced.calls,
        "heads": [[layer, *sizes] for layer, sizes in traced.heads.items()],
        "vocab": traced.vocab,
        "notes": traced.notes,
        "weights": [[name, asdict(place)] for name, place in sources.weights.items()],
    }
    instrs = tape.instrs.copy()
    flat = instrs.view(np.int64).reshape(-1)
    flat[[at for at, _ in pointers]] = 0
    arrays = {
        "steps": tape.steps,
        "instrs": instrs,
        "pointers": np.array(rows, np.int64).reshape(-1, 3),
        "constants": np.frombuffer(bytes(sources.constants), np.uint8),
    }
    return TapeFile(facts, arrays)


def unpacked(file: TapeFile, mapped: MappedWeights, packer: Packer, parts: SequenceOf[Tensor] = ()) -> Traced:
    """The traced pass over mapped weights, those that products read packed by `packer`; `parts` as in `packed`.

    Errors: those of `MappedWeights`; TypeError, ValueError, LookupError, MemoryError.
    """
    facts, arrays = file.facts, file.arrays
    steps, instrs = (cast("Coded", arrays[name].copy()) for name in ("steps", "instrs"))
    if steps.dtype != STEP or instrs.dtype != INSTR:
        raise ValueError("the tape is of another layout")
    constants = _aligned(arrays["constants"])
    places = [mapped.tensor(place) for place in named_places(file).values()]
    beside = [*reversed(parts), constants]  # counted from the end: CONSTANT is the last one
    wholes = [*places, *beside]
    tables = [packer.floats(_seen(wholes[number], *view)) for number, *view in facts["packed"]]
    for place in places:
        mapped.forget(place)
    held = [*places, *tables, *beside]
    bases = np.array([tensor.data_ptr() for tensor in held], np.int64)
    at, source, offset = arrays["pointers"].T
    source = np.where(source >= PACKED, source - PACKED + len(places), source)
    if (offset < 0).any() or (offset >= np.array([tensor.nbytes for tensor in held])[source]).any():
        raise ValueError("a pointer of the tape leaves its tensor")
    instrs.view(np.int64).reshape(-1)[at] = bases[source] + offset
    tape = Tape(steps, instrs, facts["arena"], facts["scratch"], facts["stage"], tuple(held))
    heads = {layer: (keyed, wide, deep) for layer, keyed, wide, deep in facts["heads"]}
    calls = tuple((layer, window) for layer, window in facts["calls"])
    return Traced(tape, calls, heads, facts["vocab"], facts["notes"])


def named_places(file: TapeFile) -> dict[str, weights.Place]:
    """The weights that the tape reads, by their names in the model. Errors: TypeError, ValueError."""
    return {name: weights.place_of(place) for name, place in file.facts["weights"]}


def _seen(whole: Tensor, skip: int, dtype: str, shape: SequenceOf[int], steps: SequenceOf[int]) -> Tensor:
    """A weight as a product of the tape sees it, from byte `skip` of a tensor on.

    Errors: RuntimeError or AttributeError where it leaves the tensor, or is of no type.
    """
    numbers = whole.reshape(-1).view(torch.uint8)[skip:]
    kind: torch.dtype = getattr(torch, dtype)
    return numbers[: len(numbers) // kind.itemsize * kind.itemsize].view(kind).as_strided(tuple(shape), tuple(steps))


def _held(kept: Iterable[Tensor]) -> dict[int, Tensor]:
    """The tensors of a tape by their addresses; of several at one address the longest."""
    found: dict[int, Tensor] = {}
    for tensor in kept:
        address = tensor.data_ptr()
        if tensor.numel() and (address not in found or _extent(tensor) > _extent(found[address])):
            found[address] = tensor
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first number to behind the last one."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.dtype.itemsize


def _pointers(tape: Tape, held: Mapping[int, Tensor]) -> Iterable[tuple[int, int]]:
    """(which word of all instructions, the address in it) of every address on a tape."""
    size = INSTR.itemsize // 8
    for name, count in OPERANDS:
        first = _word_of(INSTR, name)
        for number in range(count):
            operands = tape.instrs[name] if count == 1 else tape.instrs[name][:, number]
            base = first + number * (ARG.itemsize // 8) + _word_of(ARG, "base")
            for line in np.flatnonzero((operands["place"] == Place.FIXED) & (operands["base"] != 0)).tolist():
                address = int(operands["base"][line])
                if address not in held:
                    raise NotKept("an operand is no tensor of the tape")
                yield line * size + base, address
    first = _word_of(INSTR, "more")
    for line, more in enumerate(tape.instrs["more"].tolist()):
        yield from ((line * size + first + i, word) for i, word in enumerate(more) if word in held)


def _word_of(layout: np.dtype[np.void], field: str) -> int:
    """Which word of a layout a field begins with; all fields are of whole words."""
    assert layout.fields is not None
    return int(layout.fields[field][1]) // 8


class _Sources:
    """Where the tensors of a tape come from: weights that lie in the files as they are, and constants."""

    def __init__(
        self, model: PreTrainedModel, mapped: MappedWeights, packer: Packer, parts: SequenceOf[Tensor]
    ) -> None:
        self.weights: dict[str, weights.Place] = {}
        self.constants = bytearray()
        self.packed: list[tuple[int, int, str, list[int], list[int]]] = []
        """(number of a weight or CONSTANT, first byte, dtype, shape, steps) of what is packed."""
        self._packer, self._tables = packer, dict[int, int]()
        self._mapped, self._places = mapped, weights.places_in(mapped.folder)
        self._prefix = f"{model.base_model_prefix}."
        self._named = [(name, one) for name, one in model.named_parameters() if one.numel() and one.is_contiguous()]
        self._parts = parts
        self._offsets: dict[tuple[int, int], int] = {}

    def of(self, tensor: Tensor) -> tuple[int, int]:
        """(number of a weight, byte in it), (PACKED and the number of a packed one, 0), (CONSTANT less the number of a
        part of an adapter from 1 on, byte in it), or (CONSTANT, byte in the constants). Errors: NotKept."""
        source = self._packer.sources.get(tensor.data_ptr())
        return self._plain(tensor) if source is None else (PACKED + self._table(tensor.data_ptr(), source), 0)

    def _plain(self, tensor: Tensor) -> tuple[int, int]:
        """The same for a tensor that is not packed."""
        address, extent = tensor.data_ptr(), _extent(tensor)
        for name, weight in self._named:
            skip = address - weight.data_ptr()
            if 0 <= skip <= weight.nbytes - extent and self._lies(name, weight):
                return [*self.weights].index(name), skip
        for number, part in enumerate(self._parts, 1):
            if part.is_contiguous() and 0 <= address - part.data_ptr() <= part.nbytes - extent:
                return CONSTANT - number, address - part.data_ptr()
        if (address, extent) not in self._offsets:
            self._offsets[address, extent] = len(self.constants)
            flat = torch.as_strided(tensor.detach(), (extent // tensor.dtype.itemsize,), (1,))
            self.constants += flat.contiguous().view(torch.uint8).numpy().tobytes()
            self.constants += bytes(-len(self.constants) % ALIGNED)
        if len(self.constants) > MOST:
            raise NotKept("its pass needs weights in another form than the files hold them")
        return CONSTANT, self._offsets[address, extent]

    def _table(self, address: int, source: Tensor) -> int:
        """The number of a packed weight. Errors: NotKept."""
        if address not in self._tables:
            number, skip = self._plain(source)
            self._tables[address] = len(self.packed)
            dtype = str(source.dtype).removeprefix("torch.")
            self.packed.append((number, skip, dtype, [*source.shape], [*source.stride()]))
        return self._tables[address]

    def _lies(self, name: str, weight: Tensor) -> bool:
        """Whether the weight is in the files, under its name there or without the prefix of the bare model."""
        if name not in self.weights:
            names = (name, name.removeprefix(self._prefix), self._prefix + name)
            place = weights.find_place(weight, names, self._places, self._mapped)
            if place is None:
                return False
            self.weights[name] = place
        return True


def _aligned(numbers: Numbers) -> Tensor:
    """The bytes on a cache line of their own."""
    room = torch.empty(len(numbers) + ALIGNED, dtype=torch.uint8)
    skip = -room.data_ptr() % ALIGNED
    held = room[skip : skip + len(numbers)]
    held.copy_(torch.from_numpy(np.array(numbers)))
    return held


def agrees(one: SequenceOf[Tensor], other: SequenceOf[Tensor]) -> bool:
    """Whether two passes have the same bits."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
