"""A forward pass as a list of torch's basic operations, recorded without computing any of them.

`make_fx` of torch gives the same list, but takes 1.5 s for a model of 30 blocks, and this 0.4 s (docs/log.md). The
model sees ordinary tensors of its own device with arbitrary contents; what an operation returns is found on torch's
"meta" device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from selfdraft.errors import RunnerUnavailable

aten = torch.ops.aten
Returned: TypeAlias = Tensor | SequenceOf[Tensor]
VIEWS = frozenset(
    {
        "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice",
        "select", "split", "split_with_sizes", "unbind", "alias", "detach", "unfold", "narrow", "chunk",
    }
)  # fmt: skip
"""Operations that only look at the numbers of their first argument in another way."""


@dataclass(eq=False, slots=True)
class Node:
    """One operation, or an input of the pass (then `target` is None)."""

    target: OpOverload | None
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    value: Tensor
    """An example of what it returns, of several tensors the first: sizes and types count, not the numbers."""
    part: int | None = None
    """Which one of several returned tensors is meant."""
    source: Node | None = None
    """The operation that returned them all."""


@dataclass(slots=True)
class Graph:
    inputs: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def drop_unused(self) -> None:
        """Drop every operation that no output depends on."""
        used: set[Node] = set()
        stack = [*self.outputs]
        while stack:
            node = stack.pop()
            if node not in used:
                used.add(node)
                leaves = [node.source, *tree_leaves((node.args, node.kwargs))]
                stack += [leaf for leaf in leaves if isinstance(leaf, Node)]
        self.nodes = [node for node in self.nodes if node in used]


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.known: dict[int, Node] = {}
        self.alive: list[Tensor] = []
        """Tensors whose ids are known: none of them may be given to another one."""
        self.blocks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def note(self, tensor: Tensor, node: Node) -> None:
        self.known[id(tensor)] = node
        self.alive.append(tensor)

    def blank(self, like: Tensor, device: torch.device) -> Tensor:
        """A tensor of this size and type with arbitrary contents.

        A CPU takes no memory that is not touched. Elsewhere all of them lie in one block, for a GPU has none to spare.
        """
        if device.type == "cpu":
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        size = 1 + sum((count - 1) * step for count, step in zip(like.shape, like.stride(), strict=True))
        key = device, like.dtype
        if key not in self.blocks or self.blocks[key].numel() < size:
            self.blocks[key] = torch.empty(size, dtype=like.dtype, device=device)
        return self.blocks[key].as_strided(like.shape, like.stride())

    def node_of(self, one: object) -> object:
        return self.known.get(id(one), one) if isinstance(one, Tensor) else one

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: SequenceOf[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Returned:
        kwargs = dict(kwargs or {})
        if not any(id(leaf) in self.known for leaf in tree_leaves((args, kwargs))):
            constant: Returned = func(*args, **kwargs)
            return constant
        with self:
            parts: Returned = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        named_args, named_kwargs = tree_map(self.node_of, (args, kwargs))
        said = self.returned(func, args, kwargs)
        node = Node(func, named_args, named_kwargs, said if isinstance(said, Tensor) else said[0])
        self.graph.nodes.append(node)
        if isinstance(said, Tensor):
            self.note(said, node)
            return said
        for number, one in enumerate(said):
            part = Node(None, (), {}, one, number, node)
            self.graph.nodes.append(part)
            self.note(one, part)
        return said

    def returned(self, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> Returned:
        """Tensors of the sizes and types that the operation returns; a view is taken as it is."""
        if func.namespace == "aten" and func.overloadpacket.__name__ in VIEWS:
            view: Returned = func(*args, **kwargs)
            return view

        def described(one: object) -> object:
            if not isinstance(one, Tensor):
                return one
            return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")

        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        there = {name: "meta" if name == "device" and one is not None else one for name, one in kwargs.items()}
        said = func(*tree_map(described, args), **tree_map(described, there))

        def made(one: object) -> object:
            if not isinstance(one, Tensor):
                return one
            return self.blank(one, device)

        found: Returned = tree_map(made, said)
        return found


def record(forward: Callable[..., SequenceOf[Tensor]], inputs: SequenceOf[Tensor]) -> Graph:
    """What `forward` does to its inputs. Errors: whatever `forward` raises; RunnerUnavailable."""
    graph = Graph()
    with torch.inference_mode(False), torch.no_grad():
        given = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device) for one in inputs]
        mode = _Recording(graph)
        for one in given:
            node = Node(None, (), {}, one)
            graph.inputs.append(node)
            mode.note(one, node)
        with mode:
            said = forward(*given)
    graph.outputs = [node for node in map(mode.node_of, said) if isinstance(node, Node)]
    if len(graph.outputs) < len(said):
        raise RunnerUnavailable("what the model says does not depend on its input")
    graph.drop_unused()
    return graph
