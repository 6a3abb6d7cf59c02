"""The kernels of `tree_attention.py`, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _seen_block(
    queries, keys_at, values_at, alive, at, own, high, total, said, scale, d, dv,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One block of keys at positions `at` for one tile of queries at positions `own`: softmax as far as it is known.

    `high`, `total` and `said` are the largest score, the sum and the weighted values so far.
    """
    keys = tl.load(keys_at, mask=alive[:, None] & (d < WIDTH)[None, :], other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if CAP > 0:  # tanh without overflow
        decayed = tl.exp(-2.0 * tl.abs(scores / CAP))
        bent = (1.0 - decayed) / (1.0 + decayed)
        scores = CAP * tl.where(scores < 0, -bent, bent)
    sees = alive[None, :]
    if WINDOW > 0:
        sees = sees & (at[None, :] > own[:, None] - WINDOW)
    scores = tl.where(sees, scores, float("-inf"))
    higher = tl.maximum(high, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - safe[:, None])
    old = tl.exp(high - safe)
    values = tl.load(values_at, mask=alive[:, None] & (dv < VALUE_WIDTH)[None, :], other=0.0)
    more = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, total * old + tl.sum(weights, 1), said * old[:, None] + more


@triton.jit(do_not_specialize=["places", "heads", "rows"])
def whole_pieces(
    Q, K, V, SAID, SUMS, tile_first, tile_rows, slots, bases, seen, scale, places, heads, rows,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head, piece): a piece of keys that lies wholly before the rows of the tile's sequence.

    Leaves the weighted values SAID [pieces, rows, heads, DV] and largest score and sum SUMS [pieces, rows, heads, 2].
    """
    tile, key_head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count, first = tl.load(tile_rows + tile), tl.load(tile_first + tile)
    slot, base = tl.load(slots + first), tl.load(bases + first)
    if (count == 0) | ((piece + 1) * PIECE > base):
        return
    i, d, dv, n = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, KEYS)
    row, head, mine = first + i // SHARED, key_head * SHARED + i % SHARED, i // SHARED < count
    asked = Q + (row * heads + head)[:, None] * WIDTH + d[None, :]
    queries = tl.load(asked, mask=mine[:, None] & (d < WIDTH)[None, :], other=0.0)
    own = tl.load(seen + row, mask=mine, other=0) - 1
    high, total = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
    said = tl.zeros([TILE, DV], tl.float32)
    strip = (slot * (heads // SHARED) + key_head).to(tl.int64) * places
    for start in range(0, PIECE, KEYS):
        at = piece * PIECE + start + n
        high, total, said = _seen_block(
            queries, K + strip * WIDTH + (at[:, None] * WIDTH + d[None, :]),
            V + strip * VALUE_WIDTH + (at[:, None] * VALUE_WIDTH + dv[None, :]),
            at >= 0, at, own, high, total, said, scale, d, dv, WIDTH, VALUE_WIDTH, CAP, WINDOW,
        )  # fmt: skip
    out = (piece * rows + row) * heads + head
    tl.store(SAID + out[:, None].to(tl.int64) * DV + dv[None, :], said, mask=mine[:, None])
    tl.store(SUMS + out * 2, high, mask=mine)
    tl.store(SUMS + out * 2 + 1, total, mask=mine)


@triton.jit
def _with_pieces(SAID, SUMS, whole, row, head, mine, dv, high, total, said, heads, rows, DV: tl.constexpr):
    """The sums of a row, with those of the `whole` first pieces merged into them in their order."""
    piece = 0
    while piece < whole:
        out = (piece * rows + row) * heads + head
        their = tl.load(SUMS + out * 2, mask=mine, other=float("-inf"))
        sum_of = tl.load(SUMS + out * 2 + 1, mask=mine, other=0.0)
        values = tl.load(SAID + out[:, None].to(tl.int64) * DV + dv[None, :], mask=mine[:, None], other=0.0)
        higher = tl.maximum(high, their)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp(high - safe), tl.exp(their - safe)
        high, total, said = higher, total * old + sum_of * new, said * old[:, None] + values * new[:, None]
        piece += 1
    return high, total, said


@triton.jit(do_not_specialize=["places", "heads", "rows", "path_size"])
def rest_of_path(
    Q, K, V, SAID, SUMS, OUT, SINKS, path, slots, bases, seen, scale, places, heads, rows, path_size,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Program (row, key head): keys behind the last whole piece, along the row's path; then all pieces. Writes OUT."""
    row, key_head = tl.program_id(0), tl.program_id(1)
    end = tl.load(seen + row)
    if end == 0:  # padding
        return
    slot, base = tl.load(slots + row), tl.load(bases + row)
    i, d, dv, n = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, KEYS)
    head, mine = key_head * SHARED + i, i < SHARED
    asked = Q + (row * heads + head)[:, None] * WIDTH + d[None, :]
    queries = tl.load(asked, mask=mine[:, None] & (d < WIDTH)[None, :], other=0.0)
    high, total = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
    said, own = tl.zeros([TILE, DV], tl.float32), tl.zeros([TILE], tl.int32) + (end - 1)
    strip = (slot * (heads // SHARED) + key_head).to(tl.int64) * places
    start = base // PIECE * PIECE
    while start < end:
        at = start + n
        new = (at < end) & (at >= base)
        place = tl.where(new, tl.load(path + row * path_size + at - base, mask=new, other=0), at)
        high, total, said = _seen_block(
            queries, K + strip * WIDTH + (place[:, None] * WIDTH + d[None, :]),
            V + strip * VALUE_WIDTH + (place[:, None] * VALUE_WIDTH + dv[None, :]),
            at < end, at, own, high, total, said, scale, d, dv, WIDTH, VALUE_WIDTH, CAP, WINDOW,
        )  # fmt: skip
        start += KEYS
    high, total, said = _with_pieces(SAID, SUMS, base // PIECE, row, head, mine, dv, high, total, said, heads, rows, DV)
    if HAS_SINKS:
        sink = tl.load(SINKS + head, mask=mine, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, sink)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - safe) + tl.exp(sink - safe)
        said = said * tl.exp(high - safe)[:, None]
    answer = said / tl.where(total > 0, total, 1.0)[:, None]
    out = OUT + (row * heads + head)[:, None] * VALUE_WIDTH + dv[None, :]
    tl.store(out, answer.to(OUT.dtype.element_ty), mask=mine[:, None] & (dv < VALUE_WIDTH)[None, :])
