"""A GGUF file as a model that keeps the file's own blocks: linear layers and embedding packed, everything else plain.

The names of the weights, and what has to be done to them, are read from the tables of transformers, which are asked
with numbered weights: rows that only change places stay blocks. What does not fit is dequantised, as
`gguf.load_model` does with everything.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from selfdraft.errors import LoadError
from selfdraft.models.checkpoint import gguf, gguf_head
from selfdraft.models.checkpoint.gguf_table import StoredTensor
from selfdraft.models.checkpoint.load_errors import blaming
from selfdraft.models.checkpoint.memory import check_memory
from selfdraft.models.checkpoint.weights import LoadingInfo, check_weights
from selfdraft.models.packed.arena import Arena
from selfdraft.models.packed.formats import FORMATS, GGUF_TYPES, LANES, Blocks, Bytes, Format, unpacked
from selfdraft.models.packed.layers import BlockEmbedding, is_plain, is_transposed, linear_of, scale_of
from selfdraft.models.packed.layout import groups_at_once, pack_groups
from selfdraft.types import JsonObject

_log = logging.getLogger("selfdraft")
Order = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
"""For each row of a layer, the row of the file's tensor."""


def load_blocks(file: Path, dtype: torch.dtype | None, *, cache: bool = False) -> PreTrainedModel:
    """The model of a GGUF file, in eval mode; layers whose blocks have a format keep them (`models/packed/`).

    `dtype` is that of everything else: None is what `gguf.load_model` takes. A file without such blocks, or of an
    architecture whose weights transformers does more with, is loaded by `gguf.load_model`. `cache`: the head of the
    file is taken from the user's cache folder, and kept there.
    Errors: LoadError says what is wrong with the file, before memory is taken for its weights.
    """
    file = gguf.joined(file)
    own, architecture, tensors = gguf.checked(file)
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES or not any(one.type in GGUF_TYPES for one in tensors):
        _log.info("%s: nothing in it runs as blocks", file)
        return gguf.load_model(file, dtype)
    with blaming(file):
        fields = gguf_head.fields_of(file, partial(_fields, file)) if cache else _fields(file)
        config: PreTrainedConfig = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        # weights take no memory yet; rotary tables and other numbers that are computed are there at once
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or own)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=fields)
        names = _names(model, processor)
    reading = _Reading(file, model, processor, names, tensors)
    check_memory(file, reading.needed)
    with blaming(file):
        info = reading.run()
    check_weights(file, model, info)
    return model.eval()


def _fields(file: Path) -> JsonObject:
    fields: JsonObject = load_gguf_checkpoint(str(file), return_tensors=False)["config"]
    return fields


class _Outline:
    """The first floors of a model, as the table of names asks for them; it asks every floor of a model, slowly."""

    def __init__(self, module: nn.Module, config: PreTrainedConfig, depth: int) -> None:
        self._module, self.config, self._depth = module, config, depth

    def state_dict(self) -> dict[str, Tensor]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _Outline]]:
        inner = self._module.named_children() if self._depth else ()
        return [(name, _Outline(child, self.config, self._depth - 1)) for name, child in inner]


def _names(model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """The model's name of each tensor that a file may hold."""
    names: dict[str, str] = get_gguf_hf_weights_map(_Outline(model, model.config, 2), processor)
    if {*model.state_dict()} - {*names.values()} - {*(model._tied_weights_keys or {})}:
        names = get_gguf_hf_weights_map(model, processor)
    return names


@dataclass(slots=True)
class _Plan:
    """A tensor whose blocks stay: the layer it belongs to, its format and the order of its rows (None: as they are)."""

    tensor: StoredTensor
    path: str
    layer: nn.Module
    kind: Format
    order: Order | None


@dataclass(slots=True)
class _Reading:
    """The tensors of a file on their way into a model."""

    file: Path
    model: PreTrainedModel
    processor: TensorProcessor
    names: dict[str, str]
    """The model's name of each of the file's tensors."""
    tensors: SequenceOf[StoredTensor]
    plans: list[_Plan] = field(default_factory=list)
    plain: list[StoredTensor] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    odd: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """Weights of other sizes than the model's: name, size in the file, size in the model."""
    orders: dict[tuple[str, tuple[int, ...]], Order | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.expected = {*self.model.state_dict()}
        for tensor in self.tensors:
            plan = self._plan(tensor) if tensor.name in self.names else None
            if plan is not None:
                self.plans.append(plan)
            else:
                self.plain.append(tensor)

    @property
    def needed(self) -> int:
        """Bytes of memory that the model will take, and reading its largest tensor."""
        kept = sum(plan.kind.size(*plan.tensor.shape) for plan in self.plans)
        size = int(self.model.dtype.itemsize)
        widest = max((one.numbers for one in self.plain), default=0) * 4
        return kept + sum(one.numbers * size for one in self.plain) + widest

    def _plan(self, tensor: StoredTensor) -> _Plan | None:
        stored = GGUF_TYPES.get(tensor.type)
        path, _, last = self.names[tensor.name].rpartition(".")
        if stored is None or last != "weight" or len(tensor.shape) != 2:
            return None
        layer = self.model.get_submodule(path)
        if layer is self.model.get_input_embeddings():
            try:
                scale_of(layer)
            except TypeError:
                return None
        elif not is_plain(layer):
            return None
        out, wide = tensor.shape
        order = self._order(tensor.name, out, wide)
        if isinstance(order, str) and order != ("transposed" if is_transposed(layer) else "same"):
            return None
        if not isinstance(order, str) and (order is None or is_transposed(layer)):
            return None
        sizes = tuple(layer.weight.shape)
        if (out, wide) != (sizes[::-1] if is_transposed(layer) else sizes):
            return None
        return _Plan(tensor, path, layer, FORMATS[stored.code], None if isinstance(order, str) else order)

    def _order(self, name: str, out: int, wide: int) -> Order | str | None:
        """What transformers does with a tensor: 'same', 'transposed', the order it puts the rows in, or None."""
        key = gguf.BLOCK.sub("", name), (out, wide)
        if key not in self.orders:
            self.orders[key] = self._tried(name, out, wide)
        return self.orders[key]

    def _tried(self, name: str, out: int, wide: int) -> Order | str | None:
        try:
            blank = np.broadcast_to(np.float32(0), (out, wide))
            said = self.processor.process(
                weights=blank, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
            if said.name != name:
                return None
            if said.weights is blank:
                return "same"
            numbers = np.arange(out * wide).reshape(out, wide)
            moved = self.processor.process(
                weights=numbers, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            ).weights
        except (ValueError, TypeError, KeyError, IndexError):  # the numbers are no weights for it
            return None
        if moved.shape == (wide, out) and np.array_equal(moved, numbers.T):
            return "transposed"
        if moved.shape != (out, wide):
            return None
        order = np.asarray(moved[:, 0] // wide, np.int64)
        return order if np.array_equal(moved, numbers[order]) else None

    def run(self) -> LoadingInfo:
        """Fill the model. Returns which of its weights the file does not have, as transformers does."""
        arena, loaded = Arena(), set[str]()
        with self.file.open("rb") as opened:
            for plan in self.plans:
                self._take(plan, _packed(self.file, opened, plan, arena))
                loaded.add(f"{plan.path}.weight")
        for name, tensor in self._dequantised():
            loaded |= self._set(name, tensor)
        loaded |= self._tie(loaded)
        self._note()
        return {"missing_keys": self.expected - loaded, "unexpected_keys": (), "mismatched_keys": self.odd}

    def _take(self, plan: _Plan, packed: Tensor) -> None:
        """Put the layer of block weights into the place of the plain one."""
        out, wide = plan.tensor.shape
        if plan.layer is self.model.get_input_embeddings():
            table = BlockEmbedding(packed, plan.kind, out, wide, self.model.dtype, scale=scale_of(plan.layer))
            self.model.set_input_embeddings(table)
        else:
            self.model.set_submodule(plan.path, linear_of(plan.layer, packed, plan.kind))

    def _dequantised(self) -> Iterator[tuple[str, Tensor]]:
        """The other tensors, one by one, as transformers makes them: the model's name and the numbers."""
        from gguf.quants import dequantize

        shared: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for tensor in self.plain:
            said = self.processor.process(
                weights=dequantize(tensor.raw(self.file), tensor.kind),
                name=tensor.name,
                tensor_key_mapping=self.names,
                parsed_parameters=shared,
            )
            if said.name in self.names:
                yield self.names[said.name], torch.from_numpy(np.copy(said.weights))
        yield from shared["tensors"].items()

    def _set(self, name: str, tensor: Tensor) -> set[str]:
        """Give the model a plain weight. Returns its name, or nothing where the model has no such weight."""
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        for own in (module._parameters, module._buffers):
            old = own.get(last)
            if old is None:
                continue
            if old.shape != tensor.shape:
                self.odd.append((name, tuple(tensor.shape), tuple(old.shape)))
                return {name}
            new = tensor.to(old.dtype)
            own[last] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            return {name}
        return set()

    def _tie(self, loaded: set[str]) -> set[str]:
        """Let an output layer without weights of its own use those of the embedding. Returns its names."""
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if not self.model.config.tie_word_embeddings or head is None or not isinstance(head, nn.Linear):
            return set()
        path = next(name for name, module in self.model.named_modules() if module is head)
        if f"{path}.weight" in loaded:
            return set()
        if isinstance(table, BlockEmbedding):
            self.model.set_submodule(path, linear_of(head, table.packed, table.kind))
        else:
            head.weight = table.weight
        return {f"{path}.weight"}

    def _note(self) -> None:
        """Say in one line which blocks do not run as they are."""
        kinds = Counter(one.type for one in self.plain if one.type not in {*gguf.FLOATS, *gguf.VALUES})
        if kinds:
            told = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
            _log.warning("%s: dequantised, since they cannot run as blocks: %s", self.file, told)


def _packed(file: Path, opened: BinaryIO, plan: _Plan, arena: Arena) -> Tensor:
    """The blocks of a tensor, packed into new memory of `arena`. Errors: LoadError for scales that are no numbers."""
    out, wide = plan.tensor.shape
    kind, packed = plan.kind, arena.take(plan.kind.size(out, wide))
    some = groups_at_once(wide)
    for group, raw in _raw(opened, plan, out, some):
        blocks = unpacked(raw, plan.tensor.type)
        _check_numbers(file, plan.tensor.name, blocks)
        pack_groups(packed, group, blocks, kind)
    return packed


def _raw(opened: BinaryIO, plan: _Plan, out: int, some: int) -> Iterator[tuple[int, Bytes]]:
    """The raw rows of `some` groups at a time, and the first group; read, not mapped: pages of the file stay out."""
    start, size = plan.tensor.start, plan.tensor.bytes // out
    rows = some * LANES
    whole = None
    if plan.order is not None:
        opened.seek(start)
        whole = np.frombuffer(opened.read(size * out), np.uint8).reshape(out, size)[plan.order]
    for first in range(0, out, rows):
        if whole is not None:
            yield first // LANES, whole[first : first + rows]
            continue
        opened.seek(start + first * size)
        count = min(rows, out - first)
        yield first // LANES, np.frombuffer(opened.read(size * count), np.uint8).reshape(count, size)


def _check_numbers(file: Path, name: str, blocks: Blocks) -> None:
    for part in (blocks.scales, blocks.mins):
        if part is not None and not np.isfinite(part).all():
            raise LoadError(f"{file}: tensor {name!r} has scales that are no finite numbers; download it again")
