"""Layer skipping: the target drafts for itself with some of its sublayers left out.

Source: Zhang et al., "Draft & Verify" (arXiv 2309.08168): separate switches for attention and MLP (section 3.1),
exit on low confidence with a threshold that follows the measured acceptance (section 3.3). `exit_layer` is
LayerSkip's shorthand (arXiv 2404.16710): every block from there on is left out. `selfdraft tune` searches sets.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from selfdraft.core.choose import choose, process
from selfdraft.core.exit import ExitThreshold, StepSeconds, ThroughputExit, Verified
from selfdraft.core.rows import chain_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.skipset import checked, parse_sets, pick_set, skip_of
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget, Skip, within

SOURCE = "layer_skip"
POLICIES = ("target", "throughput")
"""What the exit threshold follows: the acceptance rate asked for, or the measured tokens per second."""


class LayerSkip:
    """A chain of up to `num_speculative_tokens`, one short pass of the target per link.

    The passes read the target's own cache and write behind what it remembers, so there is nothing to undo. A
    sampled request drafts with the noise the target will use: that is what makes sampled drafts agree.
    `skip_set`: a JSON file of skip sets, 'FILE' or 'FILE#NAME'. Without any set the checkpoint's own is taken
    (`Target.advice`), else the pattern of the published ones.
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
        within("num_speculative_tokens", num_speculative_tokens, 1, 256)
        within("confidence_threshold", confidence_threshold, 0.0, 1.0)
        within("target_acceptance_rate", target_acceptance_rate, 0.0, 1.0)
        if exit_policy not in POLICIES:
            raise OptionError(f"exit_policy={exit_policy!r} is unknown; there are {' and '.join(POLICIES)}")
        if exit_policy == "throughput" and not adaptive:
            raise OptionError("exit_policy='throughput' adapts: adaptive=False belongs to exit_policy='target'")
        self.target = target
        told = any(option is not None for option in (skip_attention, skip_mlp, exit_layer, skip_set))
        named = skip_set if told else target.advice(SOURCE).get("skip_set")
        self.skip = choose_skip(target.layers, skip_attention, skip_mlp, exit_layer, named)
        self.most = num_speculative_tokens
        self.exit: ExitThreshold | ThroughputExit = (
            ThroughputExit(confidence_threshold)
            if exit_policy == "throughput"
            else ExitThreshold(confidence_threshold, target_acceptance_rate, adaptive)
        )
        self.clock = time.perf_counter
        self._seconds = self._ended = 0.0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        began = self.clock()
        chains = [
            _Chain(sequence, min(self.most, budget.depth, budget.nodes))
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]
        while going := [chain for chain in chains if chain.going]:
            rows = chain_rows([(c.sequence.slot, c.sequence.cached + len(c.tokens), c.path[-1]) for c in going])
            for chain, logits in zip(going, self.target.forward(rows, self.skip), strict=True):
                chain.extend(logits, self.exit)
        self._ended = self.clock()
        self._seconds = self._ended - began
        return [Draft.chain(c.tokens, SOURCE, c.scores) if c.tokens else EMPTY for c in chains]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        rows = sum(len(result.answers) for result in results)
        seconds = StepSeconds(self._seconds, self.clock() - self._ended, rows)
        drafts = [
            Verified(
                result.draft.scores[: result.draft.candidates], len(result.path), result.draft.candidates == self.most
            )
            for result in results
            if result.draft.candidates
        ]
        self.exit.observe(drafts, seconds)


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

    def extend(self, logits: Tensor, exit_: ExitThreshold | ThroughputExit) -> None:
        """Add what the short pass says; the token at which drafting stops is still verified."""
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
        self.going = len(self.tokens) < self.most and not ended and not exit_.stops(self.scores)


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
    if isinstance(skip_set, Skip):
        return checked(skip_set, layers)
    if skip_set is not None:
        if not isinstance(skip_set, str | Path):
            raise OptionError(f"skip_set={skip_set!r} is no path; give 'FILE' or 'FILE#NAME'")
        return read_skip(skip_set, layers)
    if attention is None and mlp is None:
        return checked(usual_skip(layers), layers)
    for name, blocks in (("skip_attention", attention), ("skip_mlp", mlp)):
        if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Iterable)):
            raise OptionError(f"{name}={blocks!r} is no list of block numbers; give one such as [3, 4]")
    return checked(Skip(frozenset(attention or ()), frozenset(mlp or ())), layers)


def usual_skip(layers: int) -> Skip:
    """The published sets keep the first blocks whole and skip about twice as many attentions as MLPs."""
    return Skip(frozenset(range(layers // 3, layers - 1)), frozenset(range(layers // 2, layers - 1, 3)))


def read_skip(place: str | Path, layers: int) -> Skip:
    """A set out of a JSON file, 'FILE' or 'FILE#NAME', for a model of `layers` blocks.

    Errors: OptionError for a file that cannot be read or holds no such set, or a set of a longer model.
    """
    file, _, name = str(place).rpartition("#")
    if not file or Path(place).is_file():
        file, name = str(place), ""
    try:
        text = Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError(f"skip_set {file!r} cannot be read: {why}; give the JSON file of a searched set") from error
    record = pick_set(parse_sets(text, file), name, file)
    return checked(skip_of(record), layers, (f"'attention' of {place}", f"'mlp' of {place}"))
