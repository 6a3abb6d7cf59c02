"""Skip sets as text: the JSON format in which those of Draft & Verify were published, several named sets to a file.

{"llama-2-13b": {"attention": [3, 5, 6], "mlp": [6, 9]}}; a set may carry facts about itself beside the two lists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from selfdraft.errors import OptionError
from selfdraft.files.atomic import whole_file
from selfdraft.types import JsonObject, Skip


def parse_sets(text: str, place: str) -> dict[str, JsonObject]:
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


def pick_set(sets: Mapping[str, JsonObject], name: str, place: str) -> JsonObject:
    """The set of that name; without a name the only one. Errors: OptionError lists the names."""
    if name in sets:
        return sets[name]
    if not name and len(sets) == 1:
        return next(iter(sets.values()))
    what = f"no set {name!r}" if name else f"{len(sets)} sets: name one as {place}#NAME"
    raise OptionError(f"{place} holds {what}; there are: {', '.join(sets)}")


def skip_of(record: JsonObject) -> Skip:
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


def load_sets(path: Path) -> dict[str, JsonObject]:
    """The named sets of a file in the published format. Errors: OptionError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError(f"{path} cannot be read: {why}") from error
    return parse_sets(text, str(path))


def given_skip(given: object, layers: int) -> Skip:
    """A set that was given as an option: a `Skip`, or what `read_skip` reads. Errors: OptionError."""
    if isinstance(given, Skip):
        return checked(given, layers)
    if not isinstance(given, str | Path):
        raise OptionError(f"skip_set={given!r} is no path; give 'FILE' or 'FILE#NAME'")
    return read_skip(given, layers)


def read_skip(place: str | Path, layers: int) -> Skip:
    """A set out of a JSON file, 'FILE' or 'FILE#NAME', for a model of `layers` blocks.

    Errors: OptionError for a file that cannot be read or holds no such set, or a set of a longer model.
    """
    file, _, name = str(place).rpartition("#")
    if not file or Path(place).is_file():
        file, name = str(place), ""
    try:
        text = Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError(f"skip_set {file!r} cannot be read: {why}; give the JSON file of a searched set") from error
    record = pick_set(parse_sets(text, file), name, file)
    return checked(skip_of(record), layers, (f"'attention' of {place}", f"'mlp' of {place}"))


def save_set(path: Path, name: str, record: Mapping[str, object]) -> None:
    """Put a set into a file under its name; the other sets of the file stay. Errors: OptionError."""
    sets = load_sets(path) if path.is_file() else {}
    write_json(path, {**sets, name: dict(record)})


def write_json(path: Path, value: object) -> None:
    """Write a document, lists of numbers on one line each. Errors: OptionError; then the old file is as it was."""
    check_writable(path)
    try:
        with whole_file(path) as part:
            part.write_text(_pretty(value) + "\n", "utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}; give another place") from error


def check_writable(path: Path) -> None:
    """Errors: OptionError when nothing can be written there; asked before hours of work, not after."""
    folder = path.parent
    if not folder.is_dir():
        raise OptionError(f"{path} cannot be written: there is no folder {str(folder)!r}; give the path of a file")
    if path.exists() and not path.is_file():  # moving a file onto a device would take its place
        raise OptionError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; give the path of a file")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OptionError(f"{path} cannot be written: permission denied; give another place")


def _pretty(value: object, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value and any(isinstance(each, dict | list) for each in value.values()):
        items = [f"{inner}{json.dumps(str(key))}: {_pretty(each, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(inner + _pretty(each, inner) for each in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
