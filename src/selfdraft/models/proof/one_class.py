"""Whether drafted rows have the bits of plain ones where all decoding passes are of one shape: tried, not assumed.

The first blocks decode a text one row a pass, and once more with drafts, through graphs of the very shape that will be
replayed. On the way they cross the edge of a piece of keys, some drafts are wider than the class, and rows of another
sequence stand beside.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfdraft.core.rows import text_rows, tree_rows
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.proof.shapes import first_blocks
from selfdraft.models.target import HFTarget

TOKENS = 150
"""Rows that are compared."""
BEFORE = 60
"""Tokens between the end of the prompt and the edge of the first piece."""
WIDER = 8
"""Rows that the widest drafts have more than the class."""


@torch.inference_mode()
def equal_rows(model: PreTrainedModel, settings: GraphSettings) -> tuple[int, int]:
    """(rows of drafted decoding that had the bits of the plain one, rows that were compared)."""
    target = HFTarget(first_blocks(model), slots=2, graphs=settings)
    assert target.graphs is not None
    try:
        prompt = max(1, min(settings.piece - BEFORE, target.max_length // 2))
        count = min(TOKENS, target.max_length - prompt - 1)
        draw = torch.Generator().manual_seed(11)
        ids = torch.randint(0, target.vocab, (prompt + count + 1,), generator=draw).tolist()
        for slot in (0, 1):
            target.forward(text_rows(slot, 0, ids[:prompt]))
            target.keep(slot, 0, range(prompt))
        plain = torch.cat([_row(target, ids, at) for at in range(prompt, prompt + count)])
        drafted = _drafted(target, ids, prompt, count)
        return sum(map(torch.equal, plain, drafted)), count
    finally:
        target.graphs.close()


def _row(target: HFTarget, ids: list[int], at: int) -> Tensor:
    """What slot 0 says behind the token at a place, alone in its pass."""
    said = target.forward(tree_rows([(0, at, ids[at], EMPTY)]))
    target.keep(0, at, [0])
    return said


def _drafted(target: HFTarget, ids: list[int], prompt: int, count: int) -> Tensor:
    """The same of slot 1 with trees that are partly right, now and then beside a row of slot 0."""
    assert target.graphs is not None
    widest = target.graphs.settings.classes[-1] + WIDER
    said, at = list[Tensor](), prompt
    while at < prompt + count:
        size = min(at * 7 % widest, target.next_boundary(at) - 1 - at, prompt + count - 1 - at)
        right = ids[at + 1 : at + 1 + size]
        wrong = [(token + 1) % target.vocab for token in right[:3]]
        draft = Draft.branches([right, wrong] if at % 2 else [wrong, right], "")
        children, path = draft.children(), [-1]
        for token in right:
            path.append(children[path[-1], token])
        beside = [(0, prompt + count, ids[-1], EMPTY)] if at % 3 == 0 else []
        logits = target.forward(tree_rows([*beside, (1, at, ids[at], draft)]))
        said.append(logits[[len(beside) + 1 + node for node in path]])
        target.keep(1, at, [1 + node for node in path])
        at += len(path)
    return torch.cat(said)
