"""What a row loses when it says something else than the untouched model."""

from __future__ import annotations

import torch
from torch import Tensor

EAGER = 3.0
"""The larger, the sooner the loss of a row turns from divergence to acceptance (`row_losses`)."""


def row_losses(said: Tensor, wanted: Tensor, hard_share: float, weight: Tensor | None = None) -> Tensor:
    """The loss of every row [n], from its logits [n, tokens].

    `wanted` are logits: their likeliest token is the goal of a greedy draft (`hard_share`: cross entropy), their
    distribution that of a sampled one. What counts there is the overlap of both distributions, the chance to be
    accepted; but far from the goal its slope is flat, so a row begins with the KL divergence and turns to 1 - overlap
    as its overlap grows (LK losses, arXiv 2602.23881). Or `wanted` are tokens [n]. `weight` [tokens]: the log of how
    many tokens each one stands for.
    """
    logs = _weighted(said, weight)
    hard = -logs.gather(-1, best(wanted)[:, None])[:, 0]
    if wanted.ndim == 1:
        return hard
    goals = _weighted(wanted, weight)
    chances = goals.exp()
    overlap = torch.minimum(logs.exp(), chances).sum(-1)
    early = (-EAGER * overlap.detach()).exp()
    soft = early * (chances * (goals - logs)).sum(-1) + (1 - early) * (1 - overlap)
    return (1 - hard_share) * soft + hard_share * hard


def _weighted(logits: Tensor, weight: Tensor | None) -> Tensor:
    """Logs of the chances of what each token stands for."""
    return (logits.float() if weight is None else logits.float() + weight).log_softmax(-1)


def best(wanted: Tensor) -> Tensor:
    """The tokens that rows should say [n], from logits or from tokens."""
    return wanted if wanted.ndim == 1 else wanted.argmax(-1)
