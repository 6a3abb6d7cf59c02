"""Every block of a model alone on the fast runner, in float32, against what the block does in a wide stock pass.

The runner computes in the dtype of its weights, so a short dtype would hide a mistake behind its rounding. One block
at a time is copied to float32; it starts from the states of the wide pass, so that no rounding comes from before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfdraft.core.rows import Rows
from selfdraft.errors import UnsupportedModel
from selfdraft.models import views
from selfdraft.models.attention import Plan
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.packed.layers import BlockLinear, block_layers, has_blocks
from selfdraft.models.packed.twin import twin
from selfdraft.models.runner.one_layer import run_blocks
from selfdraft.models.runner.runner import Runner
from selfdraft.models.target import HFTarget

LIMIT = 1e-3
"""Largest error of a block, relative to what it adds to the residual stream."""
COARSE = 0.1
"""The same for blocks of block weights: the last bit of a float may move the code of a row by one.
Their layers are tried one by one, too."""
TRIED = 3
"""Rows that each layer of block weights is tried with."""
RESIDUAL = 0.01
"""A number counts as large as what the block adds to it, or as this share of it: float32 rounds it as a whole."""


class Passes(Protocol):
    """The part of `proof.Case` that is needed here."""

    @property
    def passes(self) -> tuple[tuple[tuple[int, int], ...], ...]: ...

    def run(self, forward: Callable[[Rows], Tensor], keep: Callable[..., None]) -> Tensor: ...


class Blocks:
    """A view of a stock model that notes the states [texts, places, hidden] before and behind every block."""

    def __init__(self, stock: PreTrainedModel, count: int) -> None:
        self.before: dict[int, Tensor] = {}
        self.behind: dict[int, Tensor] = {}
        self.logits = torch.empty(0)
        notes = self.before, self.behind  # not `self`: the view and the notes would hold each other
        self.model = views.rearranged(stock, count, lambda i, block: _Noted(block, i, *notes))


class _Noted(nn.Module):
    def __init__(self, block: nn.Module, index: int, before: dict[int, Tensor], behind: dict[int, Tensor]) -> None:
        super().__init__()
        self.block, self.index, self.before, self.behind = block, index, before, behind
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> views.States:
        said: views.States = self.block(hidden_states, *args, **kwargs)
        self.before[self.index] = hidden_states
        self.behind[self.index] = said[0] if isinstance(said, tuple) else said
        return said


class _Alone(views.Resuming):
    """A block that starts from the states in the plan of the call, and leaves what it says there."""

    def forward(self, hidden_states: Tensor, *args: object, selfdraft: Plan, **kwargs: object) -> views.States:
        said = super().forward(hidden_states, *args, selfdraft=selfdraft, **kwargs)
        selfdraft.hidden = said[0] if isinstance(said, tuple) else said
        return said


def check_blocks(target: HFTarget, exact: Blocks, case: Passes, name: str) -> float:
    """Run every block alone. Returns the largest error in units of the largest that passes.

    Errors: UnsupportedModel names the first block that differs; RunnerUnavailable.
    """
    worst, limit = 0.0, COARSE if has_blocks(target._view) else LIMIT
    for block in range(target.layers):
        with torch.inference_mode(False), torch.no_grad():
            model = _only(target._view, target.layers, block)
            weight = next(p for p in model.parameters() if p.is_floating_point())
        error = _error(Runner(weight.dtype, weight.device, KVCache(1, 256), 0), model, block, exact, case)
        worst = max(worst, error / limit)
        if not error <= limit:
            raise UnsupportedModel(
                f"{name}: the fast runner computes block {block} otherwise than transformers does, by {error:.2g} of "
                f"what the block adds, and only {limit:g} would be rounding"
            )
    return worst


@torch.inference_mode()
def check_layers(model: PreTrainedModel, name: str) -> None:
    """Run one layer of block weights of every format and size alone, and compare it with its specification, bit by bit.

    Errors: UnsupportedModel names the first that differs; RunnerUnavailable.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    draw, tried = torch.Generator().manual_seed(3), set[tuple[int, int, int]]()
    for path, layer in block_layers(model):
        sizes = layer.kind.code, layer.rows_packed, layer.columns
        if not isinstance(layer, BlockLinear) or sizes in tried:
            continue
        tried.add(sizes)
        x = torch.randn(TRIED, layer.in_features, generator=draw).to(dtype)
        wanted = twin(x, layer.packed, layer.bias, layer.kind, layer.out_features, layer.in_features)
        said = run_blocks(x, layer.packed, layer.bias, *sizes)
        if not torch.equal(said, wanted):
            off = float((said.double() - wanted.double()).abs().max())
            raise UnsupportedModel(
                f"{name}: the fast runner computes {path} ({layer.kind}) otherwise, by up to {off:.2g}"
            )


@torch.inference_mode()
def _error(runner: Runner, model: PreTrainedModel, block: int, exact: Blocks, case: Passes) -> float:
    """The error of the worst row of the three passes, root mean square over its numbers; each counts 1 at most."""
    before, behind = exact.before[block], exact.behind[block]
    usual = (behind - before).abs().flatten(0, 1).median(0).values
    left = iter(case.passes)
    errors: list[Tensor] = []
    runner.cache.reserve(behind.shape[1] + 8)
    traced = runner.tape(model, resuming=True)

    def forward(rows: Rows) -> Tensor:
        places = next(left)
        entering, wanted = (torch.stack([states[t, p] for t, p in places]) for states in (before, behind))
        _, noted = runner.run(traced, rows, hidden=entering.float())
        assert noted is not None
        parts = (noted.double() - wanted).abs() / (usual + RESIDUAL * wanted.abs()).clamp(min=1e-12)
        errors.append(parts.nan_to_num(1.0).clamp(max=1.0).square().mean(-1).sqrt().amax())
        return noted

    case.run(forward, runner.keep)
    return float(torch.stack(errors).amax())


def _only(whole: PreTrainedModel, count: int, chosen: int) -> PreTrainedModel:
    """A view with one block, everything in float32, and neither embeddings nor an output layer."""
    decoder = views.blocks(whole, count)
    table, head = whole.get_input_embeddings(), whole.get_output_embeddings()

    def along(module: nn.Module) -> nn.Module:
        if module is decoder:
            return nn.ModuleList(
                _Alone(along(block)) if i == chosen else views.Through(block) for i, block in enumerate(decoder)
            )
        if module is head:
            return nn.Identity()
        if module is table:
            return nn.Embedding(1, int(whole.config.get_text_config().hidden_size))
        shell = views.with_children(module, lambda _, child: along(child))
        for own in (shell._parameters, shell._buffers):
            for key, tensor in own.items():
                if tensor is not None and tensor.is_floating_point():
                    own[key] = tensor.detach().float()  # type: ignore[assignment]
        return shell

    made = along(whole)
    assert isinstance(made, PreTrainedModel)
    return made
