"""The output layer while training: over the whole vocabulary, or over a short list of tokens that stands for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfdraft.models import views
from selfdraft.models.reference import Model

LIKELY = 16
"""Likeliest tokens of every row of the untouched model that are in the list."""
OTHERS = 2048
"""Tokens of the list that are drawn out of the others."""
WORTH = 4 * OTHERS
"""Of a vocabulary up to this size no list is made."""
LARGE = 1000.0
"""Logits so far from zero are changed by any bending."""


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Tokens `ids` [k], and the log of how many tokens each one stands for, `weight` [k]: 0 for likely ones."""

    ids: Tensor
    weight: Tensor


def shortlist(wanted: Tensor, chance: torch.Generator) -> Shortlist | None:
    """The likeliest tokens of the rows of logits [n, vocab], and some of the others; None for a small vocabulary.

    A token that was drawn counts for as many as were not: so sums over the list are those over the vocabulary, but for
    chance.
    """
    size = wanted.shape[-1]
    if size <= WORTH or not len(wanted):
        return None
    likely = torch.zeros(size, dtype=torch.bool, device=wanted.device)
    likely[wanted.topk(LIKELY).indices.flatten()] = True
    drawn = torch.zeros_like(likely)
    drawn[torch.randint(size, (OTHERS,), generator=chance).to(wanted.device)] = True
    drawn &= ~likely
    ids = (likely | drawn).nonzero().squeeze(1)
    stands = (size - likely.sum()) / drawn.sum()
    return Shortlist(ids, torch.where(likely[ids], 0.0, stands.log()))


class _Says(nn.Module):
    """An output layer that says the same of every row."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, states: Tensor) -> Tensor:
        return self.logits.expand(*states.shape[:-1], -1)


class Head(nn.Module):
    """The output layer of a model whose logits are its product and nothing else."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: its weights are not this module's to save

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model) -> Head | None:
        """That of a model; None where logits are scaled or bent after it, or its weights are no floats."""
        layer = model.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
            return None
        head = cls(layer)
        wanted = torch.linspace(-LARGE, LARGE, len(weight), device=weight.device, dtype=weight.dtype)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        told = head.replaced(views.clone(model, "eager"), _Says(wanted))(input_ids=ids, use_cache=False).logits
        return head if torch.equal(told[0, 0], wanted) else None

    def replaced(self, model: Model, by: nn.Module) -> Model:
        """A view of a model with another output layer; with `nn.Identity()` its logits are the states before it."""

        def along(module: nn.Module) -> nn.Module:
            if module is self._layer[0]:
                return by
            if not any(child is self._layer[0] for child in module.modules()):
                return module
            return views.with_children(module, lambda _, child: along(child))

        return cast("Model", along(model))

    def forward(self, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of states [n, hidden], of all tokens or of `ids` [k]."""
        layer = self._layer[0]
        weight, bias = cast("Tensor", layer.weight), cast("Tensor | None", getattr(layer, "bias", None))
        if ids is not None:
            weight, bias = weight[ids], None if bias is None else bias[ids]
        return F.linear(states, weight, bias)
