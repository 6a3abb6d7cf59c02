"""Layer skipping: the target drafts for itself with some of its sublayers left out.

Source: Zhang et al., "Draft & Verify" (arXiv 2309.08168): separate switches for attention and MLP (section 3.1),
exit on low confidence with a threshold that follows the measured acceptance (section 3.3). `exit_layer` is
LayerSkip's shorthand (arXiv 2404.16710): every block from there on is left out. `selfdraft tune` searches sets.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from selfdraft.drafting.autoregressive import Chaining, exit_of
from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import checked, given_skip
from selfdraft.protocols import Target, search_of
from selfdraft.types import Skip, within

SOURCE = "layer_skip"


class LayerSkip(Chaining):
    """A chain of up to `num_speculative_tokens`, one short pass of the target per link (`drafting/autoregressive.py`).

    `skip_set`: a JSON file of skip sets, 'FILE' or 'FILE#NAME'. Without any set the checkpoint's own is taken
    (`DraftExtras.tuned_options`), else the pattern of the published ones.
    """

    def __init__(
        self,
        target: Target,
        *,
        skip_attention: Iterable[int] | None = None,
        skip_mlp: Iterable[int] | None = None,
        exit_layer: int | None = None,
        skip_set: str | Path | None = None,
        num_speculative_tokens: int = 8,
        confidence_threshold: float = 0.6,
        exit_policy: str = "target",
        target_acceptance_rate: float = 0.9,
        adaptive: bool = True,
    ) -> None:
        rule = exit_of(exit_policy, confidence_threshold, target_acceptance_rate, adaptive)
        super().__init__(
            lambda rows: target.forward(rows, self.skip),
            SOURCE,
            num_speculative_tokens,
            rule,
            target.extras.clock,
            search_of(target).contenders,
        )
        given = any(option is not None for option in (skip_attention, skip_mlp, exit_layer, skip_set))
        named = skip_set if given else target.extras.tuned_options.get(SOURCE, {}).get("skip_set")
        self.skip = choose_skip(target.extras.num_layers, skip_attention, skip_mlp, exit_layer, named)


def choose_skip(
    layers: int,
    attention: Iterable[int] | None,
    mlp: Iterable[int] | None,
    exit_layer: int | None,
    skip_set: object = None,
) -> Skip:
    """The skip set of the options; without any, the pattern of the published sets. Errors: OptionError."""
    if sum((exit_layer is not None, attention is not None or mlp is not None, skip_set is not None)) > 1:
        raise OptionError(
            "exit_layer leaves out whole blocks, skip_set names a set: give one of them, or skip_attention and skip_mlp"
        )
    if exit_layer is not None:
        within("exit_layer", exit_layer, 1, layers - 1)
        return Skip(frozenset(range(exit_layer, layers)), frozenset(range(exit_layer, layers)))
    if skip_set is not None:
        return given_skip(skip_set, layers)
    if attention is None and mlp is None:
        return checked(usual_skip(layers), layers)
    for name, blocks in (("skip_attention", attention), ("skip_mlp", mlp)):
        if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Iterable)):
            raise OptionError(f"{name}={blocks!r} is no list of block numbers; give one such as [3, 4]")
    return checked(Skip(frozenset(attention or ()), frozenset(mlp or ())), layers)


def usual_skip(layers: int) -> Skip:
    """The published sets keep the first blocks whole and skip about twice as many attentions as MLPs."""
    return Skip(frozenset(range(layers // 3, layers - 1)), frozenset(range(layers // 2, layers - 1, 3)))
