"""What a checkpoint's weights say of its configuration: keys that are missing, left over, or of another size.

transformers fills what is missing with random numbers and drops what is left over, and such a model writes gibberish.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TypedDict

from torch import nn
from transformers import PreTrainedModel

from selfdraft.errors import LoadError
from selfdraft.models.kinds import is_quantised

_log = logging.getLogger("selfdraft")
COMPUTED = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|attn\.bias|attention\.bias|[kv]_scale|_extra_state)$"
)
"""Keys of old checkpoints that hold nothing learned: rotary tables, causal masks, scales of an 8-bit cache."""
SHOWN = 3
Stacks = list[tuple[str, int]]


class LoadingInfo(TypedDict):
    """What transformers says of the keys that it read; a mismatched one with its size in the file and the model's."""

    missing_keys: Iterable[str]
    unexpected_keys: Iterable[str]
    mismatched_keys: Iterable[tuple[str, SequenceOf[int], SequenceOf[int]]]


def check_weights(where: str | Path, model: PreTrainedModel, info: LoadingInfo) -> None:
    """Refuse a model that was not read whole; `info` is the loading info of transformers' `from_pretrained`.

    What is left over and changes nothing is logged in one line. Errors: LoadError names the first keys.
    """
    stacks = _stacks(model)
    missing = _in_order(key for key in info["missing_keys"] if not COMPUTED.search(key))
    unused = _in_order(key for key in info["unexpected_keys"] if not COMPUTED.search(key))
    if odd := sorted(info["mismatched_keys"], key=lambda one: _numbered(one[0])):
        key, found, wanted = odd[0]
        raise LoadError(
            f"{where}: {len(odd)} weights have other sizes than the configuration says, the first is {key}: "
            f"{_size(found)} in the file, {_size(wanted)} by the configuration; take the config.json of this very model"
        )
    if missing:
        raise LoadError(
            f"{where}: {len(missing)} weights are missing, the first are {_first(missing)}; "
            f"{_wrapped(missing, unused) or _short(stacks, missing) or 'it is not a whole model'}"
        )
    if beyond := [key for key in unused if _beyond(stacks, key, _extra(model))]:
        name, most = _stack(stacks, beyond[0]) or ("layers", 0)
        raise LoadError(
            f"{where}: the file has more layers than the {most} of {name} in the configuration: {len(beyond)} weights "
            f"have no place, the first are {_first(beyond)}; take the config.json of this very model"
        )
    paths = {path for path, _ in model.named_modules() if path}
    if inner := [] if is_quantised(model) else [key for key in unused if _inside(stacks, paths, key)]:
        raise LoadError(
            f"{where}: {len(inner)} weights have no place in the model, the first are {_first(inner)}; "
            "it is another model than the configuration says: take the config.json of this very model"
        )
    if unused:
        _log.warning("%s: %d weights are not used, the first are %s", where, len(unused), _first(unused))


def _in_order(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=_numbered)


def _numbered(key: str) -> list[tuple[int, str]]:
    """A sorting key: numbers by value, so that layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _first(keys: SequenceOf[str]) -> str:
    return ", ".join(keys[:SHOWN])


def _size(shape: Iterable[int]) -> str:
    return "x".join(str(int(side)) for side in shape)


def _wrapped(missing: SequenceOf[str], unused: SequenceOf[str]) -> str | None:
    """What to say when the keys are all there, behind a prefix that a wrapper put before them."""
    first = next((key for key in unused if key.endswith("." + missing[0])), None)
    if first is None:
        return None
    prefix = first.removesuffix(missing[0])
    if not {prefix + key for key in missing} <= {*unused}:
        return None
    return (
        f"in the file they begin with {prefix!r}: save the model inside that wrapper, or take the prefix off the keys"
    )


def _short(stacks: Stacks, missing: SequenceOf[str]) -> str | None:
    """What to say when exactly the last layers are missing."""
    holding = {_stack(stacks, key) for key in missing}
    stack = holding.pop()
    if holding or stack is None:
        return None
    name, most = stack
    numbers = {_number(name, key) for key in missing}
    first = min(numbers)
    if not first or numbers != {*range(first, most)}:
        return None
    return f"the configuration says {most} layers and the file has {first}: take the config.json of this very model"


def _stacks(model: PreTrainedModel) -> Stacks:
    """The lists of modules and their lengths, each as a file's keys may spell it."""
    found: Stacks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            short = path.removeprefix(f"{model.base_model_prefix}.")  # checkpoints of the bare base model leave it out
            found += [(name, len(module)) for name in (path, short)]
    return found


def _stack(stacks: Stacks, key: str) -> tuple[str, int] | None:
    """The list of modules that a key is in or behind, as the key spells it, and its length."""
    return next((one for one in stacks if re.match(rf"{re.escape(one[0])}\.\d+\.", key)), None)


def _number(name: str, key: str) -> int:
    return int(key.removeprefix(f"{name}.").partition(".")[0])


def _extra(model: PreTrainedModel) -> int:
    """Prediction layers that some models carry behind the last one."""
    return getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0


def _beyond(stacks: Stacks, key: str, extra: int) -> bool:
    """True for a layer behind the last one and the `extra` ones that may stand there."""
    stack = _stack(stacks, key)
    return stack is not None and _number(stack[0], key) >= stack[1] + extra


def _inside(stacks: Stacks, paths: AbstractSet[str], key: str) -> bool:
    """True for a weight of a module that takes part, `paths` being those of all: it would compute otherwise with it."""
    stack = _stack(stacks, key)
    if stack is not None:
        return _number(stack[0], key) < stack[1]
    return key.rpartition(".")[0] in paths
