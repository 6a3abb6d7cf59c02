"""GGUF files of a tiny model, written by the tests: any tensor type, with or without a tokenizer, whole or split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import _type_traits, dequantize, quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, INNER, LAYERS, HEADS, KEYED = 256, 512, 2, 4, 2
CONTEXT = 512
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
VOCABULARY = [*bytes_to_unicode().values(), "ab", "<end>"]
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
TYPES = [*PLAIN, *_type_traits]
"""Every tensor type that the reader can dequantise."""
SCALES = {
    **dict.fromkeys(("Q2_K",), ((-4, 2), (-2, 2))),
    **dict.fromkeys(("Q3_K", "Q6_K"), ((-2, 2),)),
    **dict.fromkeys(("Q4_K", "Q5_K"), ((0, 2), (2, 2))),
}
"""Where the half-precision scales of a block are, when not in its first two bytes."""


def blocks(kind: GGMLQuantizationType, values: np.ndarray) -> np.ndarray:
    """`values` [n, m] in the blocks of a tensor type; where `gguf` cannot quantise, random blocks with small scales."""
    try:
        return np.asarray(quantize(values, kind))
    except NotImplementedError:
        size, wide = GGML_QUANT_SIZES[kind]
        draw = np.random.default_rng(int(kind))
        made = draw.integers(0, 256, (values.shape[0], values.shape[1] // size, wide), dtype=np.uint8)
        _small_scales(kind, made)
        raw = made.reshape(values.shape[0], -1)
        spread = float(dequantize(raw, kind).std())
        assert np.isfinite(spread), kind
        return raw


def _small_scales(kind: GGMLQuantizationType, made: np.ndarray) -> None:
    """Write a small number over every scale of random blocks [n, blocks, bytes]."""
    small = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    if kind.name == "IQ1_M":  # the scale's four digits are the highest ones of four numbers
        made[..., -7::2] &= 0x0F
        made[..., -1] |= 0x10
        return
    if kind.name == "NVFP4":  # four 8-bit scales
        made[..., :4] = 0x20
        return
    for start, length in SCALES.get(kind.name, ((0, 2),)):
        made[..., made.shape[-1] + start if start < 0 else start :][..., :length] = small


def write(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    parts: int = 0,
) -> dict[str, np.ndarray]:
    """Write the model's file, or its parts beside `path`; returns the weights it stands for, by tensor name."""
    weights = {name: np.asarray(value, np.float32) for name, value in _weights().items()}
    coded = {
        name: (blocks(kind, value), kind) if value.ndim == 2 else (value, GGMLQuantizationType.F32)
        for name, value in weights.items()
    }
    writer = GGUFWriter(path, architecture, split_max_tensors=-(-len(coded) // parts) if parts else 0)
    _describe(writer, tokenizer)
    for name, (raw, type_) in coded.items():
        writer.add_tensor(name, raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: np.asarray(dequantize(raw, type_)) for name, (raw, type_) in coded.items()}


def _weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return draw.normal(0, columns**-0.5, (rows, columns))

    keyed = HIDDEN // HEADS * KEYED
    found = {"token_embd.weight": matrix(len(VOCABULARY), HIDDEN), "output_norm.weight": np.ones(HIDDEN)}
    found["output.weight"] = matrix(len(VOCABULARY), HIDDEN) * 3
    for layer in range(LAYERS):
        sizes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (keyed, HIDDEN), "attn_v": (keyed, HIDDEN)}
        sizes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
        sizes["ffn_down"] = (HIDDEN, INNER)
        found |= {f"blk.{layer}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        found |= {f"blk.{layer}.{name}.weight": np.ones(HIDDEN) for name in ("attn_norm", "ffn_norm")}
    return found


def _describe(writer: GGUFWriter, tokenizer: bool) -> None:
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYED)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([TokenType.NORMAL] * (len(VOCABULARY) - 1) + [TokenType.CONTROL])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(len(VOCABULARY) - 1)
        writer.add_chat_template(TEMPLATE)
