"""A forward pass computed in a wider dtype than its weights have, without a second copy of the weights.

Rounding of a short dtype hides a mistake: what real models say in bfloat16 differs by tens of percent from what they
say in float32. In float64 the same weights give the same logits to ten digits, whatever order they are summed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PART = 1 << 22
"""Numbers of a weight that are widened at a time."""
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double)
LOOKUPS = (F.embedding, torch.embedding)


class Wide(TorchFunctionMode):
    """Inside this context every sum is computed in `dtype`, whatever dtype the code of the model names.

    Weights are widened where they are used, a part at a time, and stay as they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: SequenceOf[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in CASTS:
            return args[0].to(self.dtype)
        if func in LOOKUPS:
            return func(*args, **kwargs).to(self.dtype)
        if getattr(func, "__name__", "") == "__get__":  # a property: of a weight it says what the weight is
            return func(*args, **kwargs)
        args, kwargs = tuple(map(self._named, args)), {name: self._named(value) for name, value in kwargs.items()}
        if not self._found((args, kwargs)):
            return func(*args, **kwargs)
        if func is F.linear and args[1].numel() > PART and args[1].dtype != self.dtype:
            return self._linear(*args, **kwargs)
        return func(*map(self._widened, args), **{name: self._widened(value) for name, value in kwargs.items()})

    def _named(self, value: object) -> object:
        """The same arguments, every floating dtype among them being the wide one."""
        if isinstance(value, torch.dtype):
            return self.dtype if value.is_floating_point else value
        return tuple(map(self._named, value)) if type(value) is tuple else value

    def _found(self, value: object) -> bool:
        """Whether a wide tensor is among the arguments; without one they are weights and stay short."""
        if isinstance(value, Tensor):
            return value.dtype == self.dtype
        if isinstance(value, dict):
            return any(map(self._found, value.values()))
        return isinstance(value, tuple | list) and any(map(self._found, value))

    def _widened(self, value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.is_floating_point() and value.dtype != self.dtype else value
        if type(value) is tuple:
            return tuple(map(self._widened, value))
        return [*map(self._widened, value)] if type(value) is list else value

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer of many outputs, some of them at a time."""
        some = max(1, PART // weight.shape[1])
        said = torch.cat([x @ part.to(self.dtype).mT for part in torch.split(weight, some)], -1)
        return said if bias is None else said + bias.to(self.dtype)
