"""Recorded answers, said by a model of random weights: its passes cost what they cost, its text is the recorded one.

After each pass the recorded next token is made the likeliest on every row whose path is a beginning of the recorded
text. Engine, drafters and verification are untouched, so as many tokens are accepted as when the answer was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from gpu_runs.bench import Bench, Timed
from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import ROOT
from selfdraft.drafters import build
from selfdraft.drafting.cost_model import Profile
from selfdraft.engine.engine import Engine
from selfdraft.files.token_log import Logged
from selfdraft.models.target import HFTarget
from selfdraft.protocols import DraftExtras
from selfdraft.replay.replay import LogTarget, open_drafter, replay
from selfdraft.types import PassVariant, SamplingParams

CERTAIN = 1e4
"""What is added to the logit of the recorded token: far more than any logit, and a number in every type."""
NODES, CHUNK = 64, 2048
"""Most candidates of a step, and tokens of one piece of a prompt."""


class Forced:
    """A target that says recorded answers. `clock` is what drafters read; see `selfdraft.protocols.Target`."""

    def __init__(self, target: HFTarget, clock: Callable[[], float], profile: Profile | None) -> None:
        self.target = target
        self.extras: DraftExtras = replace(target.extras, clock=clock, pass_cost=profile)
        self.vocab, self.num_mask_ids, self.max_length = target.vocab, target.num_mask_ids, target.max_length
        self.keep, self.reuse, self.next_boundary = target.keep, target.reuse, target.next_boundary
        self.answers: dict[Sequence, tuple[int, ...]] = {}

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        logits = self.target.forward(rows, short)
        places, tokens = self.next_tokens(rows)
        if places:
            sent = torch.tensor([places, tokens]).to(logits.device)
            logits.index_put_((sent[0], sent[1]), logits.new_tensor(CERTAIN), accumulate=True)
        return logits

    def next_tokens(self, rows: Rows) -> tuple[list[int], list[int]]:
        """Rows of the answers that stand on the recorded text, and the token that comes behind each."""
        running = {sequence.slot: answer for sequence, answer in self.answers.items() if not sequence.finished}
        prompts = {sequence.slot: sequence.prompt_length for sequence in self.answers if not sequence.finished}
        places: list[int] = []
        tokens: list[int] = []
        first = 0
        for span in rows.spans:
            if span.num_logits:
                answer = running[span.slot]
                said = span.base + span.pending - prompts[span.slot]  # tokens of the answer that are known
                if said < len(answer):
                    places.append(first)
                    tokens.append(answer[said])
                on_text = {ROOT}
                for node in range(span.draft.num_candidates):
                    depth = said + span.draft.depths[node]
                    if span.draft.parents[node] in on_text and depth <= len(answer):
                        if span.draft.tokens[node] != answer[depth - 1]:
                            continue
                        on_text.add(node)
                        if depth < len(answer):
                            places.append(first + 1 + node)
                            tokens.append(answer[depth])
            first += span.num_logits
        return places, tokens


@dataclass
class Speed:
    """What decoding recorded answers took. Steps with a piece of a prompt in them are left out."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    pass_seconds: float = 0.0
    """Of these, those in which the device ran the replayed passes."""
    accepted: list[list[int]] = field(default_factory=list)
    """For every request, accepted tokens of each step that wrote some."""
    equal: bool = True
    """Whether the texts are the recorded ones."""
    readings: list[float] = field(default_factory=list)
    """What the drafter's clock said, in order."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def host_share(self) -> float:
        """Share of a step in which no pass ran."""
        return 1 - self.pass_seconds / self.seconds if self.seconds else 0.0


def decode_forced(
    bench: Bench, target: HFTarget, notes: Timed, requests: SequenceOf[Logged], drafter: str,
    options: dict[str, object], *, profile: Profile | None, slots: int = 1, temperature: float = 0.0,
) -> Speed:  # fmt: skip
    """Decode all requests to their recorded ends, `slots` at a time."""
    found = Speed()

    def clock() -> float:
        found.readings.append(bench.clock())
        return found.readings[-1]

    forced = Forced(target, clock, profile)
    engine = Engine(forced, build(drafter, forced, options), slots=slots, chunk=CHUNK, rows=2 * CHUNK, nodes=NODES)
    counts: dict[Sequence, list[int]] = {}
    written: dict[Sequence, int] = {}
    for seed, logged in enumerate(requests):
        sampling = SamplingParams(max_tokens=len(logged.output), temperature=temperature, ignore_eos=True)
        one = open_sequence(logged.prompt, sampling, seed=seed, eos=frozenset(), context=target.max_length)
        forced.answers[one] = logged.output
        counts[one], written[one] = [], 0
        engine.submit(one)
    while engine.waiting or engine.running:
        decodes = bool(engine.running) and all(written[one] for one in engine.running) and not _joins(engine, slots)
        bench.wait()
        notes.seconds()
        began = bench.clock()
        results = engine.advance()
        bench.wait()
        seconds, passes, brought = bench.clock() - began, notes.seconds(), 0
        for one, result in results:
            new = one.num_output_tokens - written[one]
            if new:
                counts[one].append(min(new, len(result.path)))
            brought, written[one] = brought + new, one.num_output_tokens
        if decodes:
            found.tokens, found.steps = found.tokens + brought, found.steps + 1
            found.seconds, found.pass_seconds = found.seconds + seconds, found.pass_seconds + passes
    found.accepted = list(counts.values())
    found.equal = all(one.output == list(answer) for one, answer in forced.answers.items())
    return found


def _joins(engine: Engine, slots: int) -> bool:
    """Whether the next step begins a request."""
    return bool(engine.waiting) and len(engine.running) < slots


def replayed_counts(
    target: HFTarget, requests: SequenceOf[Logged], drafter: str, options: dict[str, object], live: Speed,
    profile: Profile | None,
) -> list[int]:  # fmt: skip
    """Accepted tokens of every step as `selfdraft replay` counts them, its drafter reading the live one's clock."""
    bounded = [replace(one, edge=target.next_boundary(0), context=target.max_length, chunk=CHUNK) for one in requests]
    log = LogTarget()
    readings = iter(live.readings)
    last = live.readings[-1] if live.readings else 0.0
    log.extras = DraftExtras(lambda: next(readings, last), profile)
    return replay(bounded, open_drafter(drafter, options, log), NODES, target=log, now=lambda: 0.0).accepted


def flat(counts: SequenceOf[SequenceOf[int]]) -> list[int]:
    return [*chain.from_iterable(counts)]
