"""Views whose linear layers hold rounded weights: the same model at a fraction of the bytes, for drafting passes.

Source: ML-SpecQD (arXiv 2503.13565) and SubSpec (arXiv 2509.18344), which draft with a 4-bit copy of the model. Weights
become those of `packed/quantise.py`; everything else stays as it is, and so does the memory of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from selfdraft.models import views
from selfdraft.models.checkpoint.memory import available
from selfdraft.models.packed.arena import Arena
from selfdraft.models.packed.layers import BlockEmbedding, BlockLinear, is_plain
from selfdraft.models.packed.quantise import HEAD_BITS, quantised, quantised_linear
from selfdraft.types import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = 0.75
"""Most bytes that a weight of a copy of 4 bits takes, with its part of scales, minima and an output layer of 8 bits."""
MOST_UNASKED = 5 << 28
"""Most weights of a copy that is made unasked: on two cores making it takes some 8 seconds then."""
PART = 4
"""Made unasked, it may take one part of so many of the memory that is free."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What a rounded copy took."""

    seconds: float
    bytes: int
    layers: int
    kept: int
    """Linear-like layers that stayed as they are: of so few bits already, or of a kind of their own."""


def why_no_copy(weights: int) -> str:
    """Why no copy of so many weights (`Facts.rounded_weights`) is made unasked; nothing where it may be."""
    if not weights:
        return "its weights, or some of them, are of few bits or a kind of their own"
    if weights > MOST_UNASKED:
        return f"making it takes long for {weights / 1e9:.1f} billion weights"
    size, free = round(BYTES * weights), available()
    if free is not None and PART * size > free:
        return f"it takes up to {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
    return ""


def rounded_weights(model: PreTrainedModel) -> int:
    """How many weights a copy would round; 0 where a layer would stay as it is, for then it may not be quicker."""
    found = dict[int, int]()
    for module in model.modules():
        if is_plain(module):
            weight = module._parameters["weight"]
            assert weight is not None
            found[id(module)] = weight.numel()
        elif not module._modules and _multiplies(module):
            return 0
    return sum(found.values())


def rounding(stock: PreTrainedModel, bits: int, clock: Clock) -> tuple[PreTrainedModel, Copy]:
    """A view of `stock` whose plain linear layers hold rounded weights; everything else is shared with it.

    Block weights of more bits are rounded again. Layers with weights of another kind (quantised checkpoints, experts in
    one tensor) stay as they are. Errors: LoadError when a weight is not finite.
    """
    began = clock()
    head, arena = stock.get_output_embeddings(), Arena()
    made: dict[nn.Module, BlockLinear] = {}
    kept: set[nn.Module] = set()

    def along(module: nn.Module) -> nn.Module:
        wanted = max(bits, HEAD_BITS) if module is head else bits
        if is_plain(module) or (isinstance(module, BlockLinear) and module.kind.bits > wanted):
            if module not in made:
                made[module] = _rounded(module, wanted, arena)
            return made[module]
        if not module._modules:
            if _multiplies(module):
                kept.add(module)
            return module
        return views.with_children(module, lambda _, child: along(child))

    changed = cast("PreTrainedModel", along(stock))
    size = sum(layer.bytes for layer in made.values())
    return changed, Copy(clock() - began, size, len(made), len(kept))


def _rounded(layer: nn.Module, bits: int, arena: Arena) -> BlockLinear:
    if not isinstance(layer, BlockLinear):
        return quantised_linear(layer, bits, arena)
    packed, kind = quantised(layer.dequantised(), bits, arena)
    return BlockLinear(packed, kind, layer.out_features, layer.in_features, layer.bias)


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer has a matrix of weights, and not one that is looked up."""
    if isinstance(module, BlockLinear):
        return True
    looked_up = isinstance(module, nn.Embedding | BlockEmbedding)
    return not looked_up and getattr(getattr(module, "weight", None), "ndim", 0) > 1
