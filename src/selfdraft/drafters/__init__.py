"""Whoever guesses: one file, one small class each. `NAMES` shows everything there is; outsiders join by entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from selfdraft import methods
from selfdraft.drafters.auto import Auto
from selfdraft.drafters.cascade import Cascade
from selfdraft.drafters.context import Context
from selfdraft.drafters.layer_skip import LayerSkip
from selfdraft.drafters.lookahead import Lookahead
from selfdraft.drafters.lookup import Lookup
from selfdraft.drafters.merged import MASKED, Merged
from selfdraft.drafters.none import NoDrafter
from selfdraft.drafters.prediction import Prediction
from selfdraft.drafters.quantised import Quantised
from selfdraft.drafters.recycling import Recycling
from selfdraft.drafters.s3d import S3D
from selfdraft.drafters.space import Space
from selfdraft.drafters.suffix import Suffix
from selfdraft.drafting.mixing import TaskProfile
from selfdraft.drafting.output_memory import MOST, Memory
from selfdraft.drafting.source_tree import SourceTree
from selfdraft.errors import OptionError
from selfdraft.protocols import Drafter, Target
from selfdraft.types import Rounded, bare

Factory = Callable[..., Drafter]

NAMES: dict[str, Factory] = {
    "none": NoDrafter,
    "lookup": Lookup,
    "suffix": Suffix,
    "context": Context,
    "recycling": Recycling,
    "prediction": Prediction,
    "lookahead": Lookahead,
    "layer_skip": LayerSkip,
    "quantised": Quantised,
    "s3d": S3D,
    "space": Space,
    "merged": Merged,
    "auto": Auto,
    "cascade": Cascade,
}


def table() -> dict[str, Factory]:
    """All drafters by name: our own and those that installed packages offer under `selfdraft.drafters`."""
    found = dict(NAMES)
    for point in methods.offered():
        found.setdefault(point.name, point.load())
    return found


def options_of(factory: Factory) -> list[str]:
    """Names of the options a drafter takes."""
    return [name for name, p in inspect.signature(factory).parameters.items() if p.kind is p.KEYWORD_ONLY]


def find(name: str, options: Mapping[str, object]) -> Factory:
    """The class behind a name that takes these options. Errors: OptionError names what there is."""
    known = table()
    return known[methods.check(name, options, {other: options_of(made) for other, made in known.items()})]


def build(name: str, target: Target, options: Mapping[str, object] | None = None) -> Drafter:
    """The drafter `name` for a target. Errors: OptionError for an unknown name or option, or a value out of range."""
    given = {option: bare(value) for option, value in (options or {}).items()}
    factory = find(name, given)
    try:
        return factory(target, **given)
    except TypeError as error:
        raise OptionError(f"drafter {name!r}: {error}") from error


def with_memory(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """The options with a memory, of the usual size if none is given. Errors: OptionError when `name` keeps none."""
    if "memory" not in options_of(find(name, options)):
        able = ", ".join(known for known, factory in table().items() if "memory" in options_of(factory))
        raise OptionError(f"drafter {name!r} keeps no memory of earlier outputs; these do: {able}")
    return {**options, "memory": options.get("memory") or MOST}


def learned_by(drafter: Drafter) -> TaskProfile:
    """What a drafter learned about the text so far. Errors: OptionError when it learns nothing that could be kept."""
    tree = getattr(drafter, "tree", None)
    if not isinstance(tree, SourceTree):
        raise OptionError("this drafter keeps no task profile; take auto, merged or cascade")
    return tree.credit.learned()


def copy_bits(drafter: Drafter) -> int | None:
    """Bits of a weight of the rounded copy that a drafter drafts with; None where it has none."""
    short = getattr(getattr(drafter, "inner", None) or drafter, "short", None)
    return short.bits if isinstance(short, Rounded) else None


def masks_used(drafter: Drafter) -> tuple[str, ...]:
    """The methods whose trained masks a drafter takes."""
    if isinstance(drafter, S3D | Space):
        return tuple(name for name, made in NAMES.items() if made is type(drafter))
    tree = getattr(drafter, "tree", None)
    return (MASKED,) if isinstance(tree, SourceTree) and tree.groups is not None else ()


def memory_of(drafter: Drafter) -> Memory:
    """Errors: OptionError when the drafter's memory is off, or it has none."""
    memory = getattr(drafter, "memory", None)
    if not isinstance(memory, Memory):
        raise OptionError('the drafter has no memory that is on; take {"method": "merged", "memory": TOKENS}')
    return memory
