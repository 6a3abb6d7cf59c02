"""Task profiles: what a drafter learned about one kind of text, as a file for later runs on text of this kind.

It holds counts of how often each source of drafts was right, and no token of any text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from selfdraft.drafting.mixing import CLASSES, COARSE, LEVELS, Learned, TaskProfile
from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import write_json
from selfdraft.types import JsonObject

FORMAT = [1, CLASSES, LEVELS]
"""Of the file, and what depths and chances are counted in."""
NAMED = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A name of a kind of text."""
MOST = 100_000
"""Most counts of a file; a drafter that decoded a million tokens has some thousands."""


def check_task_name(name: str, where: str) -> None:
    """Errors: OptionError for a name that could not stand in a file's name and in a request."""
    if not NAMED.fullmatch(name):
        raise OptionError(f"{where}: {name!r} is no name of a kind of text: give 1 to 64 of A-Z a-z 0-9 . _ -")


def read_task_profile(place: str | Path | None) -> TaskProfile | None:
    """The profile in a file that `write_task_profile` wrote; None without a file.

    Errors: OptionError says what is wrong with the file.
    """
    if place is None:
        return None
    if not isinstance(place, str | Path):
        raise OptionError(f"task_profile={place!r} is no path; give the file that 'selfdraft tune task' wrote")
    if not str(place) or "\0" in str(place):
        raise OptionError(f"task_profile={place!r} names no file; give the one that 'selfdraft tune task' wrote")
    try:
        value = json.loads(Path(place).expanduser().read_text("utf-8"))
    except OSError as error:
        raise OptionError(
            f"task_profile {str(place)!r} cannot be read: {error.strerror}; 'selfdraft tune task' writes one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"task_profile {str(place)!r} is no JSON ({error}): write it anew") from error
    known = value.get("selfdraft_task_profile") if isinstance(value, dict) else None
    if known != FORMAT:
        raise OptionError(
            f"{place} is no task profile of this version (format {known!r}, not {FORMAT}): write it anew with "
            "'selfdraft tune task'"
        )
    try:
        return _profile(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OptionError(f"task_profile {str(place)!r} is broken ({error}): write it anew") from error


def write_task_profile(place: Path, learned: TaskProfile, **facts: object) -> None:
    """Write what was learned, and facts about it for a reader, whole or not at all. Errors: OptionError."""
    numbers = {
        "alone": {name: _rounded(cells) for name, cells in learned.alone.items()},
        "families": [[list(family), *_rounded([mean])] for family, mean in learned.families],
        "together": _rounded(learned.together),
        "paths": _rounded(learned.paths),
    }
    write_json(place, {"selfdraft_task_profile": FORMAT, **facts, **numbers})


def _rounded(cells: Iterable[Iterable[float]]) -> list[list[float]]:
    return [[number if isinstance(number, int) else float(f"{number:.5g}") for number in cell] for cell in cells]


def _profile(value: JsonObject) -> TaskProfile:
    """Errors: AttributeError, KeyError, TypeError, ValueError for what no drafter has written."""
    alone = {str(name): [_learned(cell) for cell in cells] for name, cells in value["alone"].items()}
    together = [_learned(cell) for cell in value["together"]]
    if any(key < COARSE for key, *_ in together):
        raise ValueError("a count of all sources together names no source")
    families = [(tuple(map(_whole, family)), _measured(*mean)) for family, mean in value["families"]]
    foretold, accepted = ([_positive(number) for number in part] for part in value["paths"])
    if not len(foretold) == len(accepted) == CLASSES:
        raise ValueError(f"paths must have {CLASSES} classes of depth")
    if len(together) + len(families) + sum(map(len, alone.values())) > MOST:
        raise ValueError(f"more than {MOST} counts")
    return TaskProfile(alone, families, together, (foretold, accepted))


def _learned(cell: list[float]) -> Learned:
    number, *mean = cell
    return (_whole(number), *_measured(*mean))


def _measured(guess: float, total: float, weight: float) -> tuple[float, float, float]:
    if not (0 <= guess <= 1 and 0 <= total <= weight * 1.001 + 1e-6 and weight < 1e9):
        raise ValueError(f"{[guess, total, weight]} is no chance and its measurements")
    return float(guess), float(total), float(weight)


def _whole(number: float) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        raise ValueError(f"{number!r} is not the number of a cell")
    return number


def _positive(number: float) -> float:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{number!r} is not a number above 0")
    return float(number)
