"""What the target chooses: a deterministic function of (logits, sampling, the row's own path, position).

Greedy: argmax, ties to the lowest id. Sampling: constraints, penalties, temperature, top-k, top-p, min-p, then
Gumbel-max with keyed noise, which draws from the softmax of what survived (Gumbel 1954).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selfdraft.core.noise import gumbel_at
from selfdraft.core.one_row import BANNED, Contenders, apart, contenders, cooled, drawn, leading, widened
from selfdraft.errors import EngineError
from selfdraft.types import Logprob, SamplingParams

NOTHING = -2
"""Stands for the choice where every token is banned."""
NOTHING_LEFT = "every token is banned here; loosen allowed_token_ids, bad_words, logit_bias or the processors"


def choose(scores: Tensor, sampling: SamplingParams, seed: int, position: int, search: Contenders = contenders) -> int:
    """The token the target says, from processed scores [vocab]; `position` is where the token will stand.

    `search` looks for it on a CPU. Errors: EngineError when the options of the request ban every token.
    """
    if not apart(scores):
        row = scores.numpy()
        token = int(row.argmax()) if sampling.greedy else drawn(row, seed, position, search)
        if token is None or row[token] == BANNED:
            raise EngineError(NOTHING_LEFT)
        return token
    noisy = scores if sampling.greedy else _noisy(scores[None], [(seed, position)])[0]
    best = noisy.max(-1)
    if best.values == BANNED:
        raise EngineError(NOTHING_LEFT)
    return int(best.indices)


def choose_rows(logits: Tensor, sampling: SamplingParams, places: Sequence[tuple[int, int]]) -> Tensor:
    """What the target says at every row of raw logits [n, vocab]: ids [n], NOTHING where every token is banned.

    Just what `process` and `choose` say row by row, for a sampling that looks at the row alone
    (`SamplingParams.local`); nothing here makes the host wait for its device. `places`: (seed, position) of each row.
    """
    scores = score_rows(logits, sampling)
    if not sampling.greedy:
        scores = _noisy(scores, places)
    best = scores.max(-1)  # of equals the first
    return best.indices.masked_fill(best.values == BANNED, NOTHING)


def _noisy(scores: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """Scores [n, vocab] with the noise of `places`, float64; of those that are not finite -inf."""
    ids = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return torch.where(torch.isfinite(scores), scores.double() + gumbel_at(places, ids), BANNED)


def score_rows(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """What `process` says of rows of raw logits [n, vocab], for a sampling that looks at the row alone: [n, vocab]."""
    return _cooled(_biased(logits, sampling), sampling)


def process(
    logits: Tensor, sampling: SamplingParams, path: Sequence[int], prompt_length: int, ends: frozenset[int]
) -> Tensor:
    """Scores [vocab] out of raw logits [vocab] for the row whose own path (prompt and output) is `path`.

    `ends` are the ids that end the output; they stay banned until `min_tokens`. Banned tokens score -inf. Where the
    sampling looks at the row alone (`SamplingParams.local`) the path may be left out.
    Processors see a copy: the logits of other readers never change.
    """
    scores = _constrain(_biased(logits, sampling), sampling, path, prompt_length, ends)
    scores = _penalise(scores, sampling, path, prompt_length)
    for processor in sampling.logits_processors:
        scores = _checked(processor(path, scores), scores)
    return _cooled(scores, sampling)


def _biased(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Scores [..., vocab], a copy: only the allowed tokens, with their biases."""
    if apart(logits):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    else:
        scores = torch.from_numpy(np.array(widened(logits)))
    if sampling.allowed_token_ids is not None:
        allowed = torch.tensor(sampling.allowed_token_ids, device=scores.device)
        scores = torch.full_like(scores, BANNED).index_copy_(-1, allowed, scores.index_select(-1, allowed))
    for token, bias in sampling.logit_bias.items():
        scores[..., token] += bias
    return scores


def _cooled(scores: Tensor, sampling: SamplingParams) -> Tensor:
    """Scores [..., vocab] at the temperature, truncated; those of a greedy request as they are."""
    if sampling.greedy:
        return scores
    if not apart(scores) and scores.dim() == 1:
        return torch.from_numpy(cooled(scores.numpy(), sampling))
    # the best score becomes 0, so that no temperature however small lifts it to infinity
    coolest = max(sampling.temperature, torch.finfo(scores.dtype).tiny)
    return _truncate((scores - scores.amax(-1, keepdim=True)) / coolest, sampling)


def _checked(returned: Tensor, given: Tensor) -> Tensor:
    """What a processor returned. Errors: EngineError unless it is one score, and no NaN, for every token."""
    if not isinstance(returned, Tensor) or returned.shape != given.shape:
        what = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise EngineError(f"a logits processor returned {what} instead of a tensor of {tuple(given.shape)} scores")
    row = returned if apart(returned) else widened(returned)
    if (best := row.max()) != best:  # NaN is more than any number
        raise EngineError("a logits processor returned NaN; return -inf for tokens that must not come")
    return row if isinstance(row, Tensor) else torch.from_numpy(row)


def _constrain(
    scores: Tensor, sampling: SamplingParams, path: Sequence[int], prompt_length: int, ends: frozenset[int]
) -> Tensor:
    written = len(path) - prompt_length
    for word in sampling.bad_words_ids:
        before = len(word) - 1
        if before <= written and tuple(path[len(path) - before :]) == word[:-1]:
            scores[word[-1]] = BANNED
    if sampling.min_tokens and written < sampling.min_tokens and ends:
        scores[list(ends)] = BANNED
    return scores


def _penalise(scores: Tensor, sampling: SamplingParams, path: Sequence[int], prompt_length: int) -> Tensor:
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(path)), device=scores.device)
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(path[prompt_length:])
        if counts:
            tokens = torch.tensor(list(counts), device=scores.device)
            times = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return scores


def _truncate(scores: Tensor, sampling: SamplingParams) -> Tensor:
    """Top-k, top-p and min-p of scores [..., vocab], in this order; tokens outside score -inf, and one always stays."""
    if 0 < sampling.top_k < scores.shape[-1]:
        kept = scores.topk(sampling.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < kept, BANNED)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        chances = ordered.double().softmax(-1)
        before = chances.cumsum(-1) - chances
        outside = before >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), BANNED)
    if sampling.min_p > 0.0:
        chances = scores.double().softmax(-1)
        scores = scores.masked_fill(chances < sampling.min_p * chances.amax(-1, keepdim=True), BANNED)
    return scores


def logprob(logits: Tensor, token: int, count: int) -> Logprob:
    """Log-probability of `token` and of the `count` likeliest tokens under the raw logits [vocab]."""
    logs = torch.from_numpy(widened(logits.cpu())).log_softmax(-1).numpy()
    best = leading(logs, count)
    return Logprob(token, float(logs[token]), tuple(zip(best.tolist(), logs[best].tolist(), strict=True)))
