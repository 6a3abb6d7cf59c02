"""Views of a stock model: the same modules and weights, arranged for one purpose. The model itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from selfdraft.errors import UnsupportedModel
from selfdraft.models.attention import NAME, Plan, attend, register
from selfdraft.types import Skip

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "moe", "fc2")
"""OPT has its MLP as two bare layers: silencing the second one silences it."""
PRE_NORMS = (
    ("input_layernorm", "pre_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_1", "ln_2"),
)
"""Norms before attention and before the MLP, as the families name them."""
POST_NORMED = frozenset({"pre_feedforward_layernorm", "post_feedforward_layernorm"})
"""Beside one of these `post_attention_layernorm` follows the attention."""
States: TypeAlias = Tensor | tuple[Tensor, ...]
"""What a block returns: hidden states, in some families with more behind them."""
PAIRED = ("GptOssMLP",)
"""MLPs whose block unpacks (hidden states, router scores)."""


def clone(model: PreTrainedModel, attention: str = NAME) -> PreTrainedModel:
    """The same weights in fresh module shells whose configuration asks for one of our attention functions."""
    configs: dict[int, PreTrainedConfig] = {}

    def fresh(module: nn.Module) -> nn.Module:
        if not (module._modules or hasattr(module, "config") or module.training):
            return module  # a leaf with weights only: shared (one in training mode is not: views are set to eval)
        shell = with_children(module, lambda _, child: fresh(child))
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                configs[id(config)]._attn_implementation_internal = attention
            shell.config = configs[id(config)]
        return shell

    if attention == NAME:
        register(NAME, attend)
    return cast("PreTrainedModel", fresh(model))


def shallow(module: nn.Module) -> nn.Module:
    """A new shell of one module: own dictionaries, same parameters, buffers and children."""
    shell = type(module).__new__(type(module))
    shell.__dict__ = dict(module.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell


def blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder blocks. Errors: UnsupportedModel when there is none of `count` blocks."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    for module in (decoder or model).modules():  # the tower of a vision model may have as many blocks
        if isinstance(module, nn.ModuleList) and len(module) == count and attention_of(module[0]) is not None:
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no list of {count} decoder blocks that this adapter knows")


def attention_of(block: nn.Module) -> str | None:
    return next((name for name in ATTENTION_NAMES if name in block._modules), None)


def mlp_of(block: nn.Module) -> str | None:
    return next((name for name in MLP_NAMES if name in block._modules), None)


def with_children(module: nn.Module, change: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A new shell of one module whose children are `change(name, child)`; the module keeps its own."""
    shell = shallow(module)
    for name, child in module._modules.items():
        if child is not None:
            shell._modules[name] = change(name, child)
    return shell


def rearranged(view: PreTrainedModel, count: int, change: Callable[[int, nn.Module], nn.Module]) -> PreTrainedModel:
    """A view whose block i is `change(i, block)`; everything else is shared with `view`."""
    wanted = blocks(view, count)

    def along(module: nn.Module) -> nn.Module:
        if module is wanted:
            return nn.ModuleList(change(i, block) for i, block in enumerate(wanted))
        if not any(child is wanted for child in module.modules()):
            return module
        return with_children(module, lambda _, child: along(child))

    return cast("PreTrainedModel", along(view))


def skipping(view: PreTrainedModel, count: int, skip: Skip) -> PreTrainedModel:
    """A view in which the sublayers of `skip` add nothing to the residual stream (Draft & Verify, section 3.1)."""

    def change(index: int, block: nn.Module) -> nn.Module:
        no_attention, no_mlp = index in skip.attention, index in skip.mlp
        if no_attention and no_mlp:
            return Through(block)
        if not (no_attention or no_mlp):
            return block
        shell = shallow(block)
        for norm in idle_norms(block, no_attention=no_attention):
            shell._modules[norm] = nn.Identity()
        if no_attention:
            shell._modules[attention_of(block) or ""] = SilentAttention()
        if no_mlp:
            name = mlp_of(block)
            if name is None:
                raise UnsupportedModel(f"{type(block).__name__} has no MLP of its own that could be skipped")
            shell._modules[name] = SilentMLP(block._modules[name])
        return shell

    return rearranged(view, count, change)


def idle_norms(block: nn.Module, *, no_attention: bool) -> list[str]:
    """The norm that only the skipped sublayer reads, when one of the two is skipped: it need not be computed.

    A norm that both sublayers read (Phi, Cohere) or that follows a sublayer (OLMo 2, Gemma 2) stays.
    """
    names = set(block._modules)
    for of_attention, of_mlp in PRE_NORMS:
        if {of_attention, of_mlp} <= names and not (of_mlp == "post_attention_layernorm" and names & POST_NORMED):
            return [of_attention if no_attention else of_mlp]
    return []


class Through(nn.Module):
    """A whole block left out: the residual stream passes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type  # some models pick the mask by it

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


class SilentAttention(nn.Module):
    """An attention sublayer that adds nothing."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class SilentMLP(nn.Module):
    """An MLP sublayer that adds nothing."""

    def __init__(self, mlp: nn.Module | None) -> None:
        super().__init__()
        self.width = getattr(mlp, "out_features", None)  # only a bare layer has it
        self.paired = type(mlp).__name__ in PAIRED

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor, None]:
        silence = hidden_states.new_zeros(*hidden_states.shape[:-1], self.width or hidden_states.shape[-1])
        return (silence, None) if self.paired else silence


def noting(view: PreTrainedModel, count: int, block: int) -> PreTrainedModel:
    """The view, noting the hidden states that enter `block` in the plan of the call."""
    return rearranged(view, count, lambda i, old: Noting(old) if i == block else old)


def leaving(view: PreTrainedModel, count: int, block: int) -> PreTrainedModel:
    """Only the blocks before `block`; the states that would enter it are in the plan afterwards."""
    return rearranged(
        view, count, lambda i, old: old if i < block else Noting(Through(old)) if i == block else Through(old)
    )


def resuming(view: PreTrainedModel, count: int, block: int) -> PreTrainedModel:
    """Only `block` and those behind it, starting from the states in the plan."""
    return rearranged(view, count, lambda i, old: Through(old) if i < block else Resuming(old) if i == block else old)


class Noting(nn.Module):
    """A block that notes the hidden states entering it in the call's plan, then runs as usual."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden_states: Tensor, *args: object, selfdraft: Plan, **kwargs: object) -> States:
        selfdraft.hidden = hidden_states
        said: States = self.block(hidden_states, *args, selfdraft=selfdraft, **kwargs)
        return said


class Resuming(Noting):
    """A block that takes its hidden states from the call's plan instead of from the block before."""

    def forward(self, hidden_states: Tensor, *args: object, selfdraft: Plan, **kwargs: object) -> States:
        assert selfdraft.hidden is not None
        said: States = self.block(selfdraft.hidden, *args, selfdraft=selfdraft, **kwargs)
        return said
