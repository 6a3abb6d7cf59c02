"""A device that is not there: the real engine over a model without contents, and every question to the device counted.

The tensors of the model lie on torch's `meta` device: they have shapes and no numbers. Operations on them are noted.
Where the host would have to wait for an answer (`item`, `tolist`, `bool`, `cpu`, `nonzero`, an index that is a number
on the device), it gets a harmless one, and the wait is noted with the line of ours that asked. So are uploads, and
operations that mix tensors of the device with tensors of the host, which a GPU refuses. What is computed means nothing;
shapes, and what is asked, are those of a real device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import selfdraft

HOME = str(Path(selfdraft.__file__).parent) + "/"
FAR = "meta"
QUESTIONS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "is_nonzero", "numpy", "cpu"}
NUMBER = 0.25
"""The answer to a question for a number that is none of the whole ones."""
aten = torch.ops.aten


class Noted:
    """What a device was asked: host waits, uploads, mixed operations and all operations, each by line of ours."""

    def __init__(self) -> None:
        self.waits, self.uploads, self.mixes, self.operations = (Counter[str]() for _ in range(4))

    def counts(self) -> tuple[int, int, int, int]:
        """Totals of waits, uploads, mixed operations and operations."""
        return self.waits.total(), self.uploads.total(), self.mixes.total(), self.operations.total()


def line() -> str:
    """The innermost line of ours on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(HOME):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(HOME)}:{frame.f_lineno}" if frame else "?"


def is_far(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == FAR


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below torch's functions: copies between host and device, mixed operations, answers of unknown size."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, noted = kwargs or {}, self.noted
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is aten._to_copy.default and not is_far(args[0]) and str(kwargs.get("device")).startswith(FAR):
            noted.uploads[line()] += 1
            return func(*args, **kwargs)
        if not any(map(is_far, tensors)):
            return func(*args, **kwargs)
        if func in WAITING:
            noted.waits[line()] += 1
            return WAITING[func](*args)
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            noted.waits[line()] += 1
            return answer(args[0].to(kwargs.get("dtype") or args[0].dtype))
        noted.operations[line()] += 1
        near = [tensor for tensor in tensors if not is_far(tensor)]
        if near and func in SENDING:
            noted.uploads[line()] += 1
        elif any(tensor.dim() for tensor in near):
            noted.mixes[f"{line()} {func}"] += 1
        if near:
            args, kwargs = tree_map(lambda x: x.to(FAR) if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*args, **kwargs)


class Questions(TorchFunctionMode):
    """What torch answers, or refuses to answer, before an operation is dispatched."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if args and is_far(args[0]) and name in QUESTIONS:
            self.noted.waits[line()] += 1
            return told(args[0], name)
        if args and is_far(args[0]) and name in ("__getitem__", "__setitem__"):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.noted.uploads[line()] += sum(isinstance(part, list) for part in parts)
            if name == "__getitem__" and any(is_far(part) and not part.dim() for part in parts):
                self.noted.waits[line()] += 1
                return func(args[0], tuple(0 if is_far(part) and not part.dim() else part for part in parts))
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")).startswith(FAR):
            self.noted.uploads[line()] += 1
        return func(*args, **kwargs)


def answer(x: Tensor) -> Tensor:
    """A harmless tensor of the host for one of the device: small different ids, or chances."""
    if x.dtype.is_floating_point:
        return torch.full(x.shape, NUMBER, dtype=x.dtype)
    if x.dtype == torch.bool:
        return torch.ones(x.shape, dtype=x.dtype)
    return (torch.arange(x.numel()) % 7).reshape(x.shape).to(x.dtype)


def told(x: Tensor, name: str) -> object:
    """A harmless answer to a question of QUESTIONS."""
    if name in ("__bool__", "is_nonzero"):
        return x.dtype != torch.bool  # of a condition: it does not hold
    if name in ("__int__", "__index__"):
        return 1
    if name == "__float__":
        return NUMBER
    here = answer(x)
    return here if name == "cpu" else getattr(here, name)()


SENDING = (
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
"""Operations that take tensors of the host, and send them by themselves."""
WAITING: dict[object, Callable[..., object]] = {
    aten._local_scalar_dense.default: lambda x: told(x, "item"),
    aten.nonzero.default: lambda x: torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=FAR),
    aten.equal.default: lambda x, y: True,
    aten.masked_select.default: lambda x, mask: torch.empty(mask.numel(), dtype=x.dtype, device=FAR),
}
"""Operations for which the host waits, with what it is told."""


@contextmanager
def watching(noted: Noted) -> Iterator[None]:
    """Note what happens inside."""
    with Operations(noted), Questions(noted):
        yield
