"""Which nodes of a draft each rank runs: pure rules that all ranks apply to the same draft.

Source: lookahead parallelism, section 3.4 of "Break the Sequential Dependency of LLM Inference Using Lookahead
Decoding" (arXiv 2402.02057).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.core.rows import Rows, Span, laid_out
from selfdraft.core.tree import ROOT, Draft


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank runs of a draft: `nodes` in ascending order, each with all of its ancestors.

    `leaves` are the last probes of the columns whose answers this rank has to tell.
    """

    nodes: tuple[int, ...]
    leaves: tuple[int, ...]

    def of(self, draft: Draft) -> Draft:
        """The nodes of this share as a draft of their own."""
        if len(self.nodes) == len(draft):
            return draft
        place = {ROOT: ROOT, **{node: i for i, node in enumerate(self.nodes)}}
        return Draft(
            tuple(draft.tokens[node] for node in self.nodes),
            tuple(place[draft.parents[node]] for node in self.nodes),
            tuple(draft.sources[node] for node in self.nodes),
            sum(node < draft.num_candidates for node in self.nodes),
        )


def probe_leaves(draft: Draft) -> list[int]:
    """Probes that no probe hangs under: the deepest cell of each column of a window, from left to right."""
    inner = set(draft.parents)
    return [node for node in range(draft.num_candidates, len(draft)) if node not in inner]


def split(draft: Draft, size: int) -> list[Share]:
    """The shares of `size` ranks. Columns go in equal runs, as in the paper; a rank may have none.

    A column needs the cells of level 0 on its left, so later ranks run more of them; paths of candidates go, one after
    the other, to the rank that has the fewest rows so far.
    """
    leaves = probe_leaves(draft)
    run = -(-len(leaves) // size)
    columns = [tuple(leaves[rank * run : (rank + 1) * run]) for rank in range(size)]
    chosen = [_with_ancestors(draft, own) for own in columns]
    for path in draft.leaves():
        min(chosen, key=len).update(path)
    return [Share(tuple(sorted(nodes)), own) for nodes, own in zip(chosen, columns, strict=True)]


def _with_ancestors(draft: Draft, nodes: SequenceOf[int]) -> set[int]:
    found: set[int] = set()
    for node in nodes:
        while node != ROOT and node not in found:
            found.add(node)
            node = draft.parents[node]
    return found


def rows_of_share(rows: Rows, shares: SequenceOf[Share]) -> Rows:
    """The rows that one rank runs: of every span its pending tokens and the nodes of the rank's share."""
    spans: list[Span] = []
    tokens: list[int] = []
    asked: list[int] = []
    for span, share in zip(rows.spans, shares, strict=True):
        draft = share.of(span.draft)
        answers = 1 + len(draft) if span.num_logits else 0
        spans.append(Span(span.slot, span.base, len(tokens), span.pending, draft, answers))
        tokens += rows.tokens[span.start : span.start + span.pending]
        tokens += draft.tokens
        asked += range(len(tokens) - answers, len(tokens))
    return laid_out(tokens, spans, asked)
