"""Attention of the fast runner: a row has the bits of plain decoding in any company, wherever blocks of places end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.models.kv_cache import KVCacheDtype
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.models import VOCAB, tiny_llama, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CODES: tuple[KVCacheDtype, ...] = ("auto", "int8")
Kind = Literal["llama", "window", "wide"]


@cache
def model_of(kind: Kind, dtype: torch.dtype) -> PreTrainedModel:
    """Two query heads of 8 numbers for each key head; a window that ends inside of blocks; odd widths."""
    if kind == "llama":
        return tiny_llama(dtype)
    torch.manual_seed(4)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=42,
        intermediate_size=60,
        num_hidden_layers=2,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=64 if kind == "window" else 38,
        sliding_window=71 if kind == "window" else None,
        max_position_embeddings=1024,
        initializer_range=0.3,
        pad_token_id=None,
    )
    with torch.inference_mode(False):
        return MistralForCausalLM(config).to(dtype).eval()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tokens(count: int) -> list[int]:
    return [(7 * i * i + 3 * i + 5) % VOCAB for i in range(count)]


def tree(size: int, seed: int) -> Draft:
    """A chain of up to three nodes, and the others anywhere behind."""
    draw = random.Random(seed)
    parents = [i - 1 if i < 3 else draw.randrange(-1, i) for i in range(size)]
    seen: set[tuple[int, int]] = set()
    chosen = []
    for parent in parents:
        token = next(t for t in (draw.randrange(VOCAB) for _ in range(10**6)) if (parent, t) not in seen)
        seen.add((parent, token))
        chosen.append(token)
    return Draft(tuple(chosen), tuple(parents), ("",) * size, size)


def filled(target: HFTarget, slot: int, count: int) -> Sequence:
    """A request with that many tokens in the cache, and one more that is not."""
    text = tokens(count + 1)
    sequence = Sequence(text[:count], count, SamplingParams(), slot=slot)
    target.forward(pack([(sequence, count, EMPTY)]))
    sequence.tokens, sequence.num_cached = text, count
    return sequence


def path_of(draft: Draft, node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = draft.parents[node]
    return path[::-1]


def one_by_one(target: HFTarget, base: int, known: list[int], draft: Draft) -> Tensor:
    """Logits of the root and of every node, each path decoded with one row a pass in another slot."""
    said: dict[tuple[int, ...], Tensor] = {}
    for node in range(-1, len(draft.tokens)):
        path = path_of(draft, node)
        text = [*known, *(draft.tokens[i] for i in path)]
        for size in range(len(path) + 1):
            key = tuple(path[:size])
            at = base + size
            sequence = Sequence(text[: at + 1], at + 1, SamplingParams(), slot=1, num_cached=at)
            row = target.forward(pack([(sequence, 1, EMPTY)]))[0]
            assert torch.equal(said.setdefault(key, row), row)
    return torch.stack([said[tuple(path_of(draft, node))] for node in range(-1, len(draft.tokens))])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(
    ("kind", "base", "size"),
    [
        ("llama", 1, 5),
        ("llama", 15, 3),
        ("llama", 254, 63),
        ("llama", 256, 12),
        ("window", 64, 7),
        ("window", 300, 17),
        ("window", 520, 30),
        ("wide", 47, 16),
        ("wide", 511, 33),
    ],
)
def test_rows_of_a_tree_are_those_of_plain_decoding(
    kind: Kind, base: int, size: int, dtype: torch.dtype, codes: KVCacheDtype
) -> None:
    """To the bit, with 1 to 3 threads; blocks of 16, pieces of 64 and stretches of 256 places end everywhere."""
    if kind == "llama" and base + 70 > 512:
        pytest.skip("beyond the model's positions")
    target = HFTarget(model_of(kind, dtype), slots=2, fast=True, kv_cache_dtype=codes)
    sequence = filled(target, 0, base)
    target.reuse(1, 0, base)
    draft = tree(size, seed=base)
    with threads(1):
        wanted = one_by_one(target, base, sequence.tokens, draft)
    for count in (1, 2, 3):
        with threads(count):
            said = target.forward(pack([(sequence, 1, draft)]))
            assert torch.equal(said, wanted), (count, (said - wanted).abs().amax(-1))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", ["llama", "window"])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_a_prompt_in_pieces_of_any_size(kind: Kind, dtype: torch.dtype, codes: KVCacheDtype) -> None:
    """The cache and the last logits are those of one row a pass, beside a request of another length."""
    target = HFTarget(model_of(kind, dtype), slots=3, fast=True, kv_cache_dtype=codes)
    text = tokens(300)

    def rows(slot: int, piece: int) -> Tensor:
        said = torch.empty(0)
        for start in range(0, len(text), piece):
            stop = min(start + piece, len(text))
            sequence = Sequence(text[:stop], stop, SamplingParams(), slot=slot, num_cached=start)
            beside = Sequence(text[:20], 20, SamplingParams(), slot=2)
            other = [(beside, 20, EMPTY)] * (start % 2)
            said = target.forward(pack([(sequence, stop - start, EMPTY), *other]))[0]
        return said

    wanted = rows(0, 1)
    for piece, count in ((300, 2), (64, 3), (17, 1), (255, 2)):
        with threads(count):
            assert torch.equal(rows(1, piece), wanted), piece
        for store in (target.cache.keys, target.cache.values):
            for strip in store.values():
                assert torch.equal(strip[0, :, :300], strip[1, :, :300])


@pytest.mark.parametrize("codes", CODES)
def test_what_lies_behind_a_row_does_not_reach_it(codes: KVCacheDtype) -> None:
    """Places behind a row may hold the NaN of a request that broke."""
    target = HFTarget(tiny_llama(torch.bfloat16), slots=1, fast=True, kv_cache_dtype=codes)
    sequence = filled(target, 0, 21)
    wanted = target.forward(pack([(sequence, 1, EMPTY)]))
    with torch.inference_mode():
        for store in (target.cache.keys, target.cache.values):
            for strip in store.values():
                if codes == "int8":
                    strip[:, :, 22:, -4:] = torch.full((1,), float("nan")).view(torch.int8)
                else:
                    strip[:, :, 22:] = float("nan")
    assert torch.equal(target.forward(pack([(sequence, 1, EMPTY)])), wanted)
