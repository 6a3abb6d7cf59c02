"""Frozen values that travel between the rooms. Validated where they are made; never changed afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from selfdraft.errors import OptionError, shown

if TYPE_CHECKING:
    from torch import Tensor

JsonObject = dict[str, Any]
"""An object of JSON, in a file or from a process: whoever reads a field knows its kind, or checks it."""
FinishReason = Literal["stop", "length", "abort"]
Quantization = Literal["auto", "none", "int8", "int4"]
"""What a model's weights run as: a GGUF file's own blocks and everything else as it is (auto), floats, or blocks."""
StoppingCriterion = Callable[[Sequence[int]], bool]
"""(tokens: prompt and output so far) -> whether to stop here; asked after every token."""
LogitsProcessor = Callable[[Sequence[int], "Tensor"], "Tensor"]
"""(tokens of this row's own path: prompt and output, logits [vocab]) -> logits [vocab]; must not keep state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the target chooses. Every option is honoured exactly, with every drafter.

    The order is that of transformers: constraints, penalties, user processors, temperature, top-k, top-p, min-p.
    None stands for an option's default; one text, id or function for a list of it; numbers may be numpy's or torch's.
    Errors: OptionError names the option, the value and its limits.
    """

    temperature: float = 0.0
    """0 is greedy; ties go to the lowest token id."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
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
    """Added to the logits of these token ids; -inf bans one. Ids may be texts, as JSON has them."""
    bad_words: tuple[str, ...] = ()
    """Words that must not appear in the output; the front door turns them into `bad_words_ids`.

    As in vLLM, a word is its own tokens: a longer token that holds it, such as one of several line ends, may come.
    """
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear in the output."""
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    """No end-of-sequence and no stop before this many output tokens."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts to end before. One that is a special token of the tokenizer ends at that token, which has no text."""
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
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
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None:
                value = one.default if one.default_factory is MISSING else one.default_factory()
            if value is not None:
                value = _READERS[one.name](one.name, value)
            object.__setattr__(self, one.name, value)
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
        if any(not word for word in self.bad_words_ids) or any(not word for word in self.bad_words):
            raise OptionError("bad_words holds an empty word")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise OptionError("allowed_token_ids is empty; give at least one token id or None")
        for token, bias in self.logit_bias.items():
            if bias == math.inf:
                raise OptionError(f"logit_bias[{token}]=inf is out of range: give a finite number, or -inf to ban it")
            if bias != -math.inf:
                within(f"logit_bias[{token}]", bias, -math.inf, math.inf)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """True when the target's choice is the argmax of the raw logits, whatever came before."""
        return self.greedy and self.unbiased

    @property
    def unbiased(self) -> bool:
        """True when no token is favoured or banned: the likelier of two by the raw logits stays the likelier."""
        return self.local and not self.logit_bias and self.allowed_token_ids is None

    @property
    def local(self) -> bool:
        """True when the target's choice follows from the raw logits of a row and its position, whatever came before."""
        return not (
            self.bad_words
            or self.bad_words_ids
            or self.min_tokens
            or self.logits_processors
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )


def bare(value: object) -> object:
    """A number of numpy or torch as Python's own; everything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _real(name: str, value: object) -> float:
    number = bare(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise OptionError(f"{name}={shown(value)} is not a number")
    return number


def _whole(name: str, value: object) -> int:
    number = _real(name, value)
    if not isinstance(number, int):
        raise OptionError(f"{name}={shown(value)} is not a whole number")
    return number


def flag(name: str, value: object) -> bool:
    """An option that is True or False. Errors: OptionError when it is something else."""
    given = bare(value)
    if not isinstance(given, bool):
        raise OptionError(f"{name}={shown(value)} is neither True nor False")
    return given


def _items(name: str, value: object, taken: str) -> list[object]:
    """What a list holds. Errors: OptionError when it is none."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise OptionError(f"{name}={shown(value)}: give {taken}")
    return [bare(item) for item in value]


def _top_k(name: str, value: object) -> int:
    """As `_whole`; -1 keeps all, as 0 does: so vLLM's users write it."""
    found = _whole(name, value)
    return 0 if found == -1 else found


def _texts(name: str, value: object) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else _items(name, value, "a text or a list of texts")
    for item in found:
        if not isinstance(item, str):
            raise OptionError(f"{name} holds {shown(item)}, which is no text: give a text or a list of texts")
    return tuple(map(str, found))


def _ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids; one id stands for a list of it. Whether the model has them is checked where the model is known."""
    one = bare(value)
    found = [one] if isinstance(one, int) else _items(name, value, "token ids: a list of whole numbers")
    return tuple(_whole(f"{name}[{place}]", item) for place, item in enumerate(found))


def _id_lists(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    found = _items(name, value, "a list with a list of token ids for each word")
    for item in found:
        if isinstance(item, int):
            raise OptionError(f"{name} holds the number {item}: give a list of token ids for each word, as in [[5, 6]]")
    return tuple(_ids(f"{name}[{place}]", item) for place, item in enumerate(found))


def _biases(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={shown(value)}: give a dict of token ids and what is added to their logits")
    found: dict[int, float] = {}
    for key, bias in value.items():
        token = bare(key)
        if isinstance(token, str) and token.strip().isdecimal() and len(token) < 20:
            token = int(token)
        if isinstance(token, bool) or not isinstance(token, int):
            raise OptionError(f"{name} holds {shown(key)}, which is no token id: keys are whole numbers")
        if token in found:
            raise OptionError(f"{name} holds token id {token} twice, as a number and as a text: leave out one of them")
        found[token] = _real(f"{name}[{token}]", bias)
    return found


def _prediction(name: str, value: object) -> str | tuple[int, ...]:
    return value if isinstance(value, str) else _ids(name, value)


def _functions(name: str, value: object) -> tuple[Callable[..., object], ...]:
    # transformers' lists of processors are lists that can be called, too: what they hold is meant
    found = (
        [value] if callable(value) and not isinstance(value, Iterable) else _items(name, value, "a function or a list")
    )
    for item in found:
        if not callable(item):
            raise OptionError(f"{name} holds {shown(item)}, which cannot be called: give a function or a list of them")
    return tuple(item for item in found if callable(item))


_READERS: dict[str, Callable[[str, object], object]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), _real),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _real),
    "top_k": _top_k,
    **dict.fromkeys(("min_tokens", "max_tokens", "seed", "n", "logprobs"), _whole),
    **dict.fromkeys(("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"), flag),
    **dict.fromkeys(("stop", "bad_words"), _texts),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), _ids),
    **dict.fromkeys(("logits_processors", "stopping_criteria"), _functions),
    "bad_words_ids": _id_lists,
    "logit_bias": _biases,
    "prediction": _prediction,
}
"""How each option of `SamplingParams` is read: as a person means it, or an OptionError that says what was given."""


DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Types that a model can be loaded in."""


def check_dtype(name: str) -> None:
    """Errors: OptionError when `name` is neither 'auto' nor in DTYPES."""
    if name != "auto" and name not in DTYPES:
        raise OptionError(f"dtype {name!r} is unknown; there are auto, {', '.join(DTYPES)}")


def check_device(name: str) -> None:
    """Errors: OptionError for a name of a device that is not offered."""
    if name in ("auto", "cpu", "cuda") or (name.startswith("cuda:") and name[5:].isdecimal() and len(name) < 9):
        return
    way = "; a loaded transformers model may lie elsewhere, such as on 'mps', and runs there on the plain path"
    raise OptionError(f"device {shown(name)} is unknown; there are auto, cpu, cuda and cuda:NUMBER{way}")


def check_quantization(name: str) -> Quantization:
    """The option, checked. Errors: OptionError."""
    for known in get_args(Quantization):
        if name == known:
            found: Quantization = known
            return found
    raise OptionError(f"quantization={shown(name)} is unknown; there are {', '.join(get_args(Quantization))}")


def within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise OptionError unless low <= value <= high (low < value when `open_low`) and value is a number."""
    _real(name, value)
    if isinstance(low, int):
        _whole(name, value)
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.copysign(math.inf, 1 if value > 0 else -1)
    if math.isnan(number):
        raise OptionError(f"{name}={value!r} is not a number")
    if value < low or value > high or (open_low and value == low) or math.isinf(number):
        ends = "" if math.isinf(low) else f"{'above' if open_low else 'at least'} {low}"
        if math.isinf(number):
            ends = f"finite, {ends}" if ends else "finite"
        ends += "" if math.isinf(high) or (high == 2**31 and value <= high) else f", at most {high}"
        raise OptionError(f"{name}={shown(value)} is out of range: it must be {ends}")


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
    """All sublayers in a drafting pass, with the weights of their linear layers rounded to `bits` bits.

    Source: ML-SpecQD (arXiv 2503.13565), SubSpec (arXiv 2509.18344): a rounded copy of the same weights drafts.
    """

    bits: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise OptionError(f"bits={self.bits!r}: weights are rounded to 4 or 8 bits, a whole number")


PassVariant = Skip | Rounded
"""How a drafting pass is made cheaper than a whole one."""


def middle(layers: int, width: int) -> Skip:
    """The symmetric middle range of S3D (arXiv 2405.20314): `width` whole blocks out of `layers`, the first ones kept.

    Errors: OptionError when no block would be left, or none skipped.
    """
    within("skip_width", width, 1, layers - 1)
    first = (layers - width + 1) // 2
    return Skip(frozenset(range(first, first + width)), frozenset(range(first, first + width)))


def usual_widths(layers: int) -> tuple[int, ...]:
    """Widths of S3D's skipped middle that are tried or trained unless told otherwise: a third, a half, two thirds."""
    return tuple(sorted({max(1, layers // 3), max(1, layers // 2), max(1, 2 * layers // 3)}))


def comma_separated(text: str) -> list[str]:
    """The parts of a list with commas, without blanks around them; empty ones are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


Clock = Callable[[], float]
"""Seconds since some moment; only differences count."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How large one sequence's draft may be in this step."""

    max_nodes: int
    """Most candidate nodes."""
    max_depth: int
    """Deepest candidate (1 = directly under the last token); deeper ones could not be accepted."""
    max_probe_depth: int
    """Deepest probe: positions the model has."""
    chain: bool = False
    """Only one path can be run: of siblings the first one stays."""
    prefill_rows: int = 0
    """Rows of other sequences' prompts that are read in the same pass: beside them a row may be dearer."""


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
    num_cached_tokens: int = 0
    """Prompt tokens that an earlier request had prefilled."""
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
        self.num_cached_tokens += other.num_cached_tokens
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
            "num_cached_tokens": self.num_cached_tokens,
            "acceptance_histogram": dict(sorted(self.acceptance_histogram.items())),
        }
