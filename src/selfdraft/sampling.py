"""Sampling options made ready for one checkpoint: words and stops in its token ids, and the defaults it comes with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from selfdraft.errors import OptionError, RequestError, shown
from selfdraft.types import JsonObject, SamplingParams

if TYPE_CHECKING:
    from selfdraft.models.reference import Tokenizer

DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What is taken from a checkpoint's generation config."""
FILE = "generation_config.json"


def spread(params: object, count: int, default: SamplingParams) -> list[SamplingParams]:
    """One params for each of `count` prompts; None is `default`. Errors: RequestError."""
    several = isinstance(params, Iterable) and not isinstance(params, Mapping | str | bytes)
    given = list(params) if several and isinstance(params, Iterable) else [params] * count
    if len(given) != count:
        raise RequestError(f"{len(given)} sampling params for {count} prompts; give one, or one for each")
    for one in given:
        if one is not None and not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params={shown(one)}: give SamplingParams(...), or a list with one for each")
    return [one if isinstance(one, SamplingParams) else default for one in given]


def bad_word_ids(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """Token ids of bad words as they are given, at the start of a text and after a space.

    Whitespace is also looked at inside a text: some tokenizers put a mark of their own at the start of one.
    Errors: RequestError for a word without any token.
    """
    found: set[tuple[int, ...]] = set()
    for word in words:
        inner = word.strip()
        ids = {tuple(encode(form)) for form in ((word, inner, f" {inner}") if inner else (word,))}
        if not inner:
            before, whole = encode("a"), encode(f"a{word}")
            ids |= {tuple(whole[len(before) :])} if whole[: len(before)] == before else set()
        ids.discard(())
        if not ids:
            raise RequestError(f"bad_words: this tokenizer has no token for {word!r}; leave it out")
        found |= ids
    return sorted(found)


def stop_tokens(stops: Iterable[str], tokenizer: Tokenizer, known: Callable[[int], bool]) -> dict[int, str]:
    """Stop strings that are exactly one special token, by its id: the text leaves it out, so only the id can tell."""
    found: dict[int, str] = {}
    for stop in stops:
        token = tokenizer.convert_tokens_to_ids(stop)
        if not isinstance(token, int) or not known(token) or tokenizer.decode([token], skip_special_tokens=True):
            continue
        if tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False) == stop:
            found[token] = stop
    return found


def generation_defaults(settings: Mapping[str, object]) -> SamplingParams:
    """The params of requests that give none, out of the settings of a generation config.

    A checkpoint that samples and names no temperature means 1, as in transformers. Errors: OptionError.
    """
    options: JsonObject = {name: settings.get(name) for name in DEFAULTS}
    if options["temperature"] is None and settings.get("do_sample") is True:
        options["temperature"] = 1.0
    try:
        return SamplingParams(**options)
    except OptionError as error:
        raise OptionError(f"the generation config cannot be used: {error}; give generation_config='none'") from error


def read_generation_config(source: str | Path) -> dict[str, object] | None:
    """The settings that are asked for: none for 'none', None for 'auto' (the model's), else a folder's.

    Errors: OptionError.
    """
    if source in ("none", "auto"):
        return {} if source == "none" else None
    ways = f"give 'none', 'auto' or a folder with a {FILE}"
    if not isinstance(source, str | Path):
        raise OptionError(f"generation_config={shown(source)}: {ways}")
    file = Path(source).expanduser() / FILE
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise OptionError(f"generation_config={str(source)!r}: {file} cannot be read; {ways}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{file} is not JSON ({error}); correct it, or give generation_config='none'") from error
    if not isinstance(found, dict):
        raise OptionError(f"{file} holds no JSON object; correct it, or give generation_config='none'")
    return found
