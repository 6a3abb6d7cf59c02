"""What ranks have to have in common before their first step."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version

import torch

from selfdraft.core.rows import text_rows
from selfdraft.models.target import HFTarget

TRIED = 8
"""Tokens of the pass whose bits tell one model from another."""


def facts_of(
    target: HFTarget,
    tokenizer: str,
    sizes: Mapping[str, int],
    owner: str | None,
    drafter: str,
    options: Mapping[str, object],
) -> dict[str, object]:
    """By its name in an error, everything on which the text or the shape of a message depends, ready for JSON."""
    return {
        "versions": {name: version(name) for name in ("selfdraft", "torch", "transformers")},
        "dtype": str(target.facts.dtype),
        "exactness": target.exactness.level,
        "runner": "fast" if target.runner is not None else "plain",
        "shapes of passes": str(target.shapes),
        "the model's configuration": target.facts.config,
        "the model's logits": said_hash(target),
        "tokenizer": tokenizer,
        "drafter": drafter,
        **options,
        **sizes,
        "max_model_len": target.max_length,
        "kv_cache_dtype": target.cache.dtype,
        "prefix caching": owner is not None,
    }


def said_hash(target: HFTarget) -> str:
    """A hash of what the model says to a fixed text: its bits, or where these may vary the best tokens."""
    tokens = [(7 * i + 3) % target.vocab for i in range(min(TRIED, target.max_length))]
    logits = target.forward(text_rows(0, 0, tokens)).cpu()
    said = logits.contiguous() if target.exactness.level == "bitwise" else logits.argmax(-1)
    return blake2b(said.view(torch.uint8).numpy().tobytes(), digest_size=12).hexdigest()
