"""Which canonical shapes this machine needs for a model: found by running two of its blocks, not assumed.

A linear layer can hide a difference behind the rounding of a short dtype, and attention has rules of its own. So the
linear layers are tried first, alone and quickly; then the first blocks decode a few dozen tokens one by one and once
more with drafts, and every logit must be equal to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.models import views
from selfdraft.models.attention import kernel
from selfdraft.models.exactness import MULTIPLES, NATURAL, Shapes, probe_rows
from selfdraft.models.kv_cache import KVCacheDtype
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams

BUCKET = 64
TOKENS = 100
"""Length of the trial; it crosses the edge of a bucket."""
PROMPT = 5
DRAWS = 256
MOST = 16
"""Random draws of the attention trial, and its most query rows."""


def probe_shapes(model: PreTrainedModel, kv_cache_dtype: KVCacheDtype = "auto") -> Shapes | None:
    """The cheapest shapes in which drafted rows are bit-equal to plain ones, or None. Errors: those of a first pass."""
    rows = probe_rows(model)
    if rows is None:
        return None
    width = probe_width(model)
    short = first_blocks(model)
    for multiple in MULTIPLES[MULTIPLES.index(rows) :]:
        shapes = Shapes(multiple, BUCKET, max(multiple, width))
        if _equal(short, shapes, kv_cache_dtype):
            return shapes
    return None


def probe_fast(model: PreTrainedModel, kv_cache_dtype: KVCacheDtype = "auto") -> bool:
    """Whether drafted rows are bit-equal to plain ones on the fast runner, in any shape. Errors: RunnerUnavailable."""
    return _equal(first_blocks(model), NATURAL, kv_cache_dtype, fast=True)


@torch.inference_mode()
def probe_width(model: PreTrainedModel) -> int:
    """Smallest multiple of query rows at which attention gave a row the same bits beside any others (16 at most).

    Tried with many random draws, since a difference shows in one value of some thousands only.
    """
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    keyed = int(getattr(config, "num_key_value_heads", None) or heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    softcap = getattr(config, "attn_logit_softcapping", None)
    draw = torch.Generator().manual_seed(7)
    shape = (DRAWS, keyed, BUCKET, dim)
    keys, values = (torch.randn(shape, generator=draw).to(weight.device, weight.dtype) for _ in range(2))
    queries = torch.randn(DRAWS, keyed, heads // keyed, MOST, dim, generator=draw).to(weight.device, weight.dtype)

    def said(count: int) -> Tensor:
        """Answers to the first `count` query rows, computed together."""
        asked = queries[:, :, :, :count].reshape(DRAWS, keyed, -1, dim)
        mask = asked.new_zeros(1, 1, asked.shape[2], BUCKET)
        mask[..., -BUCKET // 4 :] = float("-inf")
        answer = kernel(asked, keys, values, mask, dim**-0.5, softcap)
        return answer.view(DRAWS, keyed, heads // keyed, count, dim)

    for multiple in MULTIPLES:
        alone = said(multiple)
        if all(torch.equal(said(count)[:, :, :, :multiple], alone) for count in range(multiple, MOST + 1, multiple)):
            return multiple
    return MULTIPLES[-1]


def first_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """A view of the first two blocks of each kind of attention; the others let the residual stream pass."""
    config = model.config.get_text_config()
    count = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or [""] * count
    chosen = {i for i in range(count) if kinds[:i].count(kinds[i]) < 2}

    def change(index: int, block: nn.Module) -> nn.Module:
        return block if index in chosen else views.Through(block)

    return views.rearranged(views.clone(model), count, change)


@torch.inference_mode()
def _equal(model: PreTrainedModel, shapes: Shapes, kv_cache_dtype: KVCacheDtype, *, fast: bool = False) -> bool:
    """Whether every logit of a drafted decoding has the bits of the plain one."""
    draw = torch.Generator().manual_seed(11)
    target, other = (HFTarget(model, shapes=shapes, fast=fast, kv_cache_dtype=kv_cache_dtype) for _ in range(2))
    ids = torch.randint(0, target.vocab, (min(TOKENS, target.max_length - 1),), generator=draw).tolist()
    plain = torch.cat([*_decode(target, ids, drafts=False)])
    start = 0
    for rows in _decode(other, ids, drafts=True):
        if not torch.equal(rows, plain[start : start + len(rows)]):
            return False
        start += len(rows)
    return True


def _decode(target: HFTarget, ids: list[int], *, drafts: bool) -> Iterator[Tensor]:
    """Logits behind each of `ids` from the prompt's end on, with drafts that are partly right or one row a pass."""
    sequence = Sequence(ids[:PROMPT], PROMPT, SamplingParams(), slot=0)
    yield target.forward(pack([(sequence, PROMPT, EMPTY)]))
    target.keep(0, 0, range(PROMPT))
    sequence.num_cached = PROMPT
    while sequence.num_cached < len(ids):
        at = sequence.num_cached
        sequence.tokens = ids[: at + 1]
        size = min(at % 12, target.next_boundary(at) - 1 - at, len(ids) - at - 1) if drafts else 0
        right = ids[at + 1 : at + 1 + size]
        wrong = [(token + 1) % target.vocab for token in right[:3]]
        draft = Draft.branches([right, wrong] if at % 2 else [wrong, right], "")
        children, path = draft.children(), [-1]
        for token in right:
            path.append(children[path[-1], token])
        logits = target.forward(pack([(sequence, 1, draft)]))
        yield logits[[node + 1 for node in path]]
        target.keep(0, at, [node + 1 for node in path])
        sequence.num_cached += len(path)
