"""Verification: ask the target at the root, follow the child that says the same, ask again there.

Every emitted token is one the target itself chose, so no draft, right or wrong, can change the text. For drafts
that are points no exact scheme accepts more: any exact output Y follows p, and at most the prefix of Y that lies
in the tree can be accepted; the walk accepts all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from selfdraft.core import told
from selfdraft.core.one_row import BY_NUMPY, Contenders, Search, Top, apart, widened
from selfdraft.core.rows import Rows
from selfdraft.core.sampler import NOTHING, NOTHING_LEFT, choose, logprob, process
from selfdraft.core.sequence import Sequence
from selfdraft.core.told import NAN, UNSAID, Asked, Told
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.errors import EngineError
from selfdraft.types import Logprob


@dataclass(slots=True)
class Result:
    """What one step said about one sequence."""

    draft: Draft
    """The tree that was run."""
    path: tuple[int, ...] = ()
    """Accepted nodes of `draft`, from the root down."""
    tokens: tuple[int, ...] = ()
    """What the target chose along the path: one more than `path` (the bonus token). Empty while prefilling."""
    argmax: tuple[int, ...] = ()
    """Argmax of the raw logits at the last known token and at every node of `draft`: what drafters learn from."""
    logits: Tensor | None = None
    """Raw logits of the same rows [1 + len(draft), vocab]; valid until the next forward pass."""
    top: Top | None = None
    """The likeliest tokens of the same rows, where they came with the answers."""
    proposed: Draft = EMPTY
    """The drafter's own tree, before it was clipped to the budget."""
    nodes: tuple[int, ...] = ()
    """For each node of `draft`, its index in `proposed`."""
    logprobs: tuple[Logprob, ...] = field(default=())


@runtime_checkable
class Beside(Protocol):
    """What a drafter wants to know of a step's rows, of a device that is waited for: it comes with the answers."""

    def ask(self, rows: Rows, sequences: SequenceOf[Sequence], logits: Tensor, said: Tensor) -> Tensor | None:
        """Numbers [m], int64 and on the device, or None; `said` [n] is what the rows of `logits` [n, vocab] say."""

    def take(self, numbers: Tensor) -> None:
        """What `ask` has said last, on the CPU; not called where it said None."""


def walk(draft: Draft, say: Callable[[int], int]) -> tuple[list[int], list[int]]:
    """Follow what the target says: `say(node)` is its choice after that node (ROOT: the last known token).

    Returns the accepted nodes and the emitted tokens, one more than the nodes.
    """
    children = draft.children()
    node = ROOT
    path: list[int] = []
    tokens: list[int] = []
    while True:
        token = say(node)
        tokens.append(token)
        child = children.get((node, token))
        if child is None:
            return path, tokens
        path.append(child)
        node = child


def argmaxes(logits: Tensor) -> list[int]:
    """The best id of every row of [n, vocab], ties to the lowest id; NAN where a score is NaN."""
    if apart(logits):
        return told.tell(logits, []).best
    # torch compares number by number here, numpy sixteen at once; for both NaN is more than any number
    scores = widened(logits)
    places: list[int] = scores.argmax(axis=-1).tolist()
    return [place if row[place] == row[place] else NAN for row, place in zip(scores, places, strict=True)]


def verify(
    rows: Rows,
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    top: int = 0,
    beside: Beside | None = None,
    search: Search = BY_NUMPY,
) -> list[Result]:
    """Walk every sequence's tree. `logits` [len(rows.logit_rows), vocab] are the answers, in the order of the rows.

    `top`: how many likeliest tokens of each row come with the answers, where that is cheaper than to ask later;
    `beside`: what else does. `search`: how rows are looked through on a CPU.
    Errors: EngineError when an answer holds NaN (a broken checkpoint, an overflow), naming the sequence.
    """
    said = _told(rows, logits, sequences, top, beside, search)
    answers = said.best
    results, stop = [], 0
    for span, sequence in zip(rows.spans, sequences, strict=True):
        start, stop = stop, stop + span.num_logits
        if NAN in answers[start:stop]:
            raise EngineError("the model answered NaN; try a wider dtype, or check the checkpoint", sequence)
        if not span.num_logits:
            results.append(Result(span.draft))
            continue
        try:
            chosen = said.chosen[start:stop] if said.chosen else [UNSAID] * (stop - start)
            result = _follow(sequence, span.draft, logits[start:stop], answers[start:stop], chosen, search.contenders)
            if said.top is not None:
                result.top = said.top[0][start:stop], said.top[1][start:stop]
            results.append(result)
        except EngineError as error:
            error.request = sequence
            raise
        except Exception as error:  # of a processor: the other requests of the batch have no part in it
            raise EngineError(f"a logits processor raised {type(error).__name__}: {error}", sequence) from error
    return results


def _told(
    rows: Rows, logits: Tensor, sequences: SequenceOf[Sequence], top: int, beside: Beside | None, search: Search
) -> Told:
    """What the rows say: of a device all of it at once, on a CPU the likeliest ids alone."""
    if not len(logits):
        return Told([], [], [], None)
    if not apart(logits):
        known = search.likeliest(logits, max(top, 1))
        return Told(argmaxes(logits) if known is None else known[1][:, 0].tolist(), [], [], known if top else None)
    asked = []
    for span, sequence in zip(rows.spans, sequences, strict=True):
        if span.num_logits:
            end = len(sequence.tokens)
            asked.append(Asked(sequence.sampling, sequence.seed, [end, *(end + depth for depth in span.draft.depths)]))
    found = told.tell(
        logits, asked, top, beside=None if beside is None else partial(beside.ask, rows, sequences, logits)
    )
    if beside is not None and found.beside is not None:
        beside.take(found.beside)
    return found


def _follow(
    sequence: Sequence, draft: Draft, logits: Tensor, answers: list[int], chosen: list[int], search: Contenders
) -> Result:
    sampling = sequence.sampling
    path_tokens = [] if sampling.local else list(sequence.tokens)  # a long text is copied only where it is looked at
    end = len(sequence.tokens)
    logprobs: list[Logprob] = []

    def say(node: int) -> int:
        if node != ROOT:
            path_tokens.append(draft.tokens[node])
        if sampling.plain:
            token = answers[node + 1]
        elif chosen[node + 1] == NOTHING:
            raise EngineError(NOTHING_LEFT)
        elif chosen[node + 1] != UNSAID:
            token = chosen[node + 1]
        else:
            scores = process(logits[node + 1], sampling, path_tokens, sequence.prompt_length, sequence.stop_ids)
            place = end + (draft.depths[node] if node != ROOT else 0)
            token = choose(scores, sampling, sequence.seed, place, search)
        if sampling.logprobs is not None:
            logprobs.append(logprob(logits[node + 1], token, sampling.logprobs))
        return token

    path, tokens = walk(draft, say)
    return Result(draft, tuple(path), tuple(tokens), tuple(answers), logits, logprobs=tuple(logprobs))
