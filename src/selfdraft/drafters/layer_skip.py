"""Layer skipping: the target drafts for itself with some of its sublayers left out.

Source: Zhang et al., "Draft & Verify" (arXiv 2309.08168): separate switches for attention and MLP (section 3.1),
exit on low confidence with a threshold that follows the measured acceptance (section 3.3). `exit_layer` is
LayerSkip's shorthand (arXiv 2404.16710): every block from there on is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from torch import Tensor

from selfdraft.core.choose import choose, process
from selfdraft.core.rows import chain_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget, Skip, within

SOURCE = "layer_skip"


class LayerSkip:
    """A chain of up to `num_speculative_tokens`, one short pass of the target per link.

    The passes read the target's own cache and write behind what it remembers, so there is nothing to undo. A
    sampled request drafts with the noise the target will use: that is what makes sampled drafts agree.
    """

    def __init__(
        self,
        target: Target,
        *,
        skip_attention: Iterable[int] | None = None,
        skip_mlp: Iterable[int] | None = None,
        exit_layer: int | None = None,
        num_speculative_tokens: int = 8,
        confidence_threshold: float = 0.6,
        target_acceptance_rate: float = 0.9,
        adaptive: bool = True,
    ) -> None:
        within("num_speculative_tokens", num_speculative_tokens, 1, 256)
        within("confidence_threshold", confidence_threshold, 0.0, 1.0)
        within("target_acceptance_rate", target_acceptance_rate, 0.0, 1.0)
        self.target = target
        self.skip = choose_skip(target.layers, skip_attention, skip_mlp, exit_layer)
        self.most = num_speculative_tokens
        self.exit = ExitThreshold(confidence_threshold, target_acceptance_rate, adaptive)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        chains = [
            _Chain(sequence, min(self.most, budget.depth, budget.nodes))
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]
        while going := [chain for chain in chains if chain.going]:
            rows = chain_rows([(c.sequence.slot, c.sequence.cached + len(c.tokens), c.path[-1]) for c in going])
            for chain, logits in zip(going, self.target.forward(rows, self.skip), strict=True):
                chain.extend(logits, self.exit.value)
        return [Draft.chain(c.tokens, SOURCE, c.scores) if c.tokens else EMPTY for c in chains]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for result in results:
            if result.draft.candidates:
                drafted, accepted = result.draft.candidates, len(result.path)
                self.exit.update(accepted / drafted, capped=drafted == self.most)


@dataclass(slots=True)
class _Chain:
    """The draft of one sequence while it grows."""

    sequence: Sequence
    most: int
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    path: list[int] = field(init=False)
    """The sequence's tokens and the drafted ones: what processors see."""
    going: bool = field(init=False)

    def __post_init__(self) -> None:
        self.path = list(self.sequence.tokens)
        self.going = self.most > 0

    def extend(self, logits: Tensor, threshold: float) -> None:
        """Add what the short pass says; a token below the threshold is the last, but is still verified."""
        sequence, sampling = self.sequence, self.sequence.sampling
        if sampling.plain:
            token = int(logits.argmax())
        else:
            scores = process(logits, sampling, self.path, sequence.prompt_length, sequence.ends)
            token = choose(scores, sampling, sequence.seed, len(self.path))
        confidence = float(logits.float().softmax(-1)[token])
        self.tokens.append(token)
        self.scores.append(confidence)
        self.path.append(token)
        sequence.stats.num_draft_passes += 1
        ended = token in sequence.ends and not sampling.ignore_eos
        self.going = confidence >= threshold and len(self.tokens) < self.most and not ended


@dataclass(slots=True)
class ExitThreshold:
    """The confidence below which drafting stops, moved so that acceptance comes near a target rate.

    Draft & Verify, section 3.3 and its published settings beta1 = 0.5, beta2 = 0.9, epsilon = 0.01. Unlike the
    published code it is clamped to [0, 1], and its state lives on from request to request.
    """

    value: float
    target: float
    adaptive: bool = True
    rate: float = 0.0
    """Exponential mean of the acceptance rate per step."""

    def update(self, acceptance: float, *, capped: bool) -> None:
        """Book one step; `capped`: the draft ended at its length limit, so its exit says nothing about being lax."""
        if not self.adaptive:
            return
        self.rate = 0.5 * self.rate + 0.5 * acceptance
        if self.rate < self.target:
            wanted = self.value + 0.01
        else:
            wanted = self.value if capped else self.value - 0.01
        self.value = min(1.0, max(0.0, 0.9 * self.value + 0.1 * wanted))


def choose_skip(
    layers: int, attention: Iterable[int] | None, mlp: Iterable[int] | None, exit_layer: int | None
) -> Skip:
    """The skip set of the options; without any, the pattern of the published sets. Errors: OptionError."""
    if exit_layer is not None:
        if attention is not None or mlp is not None:
            raise OptionError("exit_layer leaves out whole blocks: give either it or skip_attention and skip_mlp")
        within("exit_layer", exit_layer, 1, layers - 1)
        return Skip(frozenset(range(exit_layer, layers)), frozenset(range(exit_layer, layers)))
    if attention is None and mlp is None:
        # the published sets keep the first blocks whole and skip about twice as many attentions as MLPs
        attention = range(layers // 3, layers - 1)
        mlp = range(layers // 2, layers - 1, 3)
    skip = Skip(frozenset(attention or ()), frozenset(mlp or ()))
    for name, indices in (("skip_attention", skip.attention), ("skip_mlp", skip.mlp)):
        outside = sorted(i for i in indices if not isinstance(i, int) or not 0 <= i < layers)
        if outside:
            raise OptionError(f"{name} holds {outside[0]!r}: the model has blocks 0 to {layers - 1}")
    if not (skip.attention or skip.mlp):
        raise OptionError("the skip set is empty: drafting with the whole model can never be faster than decoding")
    return skip
