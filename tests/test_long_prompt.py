"""A prompt of 8,000 tokens on a small model: prefilled in chunks, with memory linear in its length."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfdraft.core.sequence import open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.models.attention import Plan
from selfdraft.models.exactness import Shapes
from selfdraft.models.reference import greedy
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams

LENGTH, CHUNK, MOST = 8000, 256, 12


def test_8k_tokens_are_prefilled_in_chunks() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH + 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    target = HFTarget(model, shapes=Shapes(4, 64))
    sizes: list[int] = []

    sequence = open_sequence(prompt, SamplingParams(max_tokens=MOST), seed=0, eos=frozenset(), context=LENGTH + 64)
    for _ in Engine(target, build("lookup", target), chunk=CHUNK).generate([sequence]):
        assert isinstance(target.last, Plan)
        sizes.append(sum(group.sees.numel() for group in target.last.groups))
    steps = -(-LENGTH // CHUNK)
    assert len(sizes) >= steps
    assert max(sizes) <= CHUNK * (LENGTH + 64), "a mask is never larger than chunk x length"
    assert target.cache.places <= 2 * LENGTH + 128, "the cache at most doubles what is needed"
    assert sequence.output == greedy(model, prompt, MOST, frozenset())
