"""Rounded copies kept for the next start: their blocks, and the tape that reads them.

They are kept once for a checkpoint and a number of bits, in the user's cache folder: the blocks in one file, which is
as large as the copy, and the tape beside it. They hold for the very same files of the checkpoint, machine and versions,
as a kept start does. Whoever keeps one removes those of checkpoints that are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfdraft.files.arrays import read_arrays, sealing, write_arrays
from selfdraft.files.atomic import cache_folder, whole_file
from selfdraft.models.identity import hash_of
from selfdraft.models.packed.arena import Arena
from selfdraft.models.packed.layers import block_layers
from selfdraft.models.rounded import Copy
from selfdraft.models.runner.packing import Packer
from selfdraft.models.runner.trace import Traced
from selfdraft.models.start.kept import files_of
from selfdraft.models.start.tape_file import NotKept, TapeFile, packed, unpacked
from selfdraft.models.start.weights import MappedWeights
from selfdraft.types import Clock, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("selfdraft")
FORMAT = 1


@dataclass(frozen=True, slots=True)
class KeptCopies:
    """The rounded copies of one checkpoint folder whose weights have the type `dtype`."""

    mapped: MappedWeights
    dtype: torch.dtype
    start: JsonObject
    """The identity of the start that opened the model (`StartFile.identity`)."""
    clock: Clock

    def read(self, bits: int, packer: Packer) -> tuple[Traced, Copy] | None:
        """The tape of a copy over its blocks, and what it took; None where none is kept that holds."""
        began = self.clock()
        try:
            found = read_arrays(self._place(bits, "tape"))
            if found is None or found[0].get("identity") != self._identity(bits):
                return None
            told, arrays = found
            blocks = _blocks(self._place(bits, "blocks"), told["sizes"], told["seal"])
            traced = unpacked(TapeFile(told["tape"], arrays), self.mapped, packer, blocks)
            return traced, replace(Copy(**told["copy"]), seconds=self.clock() - began)
        except Exception as error:  # whatever is wrong with what was kept, the copy can be made anew
            _log.info("the kept copy of %s with %d bits is passed over: %s", self.mapped.folder, bits, error)
            return None

    def keep(self, bits: int, view: PreTrainedModel, traced: Traced, copy: Copy, packer: Packer) -> bool:
        """Keep the copy `view` and its tape. Returns whether that was done."""
        blocks = [*{layer.packed.data_ptr(): layer.packed for _, layer in block_layers(view)}.values()]
        try:
            tape = packed(traced, view, self.mapped, packer, blocks)
            if files_of(self.mapped.folder) != self.start["files"]:
                raise NotKept("its files have changed meanwhile")
            seal = sealing()
            place = self._place(bits, "blocks")
            place.parent.mkdir(parents=True, exist_ok=True)
            _drop_lost(place.parent)
            with whole_file(place) as part, part.open("wb") as opened:
                for block in blocks:
                    seal.update(block.numpy().data)
                    opened.write(block.numpy().data)
            sizes = [block.nbytes for block in blocks]
            facts = {"sizes": sizes, "seal": seal.hexdigest(), "tape": tape.facts, "copy": asdict(copy)}
            write_arrays(self._place(bits, "tape"), {"identity": self._identity(bits), **facts}, tape.arrays)
        except (NotKept, OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
            _log.info("the copy of %s with %d bits is not kept: %s", self.mapped.folder, bits, error)
            return False
        return True

    def _identity(self, bits: int) -> JsonObject:
        """Everything that a kept copy depends on: what its start does, but for the options."""
        return {**self.start, "format": FORMAT, "options": {"dtype": str(self.dtype), "bits": bits}}

    def _place(self, bits: int, kind: str) -> Path:
        name = hash_of(str(self.mapped.folder).encode(), str(self.dtype).encode())
        return cache_folder("copies") / f"{name}.{bits}-bits.{kind}"


def _drop_lost(copies: Path) -> None:
    """Remove the copies of checkpoints that are no longer where they were. Errors: OSError."""
    for tape in copies.glob("*.tape"):
        found = read_arrays(tape)
        if found is not None and not Path(found[0]["identity"]["folder"]).exists():
            tape.with_suffix(".blocks").unlink(missing_ok=True)
            tape.unlink(missing_ok=True)


def _blocks(place: Path, sizes: SequenceOf[int], seal: str) -> list[Tensor]:
    """The blocks of a file, in memory with large pages. Errors: OSError; ValueError for another file.

    Most of the time goes into the first touch of new memory, which all threads do at once here.
    """
    arena, digest = Arena(), sealing()
    blocks, firsts = [arena.take(size) for size in sizes], accumulate(sizes, initial=0)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        reading = [pool.submit(_read, place, first, block) for first, block in zip(firsts, blocks, strict=False)]
        for block, done in zip(blocks, reading, strict=True):
            done.result()
            digest.update(block.numpy().data)
    if digest.hexdigest() != seal:
        raise ValueError(f"{place} has changed")
    return blocks


def _read(place: Path, first: int, block: Tensor) -> None:
    """Fill a block with the bytes of a file from byte `first` on. Errors: OSError; ValueError for a file too short."""
    with place.open("rb") as opened:
        opened.seek(first)
        if opened.readinto(block.numpy().data) != len(block):
            raise ValueError(f"{place} is too short")
