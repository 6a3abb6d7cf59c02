"""The stock model's own words: transformers' greedy decoding and plain full forwards, for comparison only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

Model: TypeAlias = PreTrainedModel
Tokenizer: TypeAlias = PreTrainedTokenizerBase


def quiet() -> None:
    """No progress bars and notices of the libraries, for programs whose output is the text."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@torch.inference_mode()
def greedy(model: Model, prompt: SequenceOf[int], most: int, ends: frozenset[int]) -> list[int]:
    """What `model.generate` says greedily to token ids: at most `most` new tokens, until an id of `ends`."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    text = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    new: list[int] = text[0, len(prompt) :].tolist()
    return new


@torch.inference_mode()
def logit_gap(model: Model, prefix: SequenceOf[int], one: int, other: int) -> float:
    """Logit of `one` minus logit of `other` after `prefix`, by one full forward."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([list(prefix)], device=device), use_cache=False).logits[0, -1].double()
    return float(logits[one] - logits[other])


def weights_hash(model: Model) -> str:
    """A name for these very weights: of every parameter its name, type, shape and first and last values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous()
        digest.update(ends.view(torch.uint8).numpy().tobytes() if ends.numel() else b"")
    return digest.hexdigest()
