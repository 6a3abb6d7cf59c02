"""The attention function that stock models are given: prefix from our cache, tree by parents.

transformers calls it with the queries, keys and values of all new rows (after rotary embedding) and our per-call
`Plan`; it writes keys and values into the cache and attends every span to its own slot.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfdraft.core.rows import Rows, Span
from selfdraft.errors import UnsupportedModel
from selfdraft.models.exactness import Shapes
from selfdraft.models.kv_cache import KVCache

NAME = "selfdraft"
UNPLANNED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Ways of torch to attend on a GPU that take a mask of any shape at once; cuDNN makes a plan for every new shape."""


def additive_mask(
    sees: Tensor, places: Tensor, queries: Tensor, window: int | None, heads: int, dtype: torch.dtype
) -> Tensor:
    """0 where a query sees a key, -inf elsewhere: [lanes, 1, heads * n, keys], heads of one group beneath each other.

    `sees` [lanes, n, keys] before any window; `places` [lanes, keys] and `queries` [lanes, n] are positions.
    """
    if window is not None:
        sees = sees & (places[:, None, :] > queries[:, :, None] - window)
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, float("-inf"))
    return mask.repeat(1, heads, 1)[:, None]


@dataclass(eq=False, slots=True)
class Group:
    """Rows that attend together: `lanes` layouts of one slot's keys, `width` query rows each.

    `rows` [lanes * width] are flat row indices (padding repeats a row); `write` are the places of that list whose
    answers count, `target` the flat rows they belong to. `keys` [lanes, length] gathers key places, None is the
    cache as it lies. `places` [lanes, length] and `queries` [lanes, width] are positions, `sees` [lanes, width,
    length] says who may see whom before any window.
    """

    slot: int
    rows: Tensor
    write: Tensor
    target: Tensor
    keys: Tensor | None
    sees: Tensor
    places: Tensor
    queries: Tensor
    whole: bool = False
    """All rows of the pass in their order, then padding: nothing has to be picked or put back."""
    masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        return self.sees.shape[0]

    @property
    def width(self) -> int:
        return self.sees.shape[1]

    @property
    def length(self) -> int:
        return self.sees.shape[2]

    def mask(self, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [lanes, 1, heads * width, length], heads of one group beneath each other."""
        key = (window, heads, dtype)
        if key not in self.masks:
            self.masks[key] = additive_mask(self.sees, self.places, self.queries, window, heads, dtype)
        return self.masks[key]


@dataclass(eq=False, slots=True)
class Plan:
    """What one forward pass needs to know; travels to the attention function as a keyword argument."""

    cache: KVCache
    spans: tuple[Span, ...]
    groups: list[Group]
    calls: list[tuple[int, int | None]] = field(default_factory=list)
    """(layer, window) of every attention call: how the adapter proves that all layers came through here."""
    hidden: Tensor | None = None
    """Hidden states entering a block, for views that leave or resume there (`views.py`)."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer scores keys: scale, sliding window, soft cap, and one sink for each query head."""

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None


class Attending(Protocol):
    """What may travel to the attention function instead of a `Plan`: it does by itself what has to be done."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Queries [1, heads, n, dim] -> [1, n, heads, dim of values]."""


def sent_at_once(lists: SequenceOf[SequenceOf[int]], device: torch.device) -> list[Tensor]:
    """Whole numbers on the device, each list as a tensor [its length] of int64: all of them are sent in one piece."""
    whole, stop = torch.tensor([*chain.from_iterable(lists)], dtype=torch.int64, device=device), 0
    return [whole[stop : (stop := stop + len(one))] for one in lists]


def make_plan(rows: Rows, cache: KVCache, shapes: Shapes, device: torch.device) -> Plan:
    """Group the rows for attention; `rows` will be padded to `shapes.round_rows(len(rows))`."""
    groups: list[Group] = []
    for span in rows.spans:
        if not shapes.canonical:
            groups.append(_tree_group(span, range(span.size), 1, device))
            continue
        groups.append(_lane_group(span, shapes, device))
        probes = range(span.pending + span.draft.num_candidates, span.size)
        if len(probes):
            groups.append(_tree_group(span, probes, shapes.width, device))
    if len(groups) == 1 and groups[0].lanes == 1 and groups[0].width >= shapes.round_rows(len(rows)):
        groups[0].whole = True
    return Plan(cache, rows.spans, groups)


def _lane_group(span: Span, shapes: Shapes, device: torch.device) -> Group:
    """Pending rows and candidates, each root-to-leaf path laid out as if it were a chain of known tokens.

    The keys of a path stand at their positions, up to the end of the bucket: just the layout of plain decoding.
    """
    known = list(range(span.pending))
    paths = [known + [span.pending + node for node in leaf] for leaf in span.draft.leaves()] or [known]
    positions = span.positions
    length = shapes.round_length(max(positions[path[-1]] for path in paths) + 1)
    width = shapes.round_width(max(len(path) for path in paths))
    in_place = all(row == i for path in paths for i, row in enumerate(path))
    most = max(len(path) for path in paths)
    own = [] if in_place else [span.base + row for path in paths for row in (*path, *range(len(path), most))]
    done: set[int] = set()
    rows, write, target, queries = [], [], [], []
    for lane, path in enumerate(paths):
        padded = path + [path[0]] * (width - len(path))
        rows += [span.start + row for row in padded]
        queries += [positions[row] for row in padded]
        for place, row in enumerate(path):
            if row not in done:
                done.add(row)
                write.append(lane * width + place)
                target.append(span.start + row)
    picked, wrote, aims, at, mine = sent_at_once((rows, write, target, queries, own), device)
    at, places = at.view(len(paths), width), torch.arange(length, device=device).expand(len(paths), length)
    keys = None
    if not in_place:
        keys = places.clone()
        keys[:, span.base : span.base + most] = mine.view(len(paths), most)
    sees = places[:, None, :] <= at[:, :, None]
    return Group(span.slot, picked, wrote, aims, keys, sees, places, at)


def _tree_group(span: Span, chosen: SequenceOf[int], multiple: int, device: torch.device) -> Group:
    """Rows as they lie, all of the span's rows as keys; a row sees the prefix and its own ancestors.

    What is made and sent here does not grow with the prefix.
    """
    positions = span.positions
    ancestors = torch.zeros(span.size, span.size, dtype=torch.bool)
    for row in range(span.size):
        parent = row - 1 if row < span.pending else span.row(span.draft.parents[row - span.pending])
        if parent >= 0:
            ancestors[row] = ancestors[parent]
        ancestors[row, row] = True
    padded = [*chosen, *([chosen[0]] * (-len(chosen) % multiple))]
    wide = len(padded)
    told = ([span.start + row for row in padded], [positions[row] for row in padded], positions)
    rows, queries, own = sent_at_once(told, device)
    places = torch.cat([torch.arange(span.base, device=device), own])[None]
    prefix = torch.ones(wide, span.base, dtype=torch.bool, device=device)
    sees = torch.cat([prefix, ancestors[padded].to(device)], 1)[None]
    write = torch.arange(len(chosen), device=device)
    return Group(span.slot, rows, write, rows[: len(chosen)], None, sees, places, queries[None])


@cache
def register(name: str, function: Callable[..., object]) -> None:
    """Make an attention function known to transformers, once, under a name of our own; no name of theirs is changed."""
    from transformers import AttentionInterface  # brings all of its modelling code

    AttentionInterface.register(name, function)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    selfdraft: Plan | Attending | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Registered with transformers under NAME. Queries [1, heads, n, dim] -> ([1, n, heads, dim], None).

    Errors: UnsupportedModel when the plan did not arrive.
    """
    if selfdraft is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(selfdraft, Plan):
        return selfdraft.attend(layer, query, key, value, Scores(scale, sliding_window, softcap, s_aux)), None
    plan = selfdraft
    plan.calls.append((layer, sliding_window))
    for span in plan.spans:
        rows = slice(span.start, span.start + span.size)
        plan.cache.write(layer, span.slot, span.base, key[0, :, rows], value[0, :, rows])

    def say(group: Group, asked: Tensor, shared: int) -> Tensor:
        keys, values = _keys(plan.cache, layer, group)
        return kernel(asked, keys, values, group.mask(sliding_window, shared, query.dtype), scale, softcap, s_aux)

    return _spread(plan.groups, query, key.shape[1], value.shape[-1], say), None


def _spread(
    groups: list[Group], query: Tensor, key_heads: int, width: int, say: Callable[[Group, Tensor, int], Tensor]
) -> Tensor:
    """Hand each group its queries [lanes, key heads, shared * width, dim]; answers [1, n, heads, width] in row order.

    Query heads that read the same keys (`shared`) lie beneath each other, so keys are read once and never copied.
    """
    heads, count, dim = query.shape[1:]
    shared = heads // key_heads
    grouped = query.view(key_heads, shared, count, dim)
    if groups[0].whole:
        lane = groups[0].width
        if count == 1:
            padded = grouped.expand(-1, -1, lane, -1)  # one row needs no padding but itself
        else:
            padded = F.pad(grouped, (0, 0, 0, lane - count)) if lane > count else grouped
        said = say(groups[0], padded.reshape(1, key_heads, shared * lane, dim), shared)
        return said.view(1, heads, lane, width)[:, :, :count].transpose(1, 2)
    out = query.new_zeros(count, heads, width)
    for group in groups:
        asked = grouped[:, :, group.rows].view(key_heads, shared, group.lanes, group.width, dim)
        asked = asked.permute(2, 0, 1, 3, 4).reshape(group.lanes, key_heads, shared * group.width, dim)
        said = say(group, asked, shared).view(group.lanes, key_heads, shared, group.width, width)
        said = said.permute(0, 3, 1, 2, 4).reshape(group.lanes * group.width, heads, width)
        out[group.target] = said[group.write]
    return out[None]


def _keys(cache: KVCache, layer: int, group: Group) -> tuple[Tensor, Tensor]:
    """Keys and values [lanes, heads, length, dim] of a group."""
    if group.keys is None:
        return cache.view(layer, group.slot, group.length)
    return cache.gather(layer, group.slot, group.keys)


def kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of [lanes, key heads, rows, dim]: torch's own, or plain words for soft caps (Gemma 2) and sinks.

    `mask` [lanes, 1, rows, length] is added to the scores; `sinks` hold one logit per query head.
    """
    if softcap is None and sinks is None:
        if query.device.type != "cuda":
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        with sdpa_kernel(UNPLANNED):
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    scores = query @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        lanes, heads, rows, _ = scores.shape
        each = sinks.view(1, heads, -1, 1).repeat_interleave(rows // (sinks.numel() // heads), 2)
        scores = torch.cat([scores, each.view(1, heads, rows, 1).expand(lanes, -1, -1, -1).to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values
