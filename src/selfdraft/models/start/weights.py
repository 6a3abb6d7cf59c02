"""The weights of a checkpoint as they lie in its safetensors files, mapped into memory and never copied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfdraft.models.checkpoint.folder import weight_files
from selfdraft.models.runner import kernel_build
from selfdraft.types import JsonObject

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
"""The types that the fast runner computes in, by their names in a file."""
LENGTH = 8
"""Bytes in front of a file's table that say how long the table is."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of a weight lie: a file of the folder, and the bytes from `start` on."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: str
    """As the file names it."""

    @property
    def bytes(self) -> int:
        size = TYPES[self.dtype].itemsize
        for side in self.shape:
            size *= side
        return size


def place_of(given: JsonObject) -> Place:
    """The place out of what `dataclasses.asdict` made of it. Errors: TypeError, LookupError for anything else."""
    return Place(**{**given, "shape": tuple(given["shape"])})


class MappedWeights:
    """The files of one folder, each mapped when one of its weights is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Tensor] = {}
        """The bytes of each file that is mapped."""

    def tensor(self, place: Place) -> Tensor:
        """The weight. Errors: OSError, RuntimeError or ValueError when the file does not hold it."""
        whole = self._file(place.file)
        dtype = TYPES[place.dtype]
        if not 0 <= place.start <= len(whole) - place.bytes or place.start % dtype.itemsize:
            raise ValueError(f"{place.file} does not hold {place.bytes} bytes of {dtype} from {place.start} on")
        return whole[place.start : place.start + place.bytes].view(dtype).view(place.shape)

    def forget(self, tensor: Tensor) -> None:
        """Give back the memory that reading a weight has taken; it is read from the file again when it is asked for."""
        kernel_build.library().selfdraft_forget(tensor.data_ptr(), tensor.nbytes)

    def _file(self, name: str) -> Tensor:
        if name not in self.files:
            path = self.folder / name
            size = path.stat().st_size
            self.files[name] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self.files[name]


def places_in(folder: Path) -> dict[str, Place]:
    """The places of all weights of a folder that are of a type in TYPES. Errors: OSError, ValueError, LoadError."""
    found: dict[str, Place] = {}
    for path in weight_files(folder):
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH), "little")
            table: Mapping[str, Mapping[str, object]] = json.loads(opened.read(length))
        for name, about in table.items():
            if name != "__metadata__" and about["dtype"] in TYPES:
                offsets, shape = about["data_offsets"], about["shape"]
                assert isinstance(offsets, list)
                assert isinstance(shape, list)
                found[name] = Place(path.name, LENGTH + length + offsets[0], tuple(shape), str(about["dtype"]))
    return found


def find_place(
    tensor: Tensor, names: SequenceOf[str], places: Mapping[str, Place], mapped: MappedWeights
) -> Place | None:
    """The place of a weight of these names whose numbers in the file are those of the tensor, bit for bit."""
    for name in names:
        place = places.get(name)
        if place is None or TYPES[place.dtype] != tensor.dtype or place.shape != tuple(tensor.shape):
            continue
        if tensor.is_contiguous() and np.array_equal(_bits(mapped.tensor(place)), _bits(tensor)):
            return place
    return None


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of a tensor; numpy compares them many times as fast as torch, and a NaN with itself as equal."""
    return tensor.detach().flatten().view(torch.uint8).numpy()
