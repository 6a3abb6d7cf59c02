"""Opening a model: out of a kept start where one holds, else through transformers, and then it is kept.

A kept start needs neither the modelling code of transformers nor a trace of the pass: it maps the weights and runs the
tape of the start before. Where something asks for the stock model itself (views that leave layers out, a rounded copy
for the first time, adapters, training), it is loaded then, over the same mapped weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from selfdraft.core.rows import pack
from selfdraft.core.sequence import open_sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.errors import LoadError, OptionError
from selfdraft.models.adapters import MaskAdapter, find_adapters, load_adapters
from selfdraft.models.checkpoint.embedded import checkpoint
from selfdraft.models.checkpoint.folder import check_tokenizer_files, check_vocabulary
from selfdraft.models.checkpoint.lora import unwrapped
from selfdraft.models.device import BEHIND, Room, bfloat16_units, free_bytes, in_memory_of, moved
from selfdraft.models.facts import Stock
from selfdraft.models.kv_cache import KVCacheDtype
from selfdraft.models.proof.kept import ProofStore, Record, hashes_of
from selfdraft.models.runner.packing import Packer
from selfdraft.models.start.copies import KeptCopies
from selfdraft.models.start.kept import KeptStart, StartFile, files_of, keepable
from selfdraft.models.start.passes import masked_of, passes_of
from selfdraft.models.start.tape_file import NotKept, agrees, named_places, packed
from selfdraft.models.start.weights import MappedWeights, Place
from selfdraft.models.target import HFTarget
from selfdraft.types import Clock, JsonObject, Quantization, SamplingParams

if TYPE_CHECKING:
    from selfdraft.models.reference import Model, Tokenizer

_log = logging.getLogger("selfdraft")
TRIED = 24
"""Positions that the trial of a kept start takes."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model is opened for: the options of `LLM` that target and tokenizer depend on."""

    dtype: torch.dtype | None
    tokenizer: Tokenizer | None
    adapters: SequenceOf[str | Path | MaskAdapter]
    lora: str | Path | None
    exactness: Literal["bitwise", "token"]
    runner: Literal["auto", "plain", "fast"]
    quantization: Quantization
    slots: int
    context: int | None
    trust_remote_code: bool
    clock: Clock
    kv_cache_dtype: KVCacheDtype = "auto"
    device: torch.device | None = None
    """Where a checkpoint is loaded to; None for a loaded model, which stays where it is."""

    @property
    def options(self) -> dict[str, str | int | None]:
        """Those on which a proof and a tape depend."""
        dtype = None if self.dtype is None else str(self.dtype)
        return {
            "dtype": dtype,
            "exactness": self.exactness,
            "runner": self.runner,
            "quantization": self.quantization,
            "context": self.context,
            "kv_cache_dtype": self.kv_cache_dtype,
        }


class Opened(NamedTuple):
    stock: Stock
    tokenizer: Tokenizer | None
    target: HFTarget
    folder: Path | None
    """Where the model came from; None for one that was loaded already."""


def open_model(model: str | Path | Model, wanted: Wanted, *, cache: bool) -> Opened:
    """A model's target, tokenizer and facts. `cache`: what was proved and kept is read and written.

    Errors: those of `load.load_model` and `load.open_target`."""
    if not isinstance(model, str | Path):
        if wanted.quantization in ("int8", "int4"):
            raise OptionError(
                f"quantization={wanted.quantization!r} is for checkpoints: give the model's folder or name"
            )
        stock = unwrapped(model, wanted.lora)
        return Opened(Stock.of(stock), wanted.tokenizer, _target(stock, wanted, None, None), None)
    path = checkpoint(model, note=_log.warning)
    folder = Path(path).expanduser()
    file, identity = _start_file(folder, wanted) if cache else (None, {})
    if file is not None and (opened := reopened(file, identity, wanted)) is not None:
        return _with_copies(opened, file, identity)
    proofs = ProofStore() if cache else None
    opened = _loaded(path, folder, wanted, proofs)
    if wanted.dtype is None and _emulated(opened.target):
        _log.info("%s is loaded in float32: bfloat16 is emulated here (%s)", model, opened.target.runs)
        del opened  # or the weights of both would be in memory
        opened = _loaded(path, folder, replace(wanted, dtype=torch.float32), proofs)
    if file is None:
        return opened
    keep(file, identity, opened)
    return _with_copies(opened, file, identity)


def _with_copies(opened: Opened, file: StartFile, identity: JsonObject) -> Opened:
    """The same, its rounded copies read from where an earlier start kept them, and kept for the next one."""
    target = opened.target
    if target.runs == "fast":
        target.kept_copies = KeptCopies(MappedWeights(file.folder), target.facts.dtype, identity, target.clock)
    return opened


def _emulated(target: HFTarget) -> bool:
    """Whether products are emulated: of a checkpoint in bfloat16 that the fast runner refused."""
    plain = target.facts.device.type == "cpu" and target.runner is None
    return plain and target.facts.dtype == torch.bfloat16 and not bfloat16_units()


def _start_file(folder: Path, wanted: Wanted) -> tuple[StartFile | None, JsonObject]:
    """The file of this start and its identity now; None where none is kept."""
    plain = wanted.runner == "plain" or wanted.lora is not None or wanted.trust_remote_code or _on_gpu(wanted)
    if plain or wanted.quantization in ("int8", "int4") or not keepable(folder):
        return None, {}
    file = StartFile(folder, wanted.options)
    try:
        return file, file.identity()
    except OSError:
        return None, {}


def _on_gpu(wanted: Wanted) -> bool:
    return wanted.device is not None and wanted.device.type != "cpu"


def _loaded(path: str | Path, folder: Path, wanted: Wanted, proofs: ProofStore | None) -> Opened:
    """The model through transformers."""
    from selfdraft.models import load

    quantization = wanted.quantization
    if _on_gpu(wanted):
        if quantization in ("int8", "int4"):
            raise OptionError(
                f"quantization={quantization!r} has kernels for CPUs alone: leave it out on {wanted.device}, or use "
                "device 'cpu'"
            )
        quantization = "none"  # blocks of a GGUF file, too
    stock = load.load_quantised(
        path,
        quantization,
        dtype=wanted.dtype,
        trust_remote_code=wanted.trust_remote_code,
        lora=wanted.lora,
        compiled=wanted.runner != "plain",
        cache=proofs is not None,
    )
    if wanted.device is not None:
        stock = moved(stock, wanted.device)
    tokenizer = wanted.tokenizer or load.load_tokenizer(
        path, trust_remote_code=wanted.trust_remote_code, cache=proofs is not None
    )
    return Opened(Stock.of(stock), tokenizer, _target(stock, wanted, folder, proofs), folder)


def _target(stock: Model, wanted: Wanted, folder: Path | None, proofs: ProofStore | None) -> HFTarget:
    from selfdraft.models import load

    with in_memory_of(next(stock.parameters()).device):
        target = load.open_target(
            stock,
            slots=wanted.slots,
            exactness=wanted.exactness,
            context=wanted.context,
            adapters=load_adapters(_adapters(wanted, folder), stock),
            runner=wanted.runner,
            kv_cache_dtype=wanted.kv_cache_dtype,
            proofs=proofs,
            clock=wanted.clock,
        )
    if target.facts.device.type == "cuda":
        _take_room(target, wanted.context)
    return target


def _take_room(target: HFTarget, context: int | None) -> None:
    """Take the memory of all slots of a GPU at once: so it does not run out in the middle of a text.

    Errors: OptionError with the numbers when `context` tokens of every slot do not fit.
    """
    device = target.facts.device
    room = Room(free_bytes(device), target.token_bytes(), target.slots, target.max_length)
    places = room.take(context)
    if places < target.max_length:
        what = "%s has room for %d requests of %d tokens each; a lower max_num_seqs leaves room for longer ones"
        _log.warning(what, device, target.slots, places)
    target.hold(places, BEHIND)


def _adapters(wanted: Wanted, folder: Path | None) -> list[str | Path | MaskAdapter]:
    """The adapters that were named, and those beside the model."""
    return [*wanted.adapters, *(find_adapters(folder) if folder is not None else [])]


def reopened(file: StartFile, identity: JsonObject, wanted: Wanted) -> Opened | None:
    """The model out of a kept start; None where there is none that holds."""
    try:
        kept = file.read(identity)
        if kept is None:
            return None
        adapters = load_adapters(_adapters(wanted, file.folder), kept.frame)
        if tuple(hashes_of(adapters)) != kept.adapters:
            return None
        mapped = MappedWeights(file.folder)
        late = partial(_load_late, file, identity, wanted.dtype, mapped, named_places(kept.tape))
        stock = Stock(kept.facts, late, kept.frame)
        target = HFTarget(
            stock,
            slots=wanted.slots,
            context=wanted.context,
            exactness=kept.proof.exactness,
            fast=True,
            kv_cache_dtype=wanted.kv_cache_dtype,
            clock=wanted.clock,
            **passes_of(kept, mapped, adapters),
        )
        tokenizer = wanted.tokenizer or _tokenizer(file.name, kept.tokenizer)
    except Exception as error:  # whatever is wrong with what was kept, the way through transformers is there
        _log.info("%s is passed over: %s", file.place, error)
        return None
    return Opened(stock, tokenizer, target, Path(file.name))


def _load_late(
    file: StartFile,
    identity: JsonObject,
    dtype: torch.dtype | None,
    mapped: MappedWeights,
    places: Mapping[str, Place],
) -> Model:
    """The stock model of a kept start, its weights those that the tape reads.

    Errors: LoadError when the checkpoint is not what it was when it was opened.
    """
    from selfdraft.models import load

    model = load.load_model(file.folder, dtype=dtype)
    if files_of(file.folder) != identity["files"]:
        raise LoadError(f"{file.folder}: its files have changed since it was opened; open it again")
    for name, place in places.items():
        model.get_parameter(name).data = mapped.tensor(place)
    return model


def _tokenizer(folder: str, kind: tuple[str, str] | None) -> Tokenizer:
    """The tokenizer by the class that is known to make it, else as at a first start."""
    if kind is None:
        from selfdraft.models import load

        return load.load_tokenizer(folder)
    check_tokenizer_files(Path(folder))
    made = _made(folder, kind)
    check_vocabulary(folder, made)
    return made


def _made(folder: str, kind: tuple[str, str]) -> Tokenizer:
    module, name = kind
    made: Tokenizer = getattr(import_module(module), name).from_pretrained(folder, local_files_only=True)
    return made


def keep(file: StartFile, identity: JsonObject, opened: Opened) -> bool:
    """Keep a start for the next one, tried before it is written. Returns whether it is kept."""
    target, stock = opened.target, opened.stock
    runner = target.runner
    if target.traced is None or runner is None or target.runs != "fast" or target.max_length < TRIED:
        return False
    try:
        mapped = MappedWeights(file.folder)
        tape = packed(target.traced, stock.model, mapped, runner.packer)
        proof = Record.of(target.exactness, target.shapes, target.runs)
        hashes = tuple(hashes_of(target.adapters))
        kind = None if opened.tokenizer is None else _kind(opened.tokenizer, file.name)
        masked = masked_of(target, stock.model, mapped, runner.packer)
        start = KeptStart(target.facts, stock.frame, proof, hashes, kind, tape, masked)
        again = HFTarget(
            stock, fast=True, kv_cache_dtype=target.cache.dtype, **passes_of(start, mapped, target.adapters)
        )
        if not agrees(*(_trial(one, masked is not None) for one in (target.aside(target.cache.dtype), again))):
            raise NotKept("its pass over mapped weights has other bits")
        if files_of(file.folder) != identity["files"]:
            raise NotKept("its files have changed meanwhile")
        file.write(identity, start)
        let_go(stock.model, named_places(tape), mapped, runner.packer)
    except (NotKept, LoadError, OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
        _log.info("nothing is kept for the next start of %s: %s", file.folder, error)
        return False
    return True


def let_go(model: Model, places: Mapping[str, Place], mapped: MappedWeights, packer: Packer) -> None:
    """Point the weights of a model that are packed to the files that they came from: they are in memory once then."""
    for name, place in places.items():
        parameter = model.get_parameter(name)
        new = mapped.tensor(place)
        packer.moved(parameter.data, new)
        parameter.data = new
        mapped.forget(new)


def _trial(target: HFTarget, masks: bool) -> list[Tensor]:
    """Logits of a prompt, and of a tree behind it, which has `masks` if it is to have some."""
    tokens = [(7 * i + 3) % target.vocab for i in range(TRIED // 2)]
    sampling = SamplingParams(max_tokens=1)
    sequence = open_sequence(tokens, sampling, seed=0, eos=frozenset(), context=target.max_length)
    sequence.slot = 0
    tree = Draft.branches([tokens[:3], [tokens[0], tokens[4]]], "trial")
    said = [target.forward(pack([(sequence, len(tokens), EMPTY)]))]
    sequence.num_cached = len(tokens) - 1
    said.append(target.forward(pack([(sequence, 1, tree)])))
    if masks:
        ids = range(target.vocab, target.vocab + target.num_mask_ids)
        said.append(
            target.forward(pack([(sequence, 1, tree.with_probes([*ids], [ROOT, *range(len(ids) - 1)], "trial"))]))
        )
        link = [mask.shift(tokens[0], torch.arange(8)) for mask in target.extras.mask_tokens.values()]
        said += [shift for shift in link if shift is not None]
    return said


def _kind(tokenizer: Tokenizer, folder: str) -> tuple[str, str] | None:
    """The class of a tokenizer, if it alone makes the same one; only those of transformers are asked."""
    kind = type(tokenizer)
    named = kind.__module__, kind.__qualname__
    if named[0].partition(".")[0] != "transformers":
        return None
    made = _made(folder, named)
    return named if _traits(made) == _traits(tokenizer) else None


def _traits(tokenizer: Tokenizer) -> list[object]:
    """Everything by which a tokenizer treats text."""
    own = {name: str(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
    return [type(tokenizer), tokenizer.backend_tokenizer.to_str(), own]
