"""When a draft ends: rules that stop drafting after a token the drafter is not sure of. They never touch the text.

Each is asked after every drafted token and shown every verified draft; its state lives on from request to request.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.drafting.cost_model import Throughput
from selfdraft.drafting.estimators import TRUSTED, Mean, StepTime

BINS = 10
"""Confidences are calibrated in 10 classes."""
AGREED = 0.8
"""A rounded copy is thought to say what the model says at least so often, until it was seen. It was 0.86 to 0.92 where
a 4-bit copy of SmolLM2 was least sure of a token (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A draft after its verification: the confidence of every token, and how many were accepted."""

    confidences: tuple[float, ...]
    accepted: int
    capped: bool
    """It ended at its length limit."""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Where a step's time went. `rows`: rows of the target's pass, all sequences together."""

    drafting: float
    verifying: float
    rows: int


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

    def stops(self, confidences: SequenceOf[float]) -> bool:
        """Whether a draft with tokens of these confidences ends here."""
        return confidences[-1] < self.value

    def observe(self, drafts: Iterable[Verified], seconds: StepSeconds) -> None:
        for draft in drafts:
            self.update(draft.accepted / len(draft.confidences), capped=draft.capped)

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


@dataclass(slots=True)
class Confidence:
    """How often a token was accepted, all before it being accepted, by the chance that the drafter gave to it.

    At first a chance is believed; with `least` it is thought to lie between that and 1, in the same order.
    """

    least: float = 0.0
    acceptance: Mean = field(default_factory=lambda: Mean(0.8, 4.0))
    bins: list[Mean] = field(init=False)

    def __post_init__(self) -> None:
        stated = [(place + 0.5) / BINS for place in range(BINS)]
        self.bins = [Mean(self.least + (1 - self.least) * chance, 4.0, 0.995) for chance in stated]

    def chance(self, confidence: float) -> float:
        """Calibrated chance that a token of this confidence is accepted, all before it being accepted."""
        return self._bin(confidence).value

    def path(self, confidences: SequenceOf[float]) -> float:
        """Calibrated chance that tokens of these confidences are all accepted."""
        path = 1.0
        for confidence in confidences:
            path *= self.chance(confidence)
        return path

    def observe(self, confidences: SequenceOf[float], accepted: int) -> None:
        """Book a chain whose first `accepted` tokens were right."""
        for i, confidence in enumerate(confidences[: accepted + 1]):
            self._bin(confidence).observe(float(i < accepted))
            self.acceptance.observe(float(i < accepted))

    def _bin(self, confidence: float) -> Mean:
        return self.bins[min(int(confidence * BINS), BINS - 1)]


@dataclass(slots=True)
class ThroughputExit:
    """Drafting stops when the next token is expected to bring less than it costs; no target rate is needed.

    Maximises tokens per second, E / (m c + t_v), by its margin: with rho tokens per second, one more link pays iff its
    chance to be accepted exceeds rho times its seconds (renewal-reward). The chance of the path so far is the product
    of calibrated confidences, that of the next token the running acceptance; so the draft ends when the path's chance
    falls below `value` = rho * (seconds of a link and of a row) / acceptance, clamped to [0, 1].
    """

    value: float
    """The least chance of a path that is still extended; the given one until enough steps were seen."""
    links: Mean = field(default_factory=Mean)
    """Seconds of a drafting link."""
    steps: StepTime = field(default_factory=StepTime)
    """Seconds of verification, by rows."""
    throughput: Throughput = field(default_factory=Throughput)
    confidence: Confidence = field(default_factory=Confidence)

    def stops(self, confidences: SequenceOf[float]) -> bool:
        """Whether a draft with tokens of these confidences ends here."""
        return self.confidence.path(confidences) < self.value

    def observe(self, drafts: Iterable[Verified], seconds: StepSeconds) -> None:
        """Book one step of all its drafts."""
        drafts = list(drafts)
        count = sum(len(draft.confidences) for draft in drafts)
        if not count:
            return
        for draft in drafts:
            self.confidence.observe(draft.confidences, draft.accepted)
        self.links.observe(seconds.drafting / count)
        self.steps.observe(seconds.rows, seconds.verifying)
        self.throughput.observe(sum(draft.accepted + 1 for draft in drafts), seconds.drafting + seconds.verifying)
        if self.steps.steps >= TRUSTED:
            cost = self.throughput.cost(self.links.value + self.steps.per_row)
            self.value = min(1.0, max(0.0, cost / self.confidence.acceptance.value))
