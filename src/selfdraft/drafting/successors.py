"""What the model itself thought likely after a token, kept as guesses for the next time that token comes.

Source: Token Recycling (arXiv 2408.08696), section 3; the noise of a sampled request is added here.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdraft.core.noise import gumbel_rows
from selfdraft.core.one_row import BANNED, Ids, Scores, Top
from selfdraft.core.sequence import Sequence
from selfdraft.types import SamplingParams

RUNNERS_UP = 64
"""Likeliest tokens that are looked at after a row."""
BLOCK = 128
"""Logits of which only the largest is looked at first."""
FEW = 2**15
"""So many logits are read at once: blocks would cost more calls than they save."""


def order_of_learning(rows: int, path: SequenceOf[int]) -> list[int]:
    """Rows of a step in the order in which a table learns of them: what the text took stands above the rest.

    The last of `rows` rows first, then the row of the last known token, then those of the accepted nodes.
    """
    return [*range(rows - 1, 0, -1), 0, *(node + 1 for node in path)]


class Answers:
    """The likeliest tokens after each token when the model was last asked there, in the text, a branch or the window.

    A sampled request's noise is known in advance, so the likeliest guess at a place is what these scores and that
    noise choose there. Idea: Token Recycling (arXiv 2408.08696), with the noise of the place added.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Scores, Ids, bool]] = {}

    def learn(self, token: int, scores: Scores, ids: Ids, probe: bool) -> None:
        """Scores [k] after temperature and their token ids, best first; `probe`: the window asked there."""
        self._known[token] = (scores, ids, probe)

    def guess(self, token: int, sequence: Sequence, position: int, count: int) -> tuple[list[int], bool]:
        """The `count` likeliest tokens at `position` behind `token`, best first, and whether the window knew them."""
        if token not in self._known:
            return [], False
        scores, ids, probe = self._known[token]
        if not sequence.sampling.greedy:
            noisy = scores + gumbel_rows(sequence.seed, [position], ids[None])[0]
            ids = ids[np.argsort(-noisy)[:count]]
        return ids[:count].tolist(), probe


def likeliest(
    logits: Tensor, sampling: SamplingParams, most: int = RUNNERS_UP, *, known: Top | None = None
) -> tuple[Scores, Ids]:
    """Likeliest tokens of rows [n, vocab]: scores after temperature and truncation, and ids, both [n, k].

    `known`: the likeliest tokens of these rows, where they came with the answers; nothing is asked then.
    """
    return scores_of(topk(logits, most) if known is None else (known[0][:, :most], known[1][:, :most]), sampling)


def scores_of(top: Top, sampling: SamplingParams) -> tuple[Scores, Ids]:
    """Scores [n, k] of the likeliest tokens of rows after temperature and truncation, and their ids.

    Penalties and processors are left out, and what top-p keeps is judged by these tokens alone: they are only guesses.
    """
    scores, ids = top[0].double().cpu().numpy(), top[1].cpu().numpy()
    if sampling.greedy:
        return scores, ids
    scores = (scores - scores[:, :1]) / max(sampling.temperature, 1e-300)
    chances = np.exp(scores)
    chances /= chances.sum(-1, keepdims=True)
    outside = (chances.cumsum(-1) - chances >= sampling.top_p) | (chances < sampling.min_p * chances[:, :1])
    if sampling.top_k:
        outside[:, sampling.top_k :] = True
    scores[outside] = BANNED
    return scores, ids


def said_after(sequence: Sequence, logits: Tensor, places: SequenceOf[int]) -> list[int]:
    """What a sampled request would say after rows [n, vocab]: the likeliest there, with the noise of `places` [n]."""
    return choose_likeliest(sequence, *likeliest(logits, sequence.sampling), places)


def choose_likeliest(sequence: Sequence, scores: Scores, ids: Ids, places: SequenceOf[int]) -> list[int]:
    """Of each row of what `likeliest` found the token that the noise of its place chooses."""
    chosen = (scores + gumbel_rows(sequence.seed, places, ids)).argmax(-1)
    found: list[int] = ids[range(len(ids)), chosen].tolist()
    return found


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [n, vocab], values and ids [n, k], largest first; all of a smaller vocabulary.

    A row's k largest lie in the k blocks whose maxima are largest, so most of a wide row is read only once.
    """
    if logits.device.type == "cpu":
        return _topk_here(logits, k)
    rows, vocab = logits.shape
    if rows * vocab <= FEW or vocab <= 2 * BLOCK * k:
        best = logits.topk(min(k, vocab))
        return best.values, best.indices
    padded = torch.nn.functional.pad(logits, (0, -vocab % BLOCK), value=float("-inf"))
    blocks = padded.view(rows, -1, BLOCK)
    which = blocks.amax(-1).topk(k).indices
    inside = blocks.gather(1, which[:, :, None].expand(-1, -1, BLOCK)).flatten(1).topk(k)
    return inside.values, which.gather(1, inside.indices // BLOCK) * BLOCK + inside.indices % BLOCK


def _topk_here(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` by numpy: torch would share this little work out among threads, and wait for them on a busy machine."""
    order = _order(logits)
    rows, vocab = order.shape
    most = min(k, vocab)
    ids = np.arange(vocab)[None].repeat(rows, 0) if vocab <= 2 * BLOCK * k else None
    if ids is None:
        whole = vocab // BLOCK * BLOCK
        blocks = order[:, :whole].reshape(rows, -1, BLOCK)
        which = np.argpartition(blocks.max(-1), -k)[:, -k:]
        inside = np.take_along_axis(blocks, which[:, :, None], 1).reshape(rows, -1)
        ids = (which[:, :, None] * BLOCK + np.arange(BLOCK)).reshape(rows, -1)
        if whole < vocab:  # the last block is a short one
            inside = np.concatenate([inside, order[:, whole:]], 1)
            ids = np.concatenate([ids, np.arange(whole, vocab)[None].repeat(rows, 0)], 1)
        order = inside
    best = np.argpartition(order, -most)[:, -most:]
    best = np.take_along_axis(best, np.argsort(np.take_along_axis(order, best, 1), kind="stable")[:, ::-1], 1)
    found = torch.from_numpy(np.take_along_axis(ids, best, 1))
    return logits.gather(1, found), found


def _order(logits: Tensor) -> NDArray[np.number]:
    """Numbers in the order of the logits. numpy knows no bfloat16: its bits are, negative ones turned round."""
    if logits.dtype != torch.bfloat16:
        return np.asarray(logits.numpy())
    bits = logits.contiguous().view(torch.int16).numpy()
    return np.asarray(bits ^ ((bits >> 15) & 0x7FFF))
