"""Names and options of the drafters, and the errors about them: readable without torch, so that errors come at once.

A test holds that the table says what the classes take.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from selfdraft.errors import OptionError

GROUP = "selfdraft.drafters"
"""The entry points under which installed packages offer drafters."""
SPLITS = "lookahead"
"""The drafter whose rows several processes can share."""
ALIASES = {"ngram": "lookup", "prompt_lookup": "lookup", "plain": "none"}
"""Names users know from other engines."""
TREE = ("num_speculative_tokens", "min_probability")
SHORT_PASS = ("num_speculative_tokens", "confidence_threshold", "exit_policy", "target_acceptance_rate", "adaptive")
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lookup": ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"),
    "suffix": ("num_speculative_tokens", "suffix_min", "factor"),
    "context": TREE,
    "recycling": TREE,
    "prediction": TREE,
    "lookahead": ("window_size", "ngram_size", "guess_set_size", "pool_from_prompt", "adaptive"),
    "layer_skip": ("skip_attention", "skip_mlp", "exit_layer", "skip_set", *SHORT_PASS),
    "quantised": ("bits", *SHORT_PASS),
    "s3d": ("skip_width", "num_masks", "num_speculative_tokens", "branches", "min_probability"),
    "space": ("num_speculative_tokens", "branches", "mask_groups", "min_probability"),
    "merged": ("num_speculative_tokens", "memory", "recycling", "masks", "task_profile", "min_probability"),
    "auto": ("num_speculative_tokens", "memory", "recycling", "masks", "bits", "skip_set", "s3d", "task_profile"),
    "cascade": ("bits", "num_speculative_tokens", "memory", "recycling", "task_profile"),
}
"""The built-in drafters and the options that each one takes."""


def drafter_of(drafter: str | None, config: Mapping[str, object] | None) -> tuple[str, dict[str, object]]:
    """Name and options out of the two ways to give them. Errors: OptionError when they disagree."""
    if not isinstance(drafter, str | None):
        raise OptionError(f"drafter={drafter!r} is no text: give a name, such as 'auto'")
    if config is not None and not (isinstance(config, Mapping) and all(isinstance(name, str) for name in config)):
        raise OptionError(f"speculative_config={config!r}: give a dict of options, such as {{'method': 'auto'}}")
    options = dict(config or {})
    method = options.pop("method", None)
    if method is not None and not isinstance(method, str):
        raise OptionError(f"method={method!r} in the speculative config is not a name")
    if method and drafter and method != drafter:
        raise OptionError(f"drafter {drafter!r} and method {method!r} of the speculative config disagree")
    if options and not (method or drafter):
        raise OptionError(f'the speculative config gives {", ".join(options)} but no "method"; name the drafter there')
    return drafter or method or "auto", options


def splittable(drafter: str | None, config: Mapping[str, object] | None) -> tuple[str, dict[str, object]]:
    """Name and options of a drafter whose rows ranks can share, so that all draft alike; plain decoding needs none.

    Errors: OptionError for another drafter, or an option that follows each rank's own clock.
    """
    name, options = drafter_of(drafter or (None if (config or {}).get("method") else SPLITS), config)
    if ALIASES.get(name, name) == "none":
        return name, options
    if name != SPLITS:
        raise OptionError(f"lookahead parallelism splits the window of {SPLITS!r}; drafter {name!r} has none to split")
    if options.get("adaptive"):
        raise OptionError(
            "adaptive=true follows the clock of each rank, and ranks would draft differently: leave it out; the sizes "
            "stay as they are given"
        )
    return name, {**options, "adaptive": False}


def check(name: str, options: Mapping[str, object], known: Mapping[str, SequenceOf[str]]) -> str:
    """The name in `known` that `name` stands for; it takes these options. Errors: OptionError names what there is."""
    real = ALIASES.get(name, name)
    if real not in known:
        near = difflib.get_close_matches(name, [*known, *ALIASES], 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise OptionError(f"there is no drafter {name!r}{hint} There are: {', '.join(known)}")
    for option in options:
        if option not in known[real]:
            owners = [other for other, takes in known.items() if option in takes]
            whose = f"it belongs to {', '.join(owners)}" if owners else "no drafter has it"
            takes = ", ".join(known[real]) or "none"
            raise OptionError(f"drafter {name!r} has no option {option!r}: {whose}. Its options: {takes}")
    return real


def check_early(drafter: str | None, config: Mapping[str, object] | None) -> None:
    """Names of drafter and options, before anything heavy is imported.

    Where other packages offer drafters, the whole check of `selfdraft.drafters.find` comes later. Errors: OptionError.
    """
    name, options = drafter_of(drafter, config)
    if ALIASES.get(name, name) in OPTIONS or not offered():
        check(name, options, OPTIONS)


@cache
def offered() -> tuple[EntryPoint, ...]:
    """Drafters of other packages. Looked up once: the search reads the files of every installed package."""
    return tuple(entry_points(group=GROUP))
