"""Tiny random models and short ways to run them: what most tests need."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence as SequenceOf
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import RunnerUnavailable
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.exactness import Shapes, width_of
from selfdraft.models.runner import kernel_build
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter, Target
from selfdraft.train.student import linear_names
from selfdraft.types import SamplingParams
from tests.clocks import on_passes

VOCAB = 61


@cache
def unavailable() -> str:
    """Why there is no fast runner here, or ''. Kernels that g++ on Linux does not build are an error, no reason."""
    try:
        kernel_build.library()
    except RunnerUnavailable as error:
        if sys.platform == "linux" and shutil.which("g++"):
            raise
        return str(error)
    return ""


@cache
def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    """A random 4-block LLaMA with grouped heads, sharp enough that its greedy text repeats itself now and then."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.inference_mode(False):  # it is shared: whoever asks first must not make its weights inference tensors
        return LlamaForCausalLM(config).to(dtype).eval()


def random_adapters(model: PreTrainedModel, rank: int = 4) -> list[MaskAdapter]:
    """Untrained adapters for space and s3d on every linear layer, strong enough to show on any row they leak to."""
    draw = torch.Generator().manual_seed(5)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    hidden = model.get_input_embeddings().weight.shape[1]

    def noise(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=draw).to(dtype) / rows**0.5
        return drawn

    modules = dict(model.named_modules())
    sizes = {}
    for path in linear_names(model, range(int(model.config.get_text_config().num_hidden_layers))):
        with torch.no_grad():
            wide = width_of(modules[path])
            sizes[path] = (wide, modules[path](torch.zeros(1, wide, dtype=dtype)).shape[1])
    return [
        MaskAdapter(
            method,
            noise(masks, hidden),
            {path: (noise(wide, rank), noise(rank, out)) for path, (wide, out) in sizes.items()},
            whole_spans=method == "s3d",
            link=(noise(hidden, rank), noise(rank, hidden)),
        )
        for method, masks in (("space", 4), ("s3d", 3))
    ]


def tiny_target(dtype: torch.dtype = torch.float64, *, slots: int = 1, shapes: Shapes | None = None) -> HFTarget:
    """On a clock that only its passes move: what is drafted does not depend on the machine."""
    model = tiny_llama(dtype)
    return on_passes(HFTarget(model, slots=slots, shapes=shapes or Shapes(4, 64), adapters=random_adapters(model)))


def run(
    target: Target,
    drafter: Drafter | str,
    prompts: SequenceOf[SequenceOf[int]],
    sampling: SamplingParams,
    *,
    slots: int = 1,
    chunk: int = 256,
    rows: int = 1024,
    eos: frozenset[int] = frozenset(),
) -> list[Sequence]:
    """Decode all prompts to their end; prompt i uses seed + i."""
    guesser = build(drafter, target) if isinstance(drafter, str) else drafter
    engine = Engine(target, guesser, slots=slots, chunk=chunk, rows=rows)
    sequences = [
        open_sequence(prompt, sampling, seed=(sampling.seed or 0) + i, eos=eos, context=target.max_length)
        for i, prompt in enumerate(prompts)
    ]
    for _ in engine.generate(sequences):
        pass
    return sequences
