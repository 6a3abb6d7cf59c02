"""The search for the token of a sampled row, by the kernels: what `core/one_row.py` does, several times as quick."""

from __future__ import annotations

import ctypes

import numpy as np

from selfdraft.core.noise import key_of
from selfdraft.core.one_row import Contenders, Ids, Scores, contenders

MOST = 4096
"""Ids that are written down; usually there are some ten."""


def contenders_by(library: ctypes.CDLL) -> Contenders:
    """`contenders` by the kernels, for rows of float32; for others by numpy."""

    def search(scores: Scores, seed: int, position: int) -> Ids:
        best = float(scores.max())
        if scores.dtype != np.float32 or not scores.flags.c_contiguous or not np.isfinite(best):
            return contenders(scores, seed, position)
        found = np.empty(MOST, np.int64)
        row, ids = scores.ctypes.data, found.ctypes.data
        count = library.selfdraft_contenders(row, len(scores), key_of(seed, position), best, ids, MOST)
        return found[:count] if count <= MOST else contenders(scores, seed, position)

    return search
