"""A pass of fixed shape: a stock forward over a full sheet, whose attention reads and writes fixed memory."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfdraft.models.attention import Scores
from selfdraft.models.graph.plain_tree_attention import Attention, Reach
from selfdraft.models.graph.sheet import tensors


@dataclass(eq=False, slots=True)
class StaticPlan:
    """What a pass of fixed shape needs to know; travels to the attention function as `Plan` does.

    Nothing in it changes from pass to pass: what does is read from `sheet` on the device. So it holds the memory of
    keys and values that there was when it was made, as a graph does.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    stacks: SequenceOf[Tensor]
    """As in `StackedCache`."""
    sheet: Mapping[str, Tensor]
    reach: Reach
    attention: Attention
    calls: list[tuple[int, int | None]] = field(default_factory=list)
    """As in `Plan`; of the last time that the pass was run call by call."""
    hidden: Tensor | None = None
    """As in `Plan`."""
    _at: tuple[Tensor, Tensor] | None = None
    """Slots and places [rows, 1] of the rows."""
    _heads: dict[int, Tensor] = field(default_factory=dict)
    """Numbers [1, n] of n heads, by n."""

    def begin(self) -> None:
        """Put into place what was kept since the last pass, and note where the new rows go."""
        slots, source, to = tensors(self.sheet, "move_slot", "move_from", "move_to")
        for stack in self.stacks:
            stack[:, slots, :, to] = stack[:, slots, :, source]
        at, places = tensors(self.sheet, "slots", "places")
        self._at = at[:, None], places[:, None]
        counts = {strips.shape[1] for strips in self.keys.values()}
        self._heads = {count: torch.arange(count, device=at.device)[None] for count in counts}
        self.calls.clear()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Queries [1, heads, n, dim] -> [1, n, heads, dim of values]; keys and values go to their rows' places."""
        self.calls.append((layer, scores.window))
        assert self._at is not None, "a pass begins with `begin`"
        where = self._at[0], self._heads[key.shape[1]], self._at[1]
        keys, values = self.keys[layer], self.values[layer]
        keys.index_put_(where, key[0].transpose(0, 1))
        values.index_put_(where, value[0].transpose(0, 1))
        return self.attention(query[0].transpose(0, 1), keys, values, self.sheet, self.reach, scores)[None]
