"""Lookahead parallelism: every rank has the whole model, and runs its share of the window and of the candidates.

All ranks make the same draft, since it follows from the text and from what was exchanged. Each runs its share, follows
what the model says in it, and tells the others in one small message of a fixed shape: how far its walk came, and the
answers to its columns. The longest walk is the text. Keys and values of its accepted rows are sent by the rank that
has them. Source: section 3.4 of the paper of lookahead decoding (arXiv 2402.02057), where accepted tokens are computed
again and sampling is not split.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdraft.core.rows import Rows, Span
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import ROOT, Draft
from selfdraft.core.verify import Result, verify
from selfdraft.drafting.successors import said_after
from selfdraft.errors import EngineError, RankError
from selfdraft.models.kv_cache import KVCache
from selfdraft.parallel.ranks import Ranks
from selfdraft.parallel.shares import Share, rows_of_share, split
from selfdraft.protocols import DraftExtras, Target
from selfdraft.types import PassVariant

UNKNOWN = -1
"""Stands for what the model said at a row of another rank."""
FINE, FAILED = 0, 1
DIFFER = "the ranks were given different requests"
HEAD = 3
"""Numbers of a message before the tokens: a checksum of the request and its draft, how it went, tokens of the walk."""


@dataclass(slots=True)
class Piece:
    """One span of a step: the draft of all ranks, who runs what of it, and who had the longest walk."""

    span: Span
    shares: list[Share]
    winner: int = 0

    def rows_of(self, rank: int, order: SequenceOf[int]) -> list[int] | None:
        """Rows of the whole span as rows of a rank's own; None when it has not run them all."""
        place = {node: i for i, node in enumerate(self.shares[rank].nodes)}
        first = self.span.pending
        if any(row >= first and row - first not in place for row in order):
            return None
        return [row if row < first else first + place[row - first] for row in order]


class LookaheadRanks:
    """A target that runs this rank's share of every pass, and the choice that puts all ranks' answers together.

    `target` is the rank's own, `cache` its keys and values. `width` and `size` are W and N of the window: they are the
    shape of a message. Errors of `forward`, `choose` and `keep`: RankError when a rank has ended.
    """

    def __init__(self, target: Target, cache: KVCache, ranks: Ranks, *, width: int, size: int) -> None:
        self.target, self.cache, self.ranks = target, cache, ranks
        self._tokens, self._columns = size, -(-width // ranks.size)
        self._pieces: dict[int, Piece] = {}
        self._rows: Rows | None = None

    @property
    def bytes_per_step(self) -> int:
        """Bytes of the message that a rank gives in a step, for each request that is decoded."""
        return 4 * (HEAD + self._tokens + self._columns)

    @property
    def vocab(self) -> int:
        return self.target.vocab

    @property
    def num_mask_ids(self) -> int:
        return self.target.num_mask_ids

    @property
    def max_length(self) -> int:
        return self.target.max_length

    @property
    def extras(self) -> DraftExtras:
        """See `selfdraft.protocols.DraftExtras`."""
        return self.target.extras

    def next_boundary(self, position: int) -> int:
        return self.target.next_boundary(position)

    def reuse(self, slot: int, source: int, count: int) -> None:
        self.target.reuse(slot, source, count)

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        """Logits of this rank's own rows, in their order."""
        pieces = [Piece(span, split(span.draft, self.ranks.size)) for span in rows.spans]
        self._pieces = {piece.span.slot: piece for piece in pieces}
        self._rows = rows_of_share(rows, [piece.shares[self.ranks.rank] for piece in pieces])
        with self.ranks.together():
            return self.target.forward(self._rows, short)

    def choose(self, rows: Rows, logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Result]:
        """What the model chooses along each whole tree; the same on all ranks. In place of `core.verify.verify`.

        `argmax` of a result has the answers to the deepest probes, with the noise of a sampled request in them, and
        UNKNOWN elsewhere. Errors: EngineError, on all ranks, when one of them cannot answer a request.
        """
        own = self._rows
        assert own is not None, "forward comes before choose"
        if not any(span.num_logits for span in rows.spans):
            return [Result(span.draft) for span in rows.spans]
        with self.ranks.together():
            message, failure = self._told(own, logits, sequences)
            told = self.ranks.gather(message).tolist()
        self._check(told, sequences, failure)
        pieces = [self._pieces[span.slot] for span in rows.spans]
        return [self._joined(piece, [one[number] for one in told]) for number, piece in enumerate(pieces)]

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """What `Target.keep` does; accepted rows come from the rank whose walk they are on."""
        piece, rank = self._pieces[slot], self.ranks.rank
        own = piece.rows_of(rank, order)
        if all(piece.rows_of(other, order) is not None for other in range(self.ranks.size)):
            assert own is not None
            self.target.keep(slot, base, own)
            return
        pending = piece.span.pending
        if rank == piece.winner:
            assert own is not None, "who has the longest walk has run it"
            self.target.keep(slot, base, own)
        with self.ranks.together():
            data = self.cache.packed(slot, base + pending, len(order) - pending)
            self.ranks.send(data, piece.winner)
            if rank != piece.winner:
                self.cache.unpack(slot, base + pending, data)

    def _told(self, own: Rows, logits: Tensor, sequences: SequenceOf[Sequence]) -> tuple[Tensor, EngineError | None]:
        """This rank's message [requests, numbers], and the error that is in it."""
        message = torch.zeros(len(sequences), HEAD + self._tokens + self._columns, dtype=torch.int32)
        failed: EngineError | None = None
        try:
            results = verify(own, logits, sequences)
        except EngineError as error:
            if error.request is None:
                raise
            failed, results = error, [Result(span.draft) for span in own.spans]
        for number, (sequence, result, span) in enumerate(zip(sequences, results, own.spans, strict=True)):
            piece = self._pieces[span.slot]
            message[number, 0] = checksum(sequence, piece.span)
            message[number, 1] = FAILED if failed is not None and failed.request is sequence else FINE
            message[number, 2] = len(result.tokens)
            message[number, HEAD : HEAD + len(result.tokens)] = torch.tensor(result.tokens, dtype=torch.int32)
            answers = self._answers(sequence, result, piece)
            first = HEAD + self._tokens
            message[number, first : first + len(answers)] = torch.tensor(answers, dtype=torch.int32)
        return message.to(logits.device), failed

    def _answers(self, sequence: Sequence, result: Result, piece: Piece) -> list[int]:
        """What the model says after this rank's columns."""
        share = piece.shares[self.ranks.rank]
        if result.logits is None or not share.leaves:
            return []
        place = {node: 1 + i for i, node in enumerate(share.nodes)}
        rows = [place[node] for node in share.leaves]
        if sequence.sampling.greedy:
            return [result.argmax[row] for row in rows]
        last = piece.span.base + piece.span.pending - 1
        places = [last + 1 + piece.span.draft.depths[node] for node in share.leaves]
        return said_after(sequence, result.logits[rows], places)

    def _check(self, told: list[list[list[int]]], sequences: SequenceOf[Sequence], own: EngineError | None) -> None:
        """Errors: EngineError for the first request that a rank cannot answer; RankError when they do not share one."""
        for number, sequence in enumerate(sequences):
            states = [one[number] for one in told]
            if any(state[0] != states[0][0] for state in states):
                self.ranks.leave(DIFFER)
                raise RankError(f"{DIFFER}: each must be asked the same, in the same order")
            failed = next((rank for rank, state in enumerate(states) if state[1] == FAILED), None)
            if failed is not None:
                if own is not None and own.request is sequence:
                    raise own
                raise EngineError(f"rank {failed} could not answer; its own error says why", sequence)

    def _joined(self, piece: Piece, told: list[list[int]]) -> Result:
        """The result of a whole span out of the ranks' messages: the longest walk, the first of equal ones."""
        draft = piece.span.draft
        piece.winner = max(range(len(told)), key=lambda rank: (told[rank][2], -rank))
        best = told[piece.winner]
        tokens = tuple(best[HEAD : HEAD + best[2]])
        path = _path(draft, tokens)
        argmax = [UNKNOWN] * (1 + len(draft))
        for node, token in zip((ROOT, *path), tokens, strict=True):
            argmax[node + 1] = token
        for share, one in zip(piece.shares, told, strict=True):
            for node, token in zip(share.leaves, one[HEAD + self._tokens :], strict=False):
                argmax[node + 1] = token
        return Result(draft, path, tokens, tuple(argmax))


def _path(draft: Draft, tokens: SequenceOf[int]) -> tuple[int, ...]:
    """The nodes that a walk went through: all of its tokens but the last one, which no node of its rank said."""
    children, path, node = draft.children(), list[int](), ROOT
    for token in tokens[:-1]:
        node = children[node, token]
        path.append(node)
    return tuple(path)


def checksum(sequence: Sequence, span: Span) -> int:
    """31 bits of the request and its draft, by which ranks know that they run the same one."""
    sampling = sequence.sampling
    known = (span.base, span.pending, sequence.tokens[-1], sequence.seed % 2**31, sequence.max_length, len(span.draft))
    numbers = array("q", [*known, *span.draft.tokens, *span.draft.parents])
    chosen = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    ends = (sampling.stop, sampling.min_tokens, sorted(sequence.stop_ids))
    return zlib.crc32(repr((chosen, ends)).encode(), zlib.crc32(numbers.tobytes())) >> 1
