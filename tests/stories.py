"""stories260K, a tiny model that was really trained: its weights as a Hugging Face LLaMA, and its tokenizer.

The files lie outside the repository; CONTRIBUTING.md says where they come from.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.outside import outside

FOLDER = outside("models/stories260K")
BOS, EOS, FIRST_BYTE = 1, 2, 3
GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily"
)
"""What the weights must say after BOS, greedily in float32."""


@cache
def stories_model() -> LlamaForCausalLM:
    """float32, eval mode."""
    data = (FOLDER / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(data, config), strict=False)
    model.tie_weights()
    return model.eval()


def _weights(data: bytes, config: LlamaConfig) -> dict[str, Tensor]:
    """The file is one float32 stream; each kind of matrix stands in it for all layers at once."""
    stream = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy())
    dim, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    narrow = dim // config.num_attention_heads * config.num_key_value_heads
    kinds = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (narrow, dim)),
        ("self_attn.v_proj", (narrow, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    place = config.vocab_size * dim
    weights = {"model.embed_tokens.weight": stream[:place].view(-1, dim)}
    for name, shape in kinds:
        for layer in range(layers):
            size = int(np.prod(shape))
            weight = stream[place : place + size].view(shape)
            if name.endswith(("q_proj", "k_proj")):
                weight = _split_halves(weight, dim // config.num_attention_heads)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
            place += size
    weights["model.norm.weight"] = stream[place : place + dim]
    return weights


def _split_halves(weight: Tensor, head: int) -> Tensor:
    """Rotary pairs (0, 1), (2, 3), ... of each head become (0, h/2), (1, h/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.view(rows // head, head // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@cache
def pieces() -> tuple[tuple[bytes, float], ...]:
    """(text, score) of every token: after one int32, each is a float32 score, an int32 length and the bytes."""
    data = (FOLDER / "tok512.bin").read_bytes()
    place, found = 4, []
    while place < len(data):
        score, size = struct.unpack_from("<fi", data, place)
        found.append((data[place + 8 : place + 8 + size], score))
        place += 8 + size
    return tuple(found)


def encode(text: str) -> list[int]:
    """Token ids, BOS first: characters (or bytes), then the best-scored neighbours are joined until none can be."""
    known = {piece: (token, score) for token, (piece, score) in enumerate(pieces()) if token >= FIRST_BYTE + 256}
    tokens = [BOS]
    for character in f" {text}" if text else "":
        raw = character.encode()
        tokens += [known[raw][0]] if raw in known else [FIRST_BYTE + byte for byte in raw]
    while True:
        joined = [
            (known[both][1], -i, known[both][0])
            for i, (a, b) in enumerate(pairwise(tokens))
            if i and (both := pieces()[a][0] + pieces()[b][0]) in known
        ]
        if not joined:
            return tokens
        _, place, token = max(joined)
        tokens[-place : -place + 2] = [token]


def decode(tokens: Sequence[int]) -> str:
    """Text; the space that begins every text is left out."""
    raw = b""
    for token in tokens:
        if FIRST_BYTE <= token < FIRST_BYTE + 256:
            raw += bytes([token - FIRST_BYTE])
        elif token >= FIRST_BYTE + 256:
            raw += pieces()[token][0]
    return raw.decode("utf-8", "replace").removeprefix(" ")
