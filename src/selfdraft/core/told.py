"""All that a step wants to know of its logits, as one table of numbers: the host waits for its device once.

On a CPU nothing waits, and only the rows of the walk are looked at (`verify.py`); on any other device all rows are
chosen at once, for a wait costs more than all of it. Both choose alike, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdraft.core.one_row import Top
from selfdraft.core.sampler import choose_rows
from selfdraft.types import SamplingParams

NAN = -1
"""Stands for the best id of scores that hold NaN."""
UNSAID = -3
"""Stands for the choice where the sampling looks at more than the row."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows of one request that lie together: how it chooses, and the positions where the chosen tokens will stand."""

    sampling: SamplingParams
    seed: int
    positions: SequenceOf[int]


@dataclass(frozen=True, slots=True)
class Told:
    """What every row says."""

    best: list[int]
    """Likeliest id, ties to the lowest; NAN where a logit is NaN."""
    chosen: list[int]
    """What the target says; NOTHING where every token is banned, UNSAID where only `process` can tell."""
    chances: list[float]
    """The chance of the chosen (else the best) token under the raw logits; empty unless asked for."""
    top: Top | None
    """The likeliest tokens, if some were asked for."""
    beside: Tensor | None = None
    """What else was asked for, on the CPU."""


def tell(
    logits: Tensor,
    asked: SequenceOf[Asked],
    top: int = 0,
    *,
    chances: bool = False,
    beside: Callable[[Tensor], Tensor | None] | None = None,
) -> Told:
    """What rows of logits [n, vocab] say, fetched at once; `asked` covers the rows in their order.

    `top`: how many likeliest tokens of each row are wanted; `chances`: those of the chosen tokens are wanted, too;
    `beside` is given what every row says [n] (its best id where that is nothing), and its answer, int64 numbers [m] on
    the device or None, is fetched along. Rows are chosen in one call for each way of sampling.
    """
    best = logits.max(-1)
    ids = best.indices.masked_fill(best.values.isnan(), NAN)
    chosen = _choices(logits, asked, ids)
    columns = [ids[:, None], chosen[:, None]]
    count = min(top, logits.shape[1])
    if count:
        likely = logits.topk(count)
        columns += [likely.indices, likely.values.double().view(torch.int64)]
    named = torch.where(chosen >= 0, chosen, best.indices) if chances or beside is not None else chosen
    if chances:
        columns.append(logits.float().softmax(-1).gather(1, named[:, None]).double().view(torch.int64))
    table = torch.cat(columns, 1)
    more = None if beside is None else beside(named)
    if more is None:
        table = table.cpu()  # floats travel as their bits: the one wait
    else:
        whole = torch.cat([table.flatten(), more]).cpu()
        table, more = whole[: table.numel()].view(table.shape), whole[table.numel() :]
    numbers: list[list[int]] = table[:, :2].T.tolist()
    found: list[float] = table[:, -1].contiguous().view(torch.float64).tolist() if chances else []
    ids, values = table[:, 2 : 2 + count], table[:, 2 + count : 2 + 2 * count].contiguous().view(torch.float64)
    return Told(numbers[0], numbers[1], found, (values, ids) if count else None, more)


def _choices(logits: Tensor, asked: SequenceOf[Asked], best: Tensor) -> Tensor:
    """The choice [n] of every row: ids, NOTHING or UNSAID."""
    if not asked:
        return torch.full_like(best, UNSAID)
    kinds: dict[tuple[object, ...], list[int]] = {}
    starts, stop = [], 0
    for number, one in enumerate(asked):
        starts.append(stop)
        stop += len(one.positions)
        if not one.sampling.plain and one.sampling.local:
            kinds.setdefault(_kind(one.sampling), []).append(number)
    spans = [slice(start, start + len(one.positions)) for start, one in zip(starts, asked, strict=True)]
    parts = [best[span] if one.sampling.plain else None for span, one in zip(spans, asked, strict=True)]
    for numbers in kinds.values():
        rows = [logits[spans[number]] for number in numbers]
        places = [(asked[number].seed, position) for number in numbers for position in asked[number].positions]
        said = choose_rows(rows[0] if len(rows) == 1 else torch.cat(rows), asked[numbers[0]].sampling, places)
        first = 0
        for number in numbers:
            parts[number] = said[first : (first := first + len(asked[number].positions))]
    filled = [
        torch.full_like(best[span], UNSAID) if part is None else part for part, span in zip(parts, spans, strict=True)
    ]
    return torch.cat(filled) if len(filled) != 1 else filled[0]


def _kind(sampling: SamplingParams) -> tuple[object, ...]:
    """What requests have alike whose rows are chosen in one call."""
    cut = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    return *cut, sampling.allowed_token_ids, tuple(sampling.logit_bias.items())
