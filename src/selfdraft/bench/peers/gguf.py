"""A GGUF file of a loaded LLaMA-like model, so that llama.cpp computes with the very same weights.

Source: the GGUF specification, version 3 (ggml, docs/gguf.md). Token ids go in and come out, so the file has no
vocabulary. It is kept in the user's cache folder under a hash of all that is in it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from selfdraft.errors import PeerError
from selfdraft.files.atomic import whole_file
from selfdraft.models.reference import Model

HEAD = b"GGUF" + struct.pack("<I", 3)
ALIGNMENT = 32
UINT32, FLOAT32, STRING = 4, 6, 8
"""Types of the values in the head."""
TENSORS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""Numbers of the tensor types."""
FILES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""Numbers of the types of most tensors in a file."""
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of an architecture by transformers' name."""
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of modules, outside and inside block N."""
Value = int | float | str


def cached(model: Model, folder: Path) -> Path:
    """The file of these very weights in a folder; written when it is not there yet.

    Errors: PeerError when llama.cpp cannot take this model, or the folder cannot be written.
    """
    values, tensors = _values(model), dict(_tensors(model))
    digest = hashlib.blake2b(repr(values).encode(), digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    path = folder / f"{digest.hexdigest()}.gguf"
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            _write(part, values, tensors)
    except OSError as error:
        raise PeerError(f"peer llama.cpp: the GGUF file {path} cannot be written: {error.strerror}") from error
    return path


def _values(model: Model) -> dict[str, Value]:
    """The head of the file: what llama.cpp has to know beside the weights."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise _cannot(f"the architecture {config.model_type!r}; it is {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise _cannot("quantised weights; it is plain ones")
    if config.hidden_act != "silu":
        raise _cannot(f"the activation {config.hidden_act!r}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or _window(config):
        raise _cannot("a sliding window")
    dtype, name = next(model.parameters()).dtype, FAMILIES[config.model_type]
    if dtype not in TENSORS:
        raise _cannot(f"{str(dtype).removeprefix('torch.')}; it is float32, float16, bfloat16")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    known = ("default", *(("linear", "llama3") if name == "llama" else ()))
    if rope["rope_type"] not in known:
        raise _cannot(f"rotary embeddings of type {rope['rope_type']!r}; it is {', '.join(known)}")
    return {
        "general.architecture": name,
        "general.name": "selfdraft bench",
        "general.file_type": FILES[dtype],
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": head,
        f"{name}.attention.value_length": head,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.dimension_count": head,
        f"{name}.rope.freq_base": float(rope["rope_theta"]),
        "tokenizer.ggml.model": "none",
    }


def _window(config: object) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _cannot(what: str) -> PeerError:
    return PeerError(f"peer llama.cpp: no GGUF file is written here for {what}")


def _tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Tensors by llama.cpp's names; what has one dimension is float32, as it wants them."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        place = WHOLE.get(module)
        if place is None:
            _, _, number, inside = module.split(".", 3)
            if inside not in IN_BLOCK:
                raise _cannot(f"the module {module!r}")
            place = IN_BLOCK[inside]
            if place in heads and FAMILIES[config.model_type] == "llama":
                tensor = _pairs(tensor, heads[place])
            place = f"blk.{number}.{place}"
        yield f"{place}.{kind}", (tensor.float() if tensor.ndim == 1 else tensor).cpu().contiguous()
    if config.rope_parameters["rope_type"] != "default":
        yield "rope_freqs.weight", _factors(model)


def _pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in llama.cpp's order: it rotates neighbours, transformers the two halves of a head."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _factors(model: Model) -> Tensor:
    """What llama.cpp divides the plain rotary frequencies by, so that they are those of the model."""
    used: Tensor = model.model.rotary_emb.inv_freq.detach().float().cpu()
    places = torch.arange(len(used), dtype=torch.float32) / len(used)
    base = torch.tensor(float(model.config.rope_parameters["rope_theta"]))
    return base**-places / used


def _write(path: Path, values: dict[str, Value], tensors: dict[str, Tensor]) -> None:
    """Head, table of the tensors, then each of them at a multiple of the alignment."""
    sizes = [tensor.nbytes for tensor in tensors.values()]
    offsets = accumulate((_aligned(size) for size in sizes), initial=0)
    head = HEAD + struct.pack("<QQ", len(tensors), len(values))
    head += b"".join(_string(key) + _value(value) for key, value in values.items())
    for (name, tensor), offset in zip(tensors.items(), offsets, strict=False):
        shape = tensor.shape[::-1]  # the fastest dimension first
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", TENSORS[tensor.dtype], offset)
    with path.open("wb") as file:
        file.write(head + bytes(_aligned(len(head)) - len(head)))
        for tensor, size in zip(tensors.values(), sizes, strict=True):
            file.write(_bytes(tensor))
            file.write(bytes(_aligned(size) - size))


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    kind, form = (UINT32, "<II") if isinstance(value, int) else (FLOAT32, "<If")
    return struct.pack(form, kind, value)
