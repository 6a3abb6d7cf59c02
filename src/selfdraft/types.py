"""Frozen values that travel between the rooms. Validated where they are made; never changed afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from selfdraft.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
StoppingCriterion = Callable[[Sequence[int]], bool]
"""(tokens: prompt and output so far) -> whether to stop here; asked after every token."""
LogitsProcessor = Callable[[Sequence[int], "Tensor"], "Tensor"]
"""(tokens of this row's own path: prompt and output, logits [vocab]) -> logits [vocab]; must not keep state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the target chooses. Every option is honoured exactly, with every drafter.

    The order is that of transformers: constraints, penalties, user processors, temperature, top-k, top-p, min-p.
    Errors: OptionError names the option, the value and its limits.
    """

    temperature: float = 0.0
    """0 is greedy; ties go to the lowest token id."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token in the prompt or output (CTRL, section 4.1)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Taken from the logit once per occurrence in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    """Words that must not appear in the output; the front door turns them into `bad_words_ids`."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear in the output."""
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    """No end-of-sequence and no stop before this many output tokens."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    """None draws a fresh seed per request; the same seed gives the same text with every drafter."""
    n: int = 1
    """Independent answers per prompt; answer i uses seed + i."""
    logprobs: int | None = None
    """Report log-probabilities of the raw logits: the chosen token's and the N likeliest."""
    prediction: str | tuple[int, ...] = ()
    """What the answer is expected to resemble, as text (the front door encodes it) or token ids.

    A guess for the drafters `prediction` and `merged`, like OpenAI's predicted outputs; it never changes the text.
    """
    logits_processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors", "stopping_criteria"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "bad_words_ids", tuple(tuple(word) for word in self.bad_words_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if not isinstance(self.prediction, str):
            object.__setattr__(self, "prediction", tuple(self.prediction))
        self._check()

    def _check(self) -> None:
        within("temperature", self.temperature, 0.0, math.inf)
        within("top_k", self.top_k, 0, 2**31)
        within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        within("min_p", self.min_p, 0.0, 1.0)
        within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        within("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        within("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        within("min_tokens", self.min_tokens, 0, 2**31)
        within("max_tokens", self.max_tokens, 1, 2**31)
        within("n", self.n, 1, 64)
        if self.seed is not None:
            within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            within("logprobs", self.logprobs, 0, 100)
        if self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if any(not text for text in self.stop):
            raise OptionError("stop holds an empty string; it would stop before the first token")
        if any(not word for word in self.bad_words_ids) or any(not word.strip() for word in self.bad_words):
            raise OptionError("bad_words holds an empty word")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise OptionError("allowed_token_ids is empty; give at least one token id or None")
        for token, bias in self.logit_bias.items():
            within(f"logit_bias[{token}]", bias, -math.inf, math.inf)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """True when the target's choice is the argmax of the raw logits, whatever came before."""
        return self.greedy and not (
            self.logit_bias
            or self.bad_words
            or self.bad_words_ids
            or self.allowed_token_ids is not None
            or self.min_tokens
            or self.logits_processors
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )


DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Types that a model can be loaded in."""


def check_dtype(name: str) -> None:
    """Errors: OptionError when `name` is neither 'auto' nor in DTYPES."""
    if name != "auto" and name not in DTYPES:
        raise OptionError(f"dtype {name!r} is unknown; there are auto, {', '.join(DTYPES)}")


def within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise OptionError unless low <= value <= high (low < value when `open_low`) and value is a number."""
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise OptionError(f"{name}={value!r} is not a number")
    if isinstance(low, int) and not isinstance(value, int):
        raise OptionError(f"{name}={value!r} is not a whole number")
    if value < low or value > high or (open_low and value == low) or math.isinf(value):
        ends = f"{'above' if open_low else 'at least'} {low}"
        ends += "" if high in (math.inf, 2**31) else f", at most {high}"
        raise OptionError(f"{name}={value!r} is out of range: it must be {ends}")


@dataclass(frozen=True, slots=True)
class Skip:
    """Sublayers left out of a drafting pass: indices of blocks whose attention or MLP is bypassed.

    Source: Draft & Verify (arXiv 2309.08168), section 3.1: every sublayer is a switch of its own.
    """

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    @property
    def first(self) -> int:
        """The first block that is not whole; blocks before it compute what the target computes."""
        return min(self.attention | self.mlp, default=0)


@dataclass(frozen=True, slots=True)
class Rounded:
    """All sublayers in a drafting pass, with the weights of their linear layers rounded to so many bits.

    Source: ML-SpecQD (arXiv 2503.13565), SubSpec (arXiv 2509.18344): a rounded copy of the same weights drafts.
    """

    bits: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise OptionError(f"bits={self.bits!r}: weights are rounded to 4 or 8 bits")


Short = Skip | Rounded
"""How a drafting pass is made cheaper than a whole one."""


def middle(layers: int, width: int) -> Skip:
    """The symmetric middle range of S3D (arXiv 2405.20314): `width` whole blocks out of `layers`, the first ones kept.

    Errors: OptionError when no block would be left, or none skipped.
    """
    within("skip_width", width, 1, layers - 1)
    first = (layers - width + 1) // 2
    return Skip(frozenset(range(first, first + width)), frozenset(range(first, first + width)))


Clock = Callable[[], float]
"""Seconds since some moment; only differences count."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How large one sequence's draft may be in this step."""

    nodes: int
    """Most candidate nodes."""
    depth: int
    """Deepest candidate (1 = directly under the last token); deeper ones could not be accepted."""
    reach: int
    """Deepest probe: positions the model has."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probabilities at one output token, of the raw logits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Stats:
    """Counts of one request or of a whole run; names as in vLLM's `metrics.speculative_decoding`."""

    num_spec_steps: int = 0
    """Steps that verified at least one draft token."""
    num_steps: int = 0
    """Decode steps: forwards of the target that emitted tokens, the one that ends the prefill included."""
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_passes: int = 0
    """Drafting passes through (part of) the model, for methods that have their own."""
    acceptance_histogram: dict[int, int] = field(default_factory=dict)
    """Accepted draft tokens in a step -> number of steps."""

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per step, the bonus token counted; plain decoding has 1."""
        return self.num_output_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def count(self, drafted: int, accepted: int, emitted: int) -> None:
        """Book one step of `drafted` candidates, `accepted` of them kept, `emitted` tokens."""
        self.num_steps += 1
        self.num_output_tokens += emitted
        self.num_draft_tokens += drafted
        self.num_accepted_draft_tokens += accepted
        if drafted:
            self.num_spec_steps += 1
            self.acceptance_histogram[accepted] = self.acceptance_histogram.get(accepted, 0) + 1

    def add(self, other: Stats) -> None:
        """Add the counts of another run to these."""
        for name in ("num_spec_steps", "num_steps", "num_draft_tokens", "num_accepted_draft_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.num_output_tokens += other.num_output_tokens
        self.num_draft_passes += other.num_draft_passes
        for accepted, steps in other.acceptance_histogram.items():
            self.acceptance_histogram[accepted] = self.acceptance_histogram.get(accepted, 0) + steps

    def as_dict(self) -> dict[str, object]:
        return {
            "mean_acceptance_length": round(self.mean_acceptance_length, 4),
            "draft_acceptance_rate": round(self.draft_acceptance_rate, 4),
            "num_spec_steps": self.num_spec_steps,
            "num_steps": self.num_steps,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_draft_tokens": self.num_accepted_draft_tokens,
            "num_output_tokens": self.num_output_tokens,
            "num_draft_passes": self.num_draft_passes,
            "acceptance_histogram": dict(sorted(self.acceptance_histogram.items())),
        }
