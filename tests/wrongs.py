"""Mistakes planted into attention, positions and layers, as families of models make them possible; outliers, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfdraft.core.rows import Span
from selfdraft.models import attention
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.proof.whole_model import window_of
from selfdraft.models.target import HFTarget

Plant = Callable[[pytest.MonkeyPatch], None]
attend = attention.attend


def outliers(model: PreTrainedModel) -> PreTrainedModel:
    """One channel of the residual stream a thousand times as large, and one token with huge norms; in place."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    with torch.no_grad():
        table[:, 3] *= 1000
        table[7] *= 100
    return model


def positions(patch: pytest.MonkeyPatch) -> None:
    """Drafted rows stand one position too far."""
    right = Span.positions.fget  # type: ignore[attr-defined]

    def wrong(span: Span) -> list[int]:
        found = right(span)
        return [*found[: span.pending], *(place + 1 for place in found[span.pending :])]

    patch.setattr(Span, "positions", property(wrong))


def arguments(change: Callable[[dict[str, Any]], None]) -> Plant:
    """Attention gets other arguments than the model gave, on the plain path."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def plain(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **given: Any) -> Any:
            change(given)
            return attend(module, q, k, v, mask, **given)

        patch.setitem(attention_table(), attention.NAME, plain)

    return plant


def attention_table() -> dict[str, Any]:
    """transformers' table of attention functions."""
    from transformers import AttentionInterface

    attention.register(attention.NAME, attend)
    table: dict[str, Any] = AttentionInterface._global_mapping
    return table


def wide_window(patch: pytest.MonkeyPatch) -> None:
    """Windows are one token too wide; attention is told the right width."""
    right = attention.Group.mask
    patch.setattr(attention.Group, "mask", lambda group, window, *rest: right(group, window and window + 1, *rest))


def _sink(given: dict[str, Any]) -> None:
    given["s_aux"] = None


def shared_cache(patch: pytest.MonkeyPatch) -> None:
    """Layer 1 writes its keys and values where layer 0 has its own, after that has read them."""
    view, write = KVCache.view, KVCache.write
    patch.setattr(KVCache, "view", lambda cache, layer, *rest: view(cache, layer and layer - (layer == 1), *rest))
    patch.setattr(KVCache, "write", lambda cache, layer, *rest: write(cache, layer and layer - (layer == 1), *rest))


def no_bias(patch: pytest.MonkeyPatch) -> None:
    """The last linear layer with a bias in block 1 has none, in the target alone."""
    right = HFTarget.__init__

    def wrong(target: HFTarget, model: PreTrainedModel, **options: Any) -> None:
        right(target, without_bias(model), **options)

    patch.setattr(HFTarget, "__init__", wrong)


def without_bias(model: PreTrainedModel) -> PreTrainedModel:
    from selfdraft.models import views as view

    def along(module: nn.Module) -> nn.Module:
        shell = view.shallow(module)
        for name, child in module._modules.items():
            if child is not None:
                shell._modules[name] = along(child)
        if module is biased(model):
            shell._parameters["bias"] = nn.Parameter(torch.zeros_like(module._parameters["bias"]))  # type: ignore[arg-type]
        return shell

    made = along(model)
    assert isinstance(made, PreTrainedModel)
    return made


def biased(model: PreTrainedModel) -> nn.Module | None:
    """The last linear layer with a bias in block 1, in its attention if there is one (not that of its keys)."""
    from selfdraft.models import views as view

    block = view.blocks(model, int(model.config.get_text_config().num_hidden_layers))[1]
    attending = block._modules[view.attention_of(block) or ""]
    linear = [m for part in (attending, block) if part for m in reversed([*part.modules()]) if hasattr(m, "weight")]
    return next((m for m in linear if m.weight.ndim == 2 and getattr(m, "bias", None) is not None), None)


def wrongs_of(model: PreTrainedModel) -> dict[str, Plant]:
    """The mistakes that can be made with this model."""
    config = model.config.get_text_config()
    found: dict[str, Plant] = {"position": positions, "shared cache": shared_cache}
    if any(window_of(config, layer) for layer in range(int(config.num_hidden_layers))):
        found["window"] = wide_window
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        found["sink"] = arguments(_sink)
    if biased(model) is not None:
        found["bias"] = no_bias
    return found
