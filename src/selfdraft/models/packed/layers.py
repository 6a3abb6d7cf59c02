"""Layers whose weights stay in blocks: a linear layer, an embedding, and what a model with them is asked for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from selfdraft.models.packed import layout
from selfdraft.models.packed.formats import Format
from selfdraft.models.runner.trace_ops import product, table_rows

if TYPE_CHECKING:
    from collections.abc import Iterator


class BlockWeights(nn.Module):
    """Weights [out, in] as packed bytes (`layout.py`) and their format."""

    packed: Tensor

    def __init__(self, packed: Tensor, kind: Format, out: int, wide: int) -> None:
        super().__init__()
        if packed.dtype != torch.uint8 or packed.shape != (kind.size(out, wide),):
            raise ValueError(f"{tuple(packed.shape)} {packed.dtype} are not weights of {out} x {wide} in {kind}")
        self.register_buffer("packed", packed)
        self.kind, self.rows_packed, self.columns = kind, out, wide

    @property
    def bytes(self) -> int:
        return self.packed.numel()

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in]; see `layout.dequantised`."""
        return layout.dequantised(self.packed, self.kind, self.rows_packed, self.columns, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of the outputs `ids` [...]: [..., in]."""
        return table_rows(ids, self.packed, self.kind.code, self.rows_packed, self.columns, dtype)

    def extra_repr(self) -> str:
        return f"{self.rows_packed} x {self.columns}, {self.kind}"


class BlockLinear(BlockWeights):
    """A linear layer of block weights; rows are rounded to 8 bits on their way in (`twin.py`)."""

    bias: nn.Parameter | None

    def __init__(self, packed: Tensor, kind: Format, out: int, wide: int, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed, kind, out, wide)
        self.in_features, self.out_features = wide, out
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.packed, self.bias, self.kind.code, self.out_features, self.in_features)


class BlockEmbedding(BlockWeights):
    """An embedding of block weights. `scale`: what the rows are multiplied with, as some families do.

    `samples`: numbers of the table before it was rounded, by which adapters know their model (`identity.base_hash`).
    """

    scale: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        kind: Format,
        count: int,
        wide: int,
        dtype: torch.dtype,
        *,
        scale: float | Tensor | None = None,
        samples: Tensor | None = None,
    ) -> None:
        super().__init__(packed, kind, count, wide)
        self.num_embeddings, self.embedding_dim = count, wide
        self.dtype, self.samples = dtype, samples
        self.register_buffer("scale", None if scale is None else torch.as_tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.rows(ids, self.dtype)
        return found if self.scale is None else found * self.scale.to(found.dtype)


def block_layers(model: nn.Module) -> Iterator[tuple[str, BlockWeights]]:
    """Every layer of block weights with its path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, BlockWeights))


def has_blocks(model: nn.Module) -> bool:
    """Whether any layer keeps its weights in blocks."""
    return next(block_layers(model), None) is not None


def formats_of(model: nn.Module) -> dict[str, int]:
    """How many layers there are of each format, by its words; a head that shares its table counts once."""
    seen = {layer.packed.data_ptr(): str(layer.kind) for _, layer in block_layers(model)}
    return dict(sorted(Counter(seen.values()).items()))


def is_plain(module: nn.Module) -> bool:
    """A linear layer, or GPT-2's Conv1D, with nothing but floating-point weights of torch's own kind."""
    weight = module._parameters.get("weight")
    linear = type(module) is nn.Linear or is_transposed(module)
    return linear and type(weight) is nn.Parameter and weight.is_floating_point()


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weights as [in, out], as GPT-2 does."""
    return type(module).__name__ == "Conv1D"


def scale_of(table: nn.Module) -> float | Tensor | None:
    """What an embedding multiplies its rows with: None for nothing.

    Errors: TypeError for a class of its own that is neither plain nor one that scales.
    """
    if type(table) is nn.Embedding:
        return None
    scale = getattr(table, "embed_scale", None)
    if not type(table).__name__.endswith("ScaledWordEmbedding") or not isinstance(scale, float | int | Tensor):
        raise TypeError(f"an embedding of class {type(table).__name__} does more than looking up rows")
    return scale


def linear_of(layer: nn.Module, packed: Tensor, kind: Format) -> BlockLinear:
    """The layer of block weights in the place of a plain one, with its bias."""
    shape = layer.weight.shape
    assert isinstance(shape, torch.Size)
    out, wide = reversed(shape) if is_transposed(layer) else shape
    bias = layer._parameters.get("bias")
    assert bias is None or isinstance(bias, nn.Parameter)
    return BlockLinear(packed, kind, out, wide, bias)
