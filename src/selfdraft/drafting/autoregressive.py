"""The two verbs of a drafter that asks a short pass of the target for one token after another.

Source: Zhang et al., "Draft & Verify" (arXiv 2309.08168), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from selfdraft.core import told
from selfdraft.core.one_row import Contenders, Scores, apart, contenders, widened
from selfdraft.core.rows import Rows, chain_rows
from selfdraft.core.sampler import NOTHING, NOTHING_LEFT, choose, process
from selfdraft.core.sequence import Sequence
from selfdraft.core.told import UNSAID, Asked
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.draft_length import Confidence, ExitThreshold, StepSeconds, ThroughputExit, Verified
from selfdraft.errors import EngineError, OptionError
from selfdraft.types import Budget, Clock, within

Exit = ExitThreshold | ThroughputExit
POLICIES = ("target", "throughput")
"""What the exit threshold follows: the acceptance rate asked for, or the measured tokens per second."""


def exit_of(policy: str, threshold: float, rate: float, adaptive: bool, agreed: float = 0.0) -> Exit:
    """The rule of these options; `agreed`: how often a token is accepted at least, until it was seen.

    Errors: OptionError for an unknown policy, or a value out of range.
    """
    within("confidence_threshold", threshold, 0.0, 1.0)
    within("target_acceptance_rate", rate, 0.0, 1.0)
    if policy not in POLICIES:
        raise OptionError(f"exit_policy={policy!r} is unknown; there are {' and '.join(POLICIES)}")
    if policy == "throughput":
        if not adaptive:
            raise OptionError("exit_policy='throughput' adapts: adaptive=False belongs to exit_policy='target'")
        return ThroughputExit(threshold, confidence=Confidence(agreed))
    return ExitThreshold(threshold, rate, adaptive)


class Chaining:
    """`draft` and `observe`: chains of up to `most` tokens, one short pass per link of all of them together.

    The passes read the target's own cache and write behind what it remembers, so there is nothing to undo. A sampled
    request drafts with the noise the target will use: that is what makes sampled drafts agree.
    `run` is the short pass, logits [answers, vocab] of rows; `clock` times passes, in seconds; `search` looks a row
    through on a CPU.
    Errors: OptionError when `most` is out of range.
    """

    def __init__(
        self,
        run: Callable[[Rows], Tensor],
        source: str,
        most: int,
        exit_: Exit,
        clock: Clock,
        search: Contenders = contenders,
    ) -> None:
        within("num_speculative_tokens", most, 1, 256)
        self.run, self.source, self.most, self.exit = run, source, most, exit_
        self.clock, self.search = clock, search
        self._seconds = self._ended = 0.0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        began = self.clock()
        chains = [
            Chain(sequence, min(self.most, budget.max_depth, budget.max_nodes), self.search)
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]
        while going := [chain for chain in chains if chain.going]:
            rows = chain_rows([(c.sequence.slot, c.sequence.num_cached + len(c.tokens), c.path[-1]) for c in going])
            for chain, (token, score) in zip(going, said_by(going, self.run(rows)), strict=True):
                chain.add(token, score)
                chain.sequence.stats.num_draft_passes += 1
                chain.going = chain.going and not self.exit.stops(chain.scores)
        self._ended = self.clock()
        self._seconds = self._ended - began
        return [Draft.chain(c.tokens, self.source, c.scores) if c.tokens else EMPTY for c in chains]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        rows = sum(len(result.argmax) for result in results)
        seconds = StepSeconds(self._seconds, self.clock() - self._ended, rows)
        drafts = [
            Verified(
                result.draft.probabilities[: result.draft.num_candidates],
                len(result.path),
                result.draft.num_candidates == self.most,
            )
            for result in results
            if result.draft.num_candidates
        ]
        self.exit.observe(drafts, seconds)


@dataclass(slots=True)
class Chain:
    """The draft of one sequence while it grows."""

    sequence: Sequence
    most: int
    search: Contenders = contenders
    """How a row is looked through on a CPU."""
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """The chance that the short pass gave to each."""
    path: list[int] = field(init=False)
    """The sequence's tokens (only the last one where no processor looks at them), then the drafted ones."""
    going: bool = field(init=False)
    """It may be extended: it is shorter than `most` and does not end the text."""

    def __post_init__(self) -> None:
        text = self.sequence.tokens
        self.path = text[-1:] if self.sequence.sampling.local else list(text)
        self.going = self.most > 0

    @property
    def place(self) -> int:
        """Where the next token will stand."""
        return len(self.sequence.tokens) + len(self.tokens)

    def extend(self, logits: Tensor) -> int:
        """Add what a row of the short pass says behind the path. Returns the token."""
        token, score = self.said(logits)
        self.add(token, score)
        return token

    def said(self, logits: Tensor) -> tuple[int, float]:
        """What a row of the short pass says behind the path, and the chance that it gives to it."""
        sequence, sampling = self.sequence, self.sequence.sampling
        row = logits if apart(logits) else widened(logits)
        if sampling.plain:
            token = int(row.argmax())
        else:
            scores = process(logits, sampling, self.path, sequence.prompt_length, sequence.stop_ids)
            token = choose(scores, sampling, sequence.seed, self.place, self.search)
        return token, float(row.float().softmax(-1)[token]) if isinstance(row, Tensor) else chance(row, token)

    def add(self, token: int, score: float) -> None:
        """The chain goes on with this token."""
        self.tokens.append(token)
        self.scores.append(score)
        self.path.append(token)
        ended = token in self.sequence.stop_ids and not self.sequence.sampling.ignore_eos
        self.going = len(self.tokens) < self.most and not ended


def chance(row: Scores, token: int) -> float:
    """The probability of `token` under the softmax of a row."""
    weights = np.exp(row - row.max())
    return float(weights[token] / weights.sum())


def said_by(chains: SequenceOf[Chain], logits: Tensor) -> list[tuple[int, float]]:
    """What the short pass says behind every chain, and how likely it holds that: of a device all in one wait.

    Errors: EngineError where the options of a request ban every token.
    """
    if not apart(logits):
        return [chain.said(row) for chain, row in zip(chains, logits, strict=True)]
    asked = [Asked(chain.sequence.sampling, chain.sequence.seed, [chain.place]) for chain in chains]
    found = told.tell(logits, asked, chances=True)
    if NOTHING in found.chosen:
        raise EngineError(NOTHING_LEFT)
    rows = zip(chains, found.chosen, found.chances, logits, strict=True)
    return [chain.said(row) if token == UNSAID else (max(token, 0), score) for chain, token, score, row in rows]
