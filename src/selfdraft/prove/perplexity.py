"""Perplexity of a model as it is run here, over windows of a text, alone or beside a second model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from math import exp, sqrt

import torch
from torch import Tensor

from selfdraft.core.rows import text_rows
from selfdraft.core.verify import argmaxes
from selfdraft.errors import EngineError, OptionError, RequestError
from selfdraft.models.reference import Tokenizer
from selfdraft.protocols import Target

PIECE = 128
"""Rows of one pass: in float32 their logits over 49,152 tokens take 24 MiB."""
CHARACTERS = 64
"""Characters of a text that are read for each wanted token; tokens are shorter than that on average."""
LEAST = 2
"""Tokens of the shortest window: one is read, one predicted."""


@dataclass(slots=True)
class Mean:
    """A mean over tokens and its standard error, out of sums in double precision."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count values [n], any floating type."""
        exact = values.double()
        self.count += exact.numel()
        self.total += float(exact.sum())
        self.squares += float(exact.square().sum())

    @property
    def value(self) -> float:
        """The mean; NaN before anything was counted."""
        return self.total / self.count if self.count else float("nan")

    @property
    def error(self) -> float:
        """Standard error of the mean, tokens taken as independent of one another; 0 of fewer than two."""
        if self.count < 2:
            return 0.0
        spread = max(self.squares / self.count - self.value**2, 0.0)
        return sqrt(spread / (self.count - 1))


@dataclass(slots=True)
class Surprise:
    """Negative log-likelihood of the tokens of a text, in nats, under one model."""

    nats: Mean = field(default_factory=Mean)

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood."""
        return exp(self.nats.value)

    @property
    def error(self) -> float:
        """Standard error of the perplexity, to first order from that of the mean."""
        return self.perplexity * self.nats.error

    def as_dict(self) -> dict[str, object]:
        """The figures for a JSON document, unrounded."""
        return {
            "mean_negative_log_likelihood": self.nats.value,
            "perplexity": self.perplexity,
            "perplexity_error": self.error,
        }


@dataclass(slots=True)
class Perplexity:
    """Figures of a model over a text; those of a second model and of the two together stay empty without one."""

    windows: int = 0
    model: Surprise = field(default_factory=Surprise)
    against: Surprise | None = None
    difference: Mean = field(default_factory=Mean)
    """Negative log-likelihood of the model minus that of the second one, token by token."""
    divergence: Mean = field(default_factory=Mean)
    """KL(second model || model) of the next token, in nats."""
    equal_argmax: int = 0
    """Places where both models have the same likeliest token."""

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return self.model.nats.count

    @property
    def percent(self) -> float:
        """How much higher the perplexity is than the second model's, in percent of that."""
        return 100 * (exp(self.difference.value) - 1)

    @property
    def percent_error(self) -> float:
        """Standard error of `percent`: of the paired difference, so much smaller than those of the perplexities."""
        return 100 * exp(self.difference.value) * self.difference.error

    def as_dict(self) -> dict[str, object]:
        """The figures for a JSON document, unrounded."""
        found: dict[str, object] = {"windows": self.windows, "tokens": self.tokens, **self.model.as_dict()}
        if self.against is not None:
            found["against"] = self.against.as_dict()
            found["difference_percent"] = self.percent
            found["difference_percent_error"] = self.percent_error
            found["mean_kl_divergence"] = self.divergence.value
            found["kl_divergence_error"] = self.divergence.error
            found["equal_argmax_share"] = self.equal_argmax / self.tokens
        return found


def tokens_of(tokenizer: Tokenizer, text: str, most: int) -> tuple[list[int], list[int]]:
    """(token ids of a text, the ids that the tokenizer begins every text with: a first token, or none).

    Of a long text only as much is read as `most` tokens surely take.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    added = [int(token) for token in tokenizer("")["input_ids"]]
    begin = added[:1] if added and added[0] == first else []
    ids = tokenizer(text[: CHARACTERS * (most + LEAST)], add_special_tokens=False)["input_ids"]
    return [int(token) for token in ids], begin


def text_perplexity(
    target: Target,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int = 512,
    tokens: int = 20_000,
    against: Target | None = None,
) -> Perplexity:
    """Perplexity of a target over the first `tokens` predicted tokens of a text, read in windows of `window` tokens.

    `llm.target` and `llm.tokenizer` are those of an `LLM`; `against` is a second target with the same tokenizer.
    Each window is read anew: what stands before it is not seen. Slot 0 of the targets is used.
    Errors: OptionError for a window that is too short or longer than the context, RequestError for too short a text,
    EngineError when a model answers NaN.
    """
    ids, begin = tokens_of(tokenizer, text, tokens)
    context = min(one.max_length for one in (target, against) if one is not None)
    windows = windows_of(ids, size=window, most=tokens, context=context, begin=begin)
    return perplexity(target, windows, against=against, known=max(len(begin), 1))


def windows_of(
    tokens: SequenceOf[int], *, size: int, most: int, context: int, begin: SequenceOf[int] = ()
) -> list[list[int]]:
    """Windows that follow one another: each reads `size` tokens at most, and predicts all of them but the first.

    `begin` are tokens that every window begins with (a model's own first token); they count as read. Windows end
    where `most` tokens are predicted; `context` is the most tokens that a model reads.
    Errors: OptionError for a window that is no window or longer than the context; RequestError for too short a text.
    """
    if size > context:
        raise OptionError(f"--window {size} is longer than the context of {context} tokens: give {context} or less")
    least = LEAST + max(len(begin) - 1, 0)
    if size < least:
        raise OptionError(f"--window {size} predicts no token: give {least} or more")
    step = size - len(begin)
    found: list[list[int]] = []
    left = most
    for start in range(0, len(tokens), step):
        window = [*begin, *tokens[start : start + step]][: left + max(len(begin), 1)]
        if len(window) < least:
            break
        found.append(window)
        left -= len(window) - max(len(begin), 1)
        if left < 1:
            break
    if not found:
        count = f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
        needed = LEAST - min(len(begin), 1)
        raise RequestError(f"the text has {count}, and {needed} are the least that predict one: give a longer text")
    return found


def perplexity(
    target: Target,
    windows: SequenceOf[SequenceOf[int]],
    *,
    against: Target | None = None,
    known: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Perplexity of a target over windows of token ids, by its own passes; beside `against`, over the same windows.

    Slot 0 of each target is used, and what it held is gone. The first `known` tokens of a window are read and not
    predicted. `advance` is called after each window. Log-likelihoods are in nats, computed in float32 from the logits
    and summed in double precision.
    Errors: EngineError when a model answers NaN.
    """
    found = Perplexity(against=None if against is None else Surprise())
    for window in windows:
        ids = torch.tensor(window)
        if against is None:
            for start, logits in _answers(target, window, known):
                _count(found, ids[start : start + len(logits)], logits)
        else:
            for (start, logits), (_, other) in zip(
                _answers(target, window, known), _answers(against, window, known), strict=True
            ):
                _count(found, ids[start : start + len(logits)], logits, other)
        found.windows += 1
        advance()
    return found


def _answers(target: Target, window: SequenceOf[int], known: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first predicted token, logits [n, vocab] for it and the next ones), piece by piece.

    A piece ends where the shape of attention changes, as drafts do.
    """
    target.reuse(0, 0, 0)
    base = 0
    while base < len(window) - 1:
        size = min(PIECE, len(window) - 1 - base, target.next_boundary(base) - base)
        logits = target.forward(text_rows(0, base, window[base : base + size]))
        target.keep(0, base, range(size))
        skipped = min(max(known - 1 - base, 0), size)
        if skipped < size:
            yield base + skipped + 1, logits[skipped:]
        base += size


def _count(found: Perplexity, tokens: Tensor, logits: Tensor, other: Tensor | None = None) -> None:
    """Book the tokens [n] that came, by the logits [n, vocab] of one model or of both."""
    mine = torch.log_softmax(logits.float().cpu(), dim=-1)
    nats = -mine.gather(1, tokens[:, None])[:, 0]
    _check(nats)
    found.model.nats.add(nats)
    if other is None or found.against is None:
        return
    theirs = torch.log_softmax(other.float().cpu(), dim=-1)
    their_nats = -theirs.gather(1, tokens[:, None])[:, 0]
    _check(their_nats)
    found.against.nats.add(their_nats)
    found.difference.add(nats.double() - their_nats.double())
    found.equal_argmax += sum(map(int.__eq__, argmaxes(logits), argmaxes(other)))
    # 0 log 0 is 0, where a model rules a token out
    found.divergence.add(torch.nan_to_num(theirs.exp() * (theirs - mine), nan=0.0).sum(dim=-1))


def _check(nats: Tensor) -> None:
    if bool(nats.isnan().any()):
        raise EngineError("the model answered NaN; try a wider dtype, or check the checkpoint")
