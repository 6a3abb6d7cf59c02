"""The passes of a kept start: the whole one, and the one with masks among its rows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch.nn.functional as F
from torch import Tensor, nn

from selfdraft.models.adapters import Ends, MaskAdapter
from selfdraft.models.runner.packing import Packer
from selfdraft.models.runner.trace import Traced
from selfdraft.models.start.kept import KeptStart, Masked
from selfdraft.models.start.tape_file import packed, unpacked
from selfdraft.models.start.weights import MappedWeights, find_place, places_in
from selfdraft.models.target import HFTarget

if TYPE_CHECKING:
    from selfdraft.models.reference import Model


class Passes(TypedDict):
    """The arguments of a target that say how its passes are run."""

    adapters: SequenceOf[MaskAdapter]
    packer: Packer
    traced: Traced
    masked: Traced | None
    ends: Ends | None


def passes_of(kept: KeptStart, mapped: MappedWeights, adapters: SequenceOf[MaskAdapter]) -> Passes:
    """What was kept of the passes, over mapped weights, each of which is packed once. Errors: those of `unpacked`."""
    packer, facts = Packer(), kept.facts
    fitted = [one.fitted(facts.dtype, facts.device) for one in adapters]
    made = Passes(adapters=fitted, packer=packer, traced=unpacked(kept.tape, mapped, packer), masked=None, ends=None)
    if kept.masked is not None:
        made["masked"] = unpacked(kept.masked.tape, mapped, packer, _parts(fitted))
        table, head = (mapped.tensor(place) for place in (kept.masked.table, kept.masked.head))
        made["ends"] = Ends(partial(F.embedding, weight=table), head)
    return made


def masked_of(target: HFTarget, model: Model, mapped: MappedWeights, packer: Packer) -> Masked | None:
    """What passes with masks need. None where no adapter acts in a whole pass, and where an end of the model is more
    than a table of weights that lies in the files. Errors: NotKept."""
    if all(one.whole_spans for one in target.adapters) or target.masked is None:
        return None
    table, head = target.ends
    if type(table) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
        return None
    known = places_in(mapped.folder)
    begin, end = (find_place(weight, [*known], known, mapped) for weight in (table.weight, head.weight))
    if begin is None or end is None:
        return None
    return Masked(packed(target.masked, model, mapped, packer, _parts(target.fitted)), begin, end)


def _parts(adapters: SequenceOf[MaskAdapter]) -> list[Tensor]:
    return [part for one in adapters for part in one.parts]
