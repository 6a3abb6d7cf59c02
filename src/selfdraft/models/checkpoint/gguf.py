"""GGUF files: found, checked, joined where they are split, and read by transformers into a plain model.

Weights are dequantised when they are read: transformers and the package `gguf` know the tensor types. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf import read_gguf_metadata

from selfdraft.errors import LoadError
from selfdraft.files.atomic import cache_folder, whole_file
from selfdraft.models.checkpoint import gguf_head
from selfdraft.models.checkpoint.folder import check_pointer
from selfdraft.models.checkpoint.gguf_table import StoredTensor, read_table
from selfdraft.models.checkpoint.load_errors import blaming
from selfdraft.models.checkpoint.places import PART
from selfdraft.models.checkpoint.weights import check_weights
from selfdraft.types import JsonObject

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = re.compile(r"blk\.(?P<number>\d+)\.")
VALUES = {"I8", "I16", "I32", "I64", "F64"}
"""Types of tensors that hold plain numbers and need no dequantisation."""


def load_model(file: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a GGUF file, its weights dequantised to `dtype`, in eval mode.

    `dtype` None is the file's own float type, or bfloat16 when its weights are quantised.
    Errors: LoadError says what is wrong with the file.
    """
    file = joined(file)
    own = check(file)
    with blaming(file):
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype or own,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` names them
        )
    check_weights(file, model, info)
    model.config.__dict__.pop("quantization_config", None)  # nothing in the model is quantised any more
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(file: Path, *, cache: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template; `cache`: it is taken from the user's cache folder and kept.

    Errors: LoadError when the file has none.
    """
    file = joined(file)
    return gguf_head.tokenizer_of(file, partial(_tokenizer, file)) if cache else _tokenizer(file)


def _tokenizer(file: Path) -> PreTrainedTokenizerBase:
    if "tokenizer.ggml.tokens" not in _metadata(file):
        raise LoadError(f"{file}: no tokenizer in the file; pass tokenizer=... or take a file that has one")
    with blaming(file, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    return tokenizer


def check(file: Path) -> torch.dtype:
    """Check that a file is whole and can be read; returns the type its weights have, bfloat16 when quantised.

    Errors: LoadError names the architecture, the tensor type or the size that is wrong.
    """
    return checked(file).dtype


class Checked(NamedTuple):
    """A file that can be read: the type of its weights, its architecture, and its table of tensors."""

    dtype: torch.dtype
    architecture: str
    tensors: SequenceOf[StoredTensor]


def checked(file: Path) -> Checked:
    """What `check` says of a file, and what was read for it. Errors: those of `check`."""
    metadata = _metadata(file)
    architecture = str(metadata["general.architecture"])
    _check_architecture(file, architecture)
    types: set[str] = set()
    blocks: set[int] = set()
    size, end, last = file.stat().st_size, 0, ""
    tensors = _tensors(file)
    for tensor in tensors:
        types.add(tensor.type)
        if match := BLOCK.match(tensor.name):
            blocks.add(int(match["number"]))
        if end < (behind := tensor.start + tensor.bytes):
            end, last = behind, tensor.name
    if end > size:
        raise _truncated(file, f"tensor {last!r} ends at byte {end:,} and the file has {size:,}")
    _check_types(file, types)
    _check_blocks(file, blocks, metadata.get(f"{architecture}.block_count"))
    plain = next((FLOATS[name] for name in ("BF16", "F16") if name in types), torch.float32)
    return Checked(torch.bfloat16 if types - set(FLOATS) - VALUES else plain, architecture, tensors)


def _tensors(file: Path) -> SequenceOf[StoredTensor]:
    """The table of tensors. Errors: LoadError."""
    try:
        return read_table(file)
    except (struct.error, UnicodeDecodeError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise _truncated(file, f"its table of tensors cannot be read: {error}") from error
    except ValueError as error:
        if "GGMLQuantizationType" in str(error):
            raise LoadError(f"{file}: a tensor has an unknown type ({error}); `pip install --upgrade gguf`") from error
        raise _truncated(file, str(error).partition("\n")[0]) from error


def _metadata(file: Path) -> JsonObject:
    """Keys and values of the file's head; lists of texts are only counted. Errors: LoadError."""
    check_pointer(file)
    try:
        metadata: JsonObject = read_gguf_metadata(str(file))[0]
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise _truncated(file, f"its head cannot be read: {error}") from error
    except (ValueError, OSError) as error:
        raise LoadError(f"{file}: {str(error).removeprefix(str(file)).strip()}; give a GGUF file") from error
    return metadata


def _truncated(file: Path, why: str) -> LoadError:
    return LoadError(f"{file} is cut off or damaged ({why}); download it again")


def _check_architecture(file: Path, name: str) -> None:
    """Errors: LoadError when transformers cannot read this architecture from a GGUF file."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as LEGACY

    spelled = {name, name.replace("-", "_"), re.sub(r"(?<=\d)moe$", "_moe", name)}
    if not spelled & {*LEGACY, *GGUF_CONFIG_ARCHS}:
        known = ", ".join(sorted({*LEGACY, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}))
        raise LoadError(
            f"{file}: transformers cannot read the architecture {name!r} from a GGUF file; it reads {known}. "
            "Give the model's folder of safetensors instead"
        )


def _check_blocks(file: Path, blocks: set[int], count: object) -> None:
    """Errors: LoadError when the file has blocks behind the last one that it counts; transformers would drop them."""
    if isinstance(count, int) and blocks and max(blocks) >= count:
        raise LoadError(
            f"{file}: the file has more layers than the {count} of its block_count: the first is blk.{count}, the last "
            f"blk.{max(blocks)}; its head belongs to another model: convert the model again"
        )


def _check_types(file: Path, types: set[str]) -> None:
    """Errors: LoadError when a tensor type cannot be dequantised."""
    from gguf.quants import _type_traits

    known = {kind.name for kind in _type_traits} | set(FLOATS) | VALUES
    if unknown := sorted(types - known):
        raise LoadError(f"{file}: tensors of type {unknown[0]} cannot be dequantised; give a file of another type")


def joined(file: Path, folder: Path | None = None) -> Path:
    """The file itself, or one file made of all its parts, kept in `folder` (None: the user's cache folder).

    Errors: LoadError when a part is missing, damaged, or there is no room.
    """
    match = PART.fullmatch(file.name)
    if match is None:
        return file
    count = int(match["count"])
    parts = [file.with_name(f"{match['name']}-{part:05}-of-{match['count']}.gguf") for part in range(1, count + 1)]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise LoadError(f"{file.parent}: part {absent[0]} of a split file is missing; download all {count} parts")
    states = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    key = hashlib.blake2b(repr((str(file.parent.resolve()), states)).encode(), digest_size=8).hexdigest()
    place = (folder or cache_folder("gguf")) / f"{match['name']}-{key}.gguf"
    if not place.is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as part:
                _join(parts, part)
        except OSError as error:
            raise LoadError(f"the parts of {file} cannot be joined into {place}: {error.strerror or error}") from error
    return place


def _join(parts: SequenceOf[Path], wanted: Path) -> None:
    """Write one file with the keys of the first part and the tensors of all; no tensor is held in memory."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    try:
        readers = [GGUFReader(part) for part in parts]
    except (ValueError, IndexError, KeyError) as error:
        raise LoadError(f"a part of {parts[0]} is cut off or damaged ({error}); download the parts again") from error
    architecture = readers[0].fields["general.architecture"].contents()
    writer = GGUFWriter(wanted, architecture)
    for field in readers[0].fields.values():
        if field.name.startswith(("GGUF.", "split.")) or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
