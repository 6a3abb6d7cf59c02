"""THE decode step. Every method, batch and prefill goes through it; nothing else moves a sequence on."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from selfdraft.core.commit import commit
from selfdraft.core.rows import Rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY
from selfdraft.core.verify import Result, verify
from selfdraft.errors import EngineError
from selfdraft.protocols import Drafter, Target
from selfdraft.types import Budget

Choose = Callable[[Rows, Tensor, SequenceOf[Sequence]], list[Result]]
"""(rows, their logits, sequences) -> what the target chooses along each tree."""


@torch.inference_mode()
def step(
    target: Target,
    drafter: Drafter,
    work: SequenceOf[tuple[Sequence, int]],
    nodes: int,
    choose: Choose = verify,
) -> list[Result]:
    """Move every (sequence, how many of its pending tokens) on by one pass of the target.

    A sequence decodes when one token is pending and it gets a draft of at most `nodes` candidates; with more
    pending it is prefilled, and emits its first token when the share reaches the end. `choose` is `verify`, but for
    a replay of recorded answers.
    """
    sequences = [sequence for sequence, _ in work]
    ready = [sequence for sequence in sequences if len(sequence.tokens) - sequence.num_cached == 1]
    reading = sum(share for _, share in work) - len(ready)
    budgets = [budget(target, sequence, nodes, reading) for sequence in ready]
    proposed = dict(zip(ready, drafter.draft(ready, budgets) if ready else (), strict=True))  # 1 guess
    clipped = {s: proposed[s].clip(b, target.vocab, target.num_mask_ids) for s, b in zip(ready, budgets, strict=True)}
    rows = pack([(s, share, clipped[s][0] if s in clipped else EMPTY) for s, share in work])  # 2 lay out the rows
    logits = target.forward(rows)  # 3 one pass
    results = choose(rows, logits, sequences)  # 4 follow what the target chooses
    for (sequence, share), span, result in zip(work, rows.spans, results, strict=True):
        emitted = committed(sequence, result)  # 5 stop rules, statistics, text
        accepted = [span.row(node) for node in result.path[: max(emitted - 1, 0)]]
        target.keep(sequence.slot, sequence.num_cached, [*range(share), *accepted])  # 6 remember those rows
        sequence.num_cached += share + len(accepted)
        if sequence in clipped:
            result.proposed, result.nodes = proposed[sequence], clipped[sequence][1]
    drafter.observe(sequences, results)  # 7 let the drafter see how it did
    return results


def committed(sequence: Sequence, result: Result) -> int:
    """How many tokens `commit` wrote. Errors: EngineError with the sequence when code that came with it raises."""
    try:
        return commit(sequence, result)
    except Exception as error:
        what = f"a stopping criterion or the tokenizer raised {type(error).__name__}: {error}"
        raise EngineError(what, sequence) from error


def budget(target: Target, sequence: Sequence, nodes: int, prefill_rows: int = 0) -> Budget:
    """What may hang under the sequence's last token: accepted tokens plus the bonus must fit into its room."""
    last = len(sequence.tokens) - 1
    depth = min(sequence.remaining - 1, target.next_boundary(last) - 1 - last)
    return Budget(nodes, max(depth, 0), max(target.max_length - 1 - last, 0), prefill_rows=prefill_rows)
