"""Skip sets as text: the JSON format in which those of Draft & Verify were published, several named sets to a file.

{"llama-2-13b": {"attention": [3, 5, 6], "mlp": [6, 9]}}; a set may carry facts about itself beside the two lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from selfdraft.errors import OptionError
from selfdraft.types import Skip

Record = dict[str, Any]


def parse_sets(text: str, place: str) -> dict[str, Record]:
    """The named sets of a file with all their facts. Errors: OptionError names `place` and what is wrong."""
    try:
        sets = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{place} is not valid JSON ({error}); write it anew with 'selfdraft tune'") from error
    wanted = 'an object such as {"my-model": {"attention": [3, 4], "mlp": [5]}}'
    if not isinstance(sets, dict) or not sets:
        raise OptionError(f"{place} holds no skip set; it must be {wanted}")
    for name, record in sets.items():
        if not isinstance(record, dict):
            raise OptionError(f"{place}: {name!r} is no skip set; the file must be {wanted}")
        for kind in ("attention", "mlp"):
            blocks = record.get(kind)
            if not isinstance(blocks, list) or not all(type(i) is int and i >= 0 for i in blocks):
                raise OptionError(f"{place}: {kind!r} of {name!r} must be a list of block numbers, not {blocks!r}")
    return sets


def pick_set(sets: Mapping[str, Record], name: str, place: str) -> Record:
    """The set of that name; without a name the only one. Errors: OptionError lists the names."""
    if name in sets:
        return sets[name]
    if not name and len(sets) == 1:
        return next(iter(sets.values()))
    what = f"no set {name!r}" if name else f"{len(sets)} sets: name one as {place}#NAME"
    raise OptionError(f"{place} holds {what}; there are: {', '.join(sets)}")


def skip_of(record: Mapping[str, Any]) -> Skip:
    return Skip(frozenset(record["attention"]), frozenset(record["mlp"]))


def lists_of(skip: Skip) -> dict[str, list[int]]:
    """The two lists of the published format."""
    return {"attention": sorted(skip.attention), "mlp": sorted(skip.mlp)}


def checked(skip: Skip, layers: int, names: tuple[str, str] = ("skip_attention", "skip_mlp")) -> Skip:
    """The set, if a model of `layers` blocks has its blocks. Errors: OptionError names the block and the limit."""
    for name, indices in zip(names, (skip.attention, skip.mlp), strict=True):
        outside = [i for i in indices if type(i) is not int or not 0 <= i < layers]
        if outside:
            raise OptionError(f"{name} holds {outside[0]!r}: the model has blocks 0 to {layers - 1}")
    if not (skip.attention or skip.mlp):
        raise OptionError("the skip set is empty: drafting with the whole model can never be faster than decoding")
    return skip
