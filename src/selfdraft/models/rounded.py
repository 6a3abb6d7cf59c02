"""Views whose linear layers hold rounded weights: the same model at a fraction of the bytes, for drafting passes.

Source: ML-SpecQD (arXiv 2503.13565) and SubSpec (arXiv 2509.18344), which draft with a 4-bit copy of the model. Here
weights alone are rounded, activations and everything else stay as they are, and so does the memory of keys and values.

Layout, which `kernels/` reads: a row of weights is cut into lines of LINE, the last one filled up with zeros. 8
bits: a line is its codes in order, and one scale. 4 bits: a code is 8 + the weight in units of its scale, one scale
for every half line; bits 4q to 4q + 3 of 16-bit lane j are the code of weight 32 q + j of the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfdraft.models import views
from selfdraft.models.adapters import Gate
from selfdraft.models.runner.trace_ops import product
from selfdraft.types import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINE = 128
GROUPS = {8: LINE, 4: LINE // 2}
"""Weights that share a scale, by bits."""
HEAD_BITS = 8
"""The output layer keeps at least 8 bits: it says which token is largest."""
CHUNK = 1 << 18
"""Weights that are rounded at a time: they stay close to the processor."""
SHRINKS = (0.93, 0.86, 0.79)
"""4 bits: the scale is the largest weight's, or one of these parts of it, whichever errs least in squares."""


def encode(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [out, bytes] uint8 and scales [out, groups] float32 of weights [out, in]."""
    out, wide = weight.shape
    lines = -(-wide // LINE)
    codes = torch.empty(out, lines * LINE * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out, lines * LINE // GROUPS[bits], device=weight.device)
    some = max(1, CHUNK // (lines * LINE))
    for first in range(0, out, some):
        part = weight[first : first + some].detach().float()
        part = F.pad(part, (0, lines * LINE - wide)).view(len(part), -1, GROUPS[bits])
        whole, scale = _round8(part) if bits == 8 else _round4(part)
        scales[first : first + some] = scale
        packed = whole.to(torch.int8).view(torch.uint8) if bits == 8 else _pack4(whole)
        codes[first : first + some] = packed.flatten(1)
    return codes, scales


def _round8(part: Tensor) -> tuple[Tensor, Tensor]:
    scale = part.abs().amax(-1).clamp(min=1e-30) / 127
    return (part / scale[..., None]).round_(), scale


def _round4(part: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -8 to 7. The weight farthest from zero is put at -8, whatever its sign: no level is idle."""
    low, high = part.amin(-1), part.amax(-1)
    far = torch.where(high > -low, high, low)
    whole = torch.where(far == 0, 1.0, far / -8)
    scale, codes, error = whole, *_tried(part, whole)
    for shrink in SHRINKS:
        other, now = _tried(part, whole * shrink)
        better = now < error
        codes = torch.where(better[..., None], other, codes)
        error = torch.where(better, now, error)
        scale = torch.where(better, whole * shrink, scale)
    return codes, scale


def _tried(part: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The codes at a scale, and the sum of the squares of their errors."""
    codes = (part / scale[..., None]).round_().clamp_(-8, 7)
    return codes, (codes * scale[..., None]).sub_(part).square_().sum(-1)


def _pack4(codes: Tensor) -> Tensor:
    """Codes [n, groups, 64] -> bytes [n, lines, 64]."""
    quarters = (codes + 8).to(torch.uint8).view(len(codes), -1, 4, LINE // 4)
    low, high = (quarters[:, :, i] | quarters[:, :, i + 1] << 4 for i in (0, 2))
    return torch.stack([low, high], -1).flatten(2)


def decode(codes: Tensor, scales: Tensor, bits: int, wide: int) -> Tensor:
    """The rounded weights [out, wide], float32."""
    if bits == 8:
        whole = codes.view(torch.int8)
    else:
        low, high = codes.view(len(codes), -1, LINE // 4, 2).unbind(-1)
        quarters = [low & 15, low >> 4, high & 15, high >> 4]
        whole = torch.stack(quarters, 2).flatten(1).to(torch.int8) - 8
    grouped = whole.float().view(len(codes), -1, GROUPS[bits]) * scales[..., None]
    return grouped.flatten(1)[:, :wide]


class RoundedLinear(nn.Module):
    """A linear layer that keeps codes and scales of its weights only; each pass makes the weights out of them anew."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, bits: int, gate: Gate) -> None:
        super().__init__()
        weight = layer.weight.T if _transposed(layer) else layer.weight
        assert isinstance(weight, Tensor)
        self.out_features, self.in_features = weight.shape
        codes, scales = encode(weight, bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        self.bias = bias
        self.bits, self.gate = bits, gate

    @property
    def weight(self) -> Tensor:
        """The rounded weights [out, in], float32."""
        return decode(self.codes, self.scales, self.bits, self.in_features)

    @property
    def bytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()

    def forward(self, x: Tensor) -> Tensor:
        if self.gate.traced:
            return product(x, self.codes, self.scales, self.bias, self.in_features, self.bits)
        return F.linear(x, self.weight.to(x.dtype), self.bias)


@dataclass(frozen=True, slots=True)
class Copy:
    """What a rounded copy took."""

    seconds: float
    bytes: int
    layers: int
    kept: int
    """Linear-like layers that stayed as they are: quantised already, or of a kind of their own."""


def rounding(stock: PreTrainedModel, bits: int, gate: Gate, clock: Clock) -> tuple[PreTrainedModel, Copy]:
    """A view of `stock` whose plain linear layers hold rounded weights; everything else is shared with it.

    Layers with weights of another kind (quantised checkpoints, experts in one tensor) stay as they are.
    """
    began = clock()
    head = stock.get_output_embeddings()
    made: dict[nn.Module, RoundedLinear] = {}
    kept: set[nn.Module] = set()

    def along(module: nn.Module) -> nn.Module:
        if is_plain(module):
            if module not in made:
                made[module] = RoundedLinear(module, max(bits, HEAD_BITS) if module is head else bits, gate)
            return made[module]
        if not module._modules:
            if getattr(getattr(module, "weight", None), "ndim", 0) > 1 and not isinstance(module, nn.Embedding):
                kept.add(module)
            return module
        return views.with_children(module, lambda _, child: along(child))

    changed = cast("PreTrainedModel", along(stock))
    size = sum(layer.bytes for layer in made.values())
    return changed, Copy(clock() - began, size, len(made), len(kept))


def is_plain(module: nn.Module) -> bool:
    """A linear layer, or GPT-2's Conv1D, with nothing but floating-point weights of torch's own kind."""
    weight = module._parameters.get("weight")
    linear = type(module) is nn.Linear or _transposed(module)
    return linear and type(weight) is nn.Parameter and weight.is_floating_point()


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
