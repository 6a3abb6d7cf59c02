"""A search's memory: an Optuna study in one SQLite file, which a killed search takes up again where it stopped.

The file appears whole, with everything the search was set up with; then one transaction books one evaluated set. So
there are no unfinished trials in it, whenever the search is killed.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import check_writable
from selfdraft.types import JsonObject, Skip

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

NAME = "layer_skip"
SETUP = "setup"


@dataclass(frozen=True, slots=True)
class Scored:
    """A set that was evaluated. `stage` says who proposed it: single, pair, seed, sampler or neighbour."""

    skip: Skip
    stage: str
    agreement: float
    """Share of places at which the skipped model says what the whole one says."""
    c: float
    drafts: int
    """The draft length that pays most, by the formula."""
    speed: float
    """Speed-up by the formula, at that length."""
    value: float
    """What the search maximises."""

    def facts(self) -> dict[str, float]:
        return {"agreement": self.agreement, "c": self.c, "num_speculative_tokens": self.drafts, "speed": self.speed}


def needs_optuna() -> ModuleType:
    """The library behind the search. Errors: OptionError names the extra to install."""
    try:
        import optuna
    except ImportError as error:
        raise OptionError("the search needs Optuna: pip install 'selfdraft[tune]'") from error
    library: ModuleType = optuna
    return library


def switches(skip: Skip, layers: int) -> dict[str, bool]:
    """The 2 x layers switches by name; true leaves the sublayer out."""
    kinds = (("attention", skip.attention), ("mlp", skip.mlp))
    return {f"{kind}.{i}": i in blocks for kind, blocks in kinds for i in range(layers)}


def skip_from(params: Mapping[str, bool]) -> Skip:
    on = [name.partition(".") for name, value in params.items() if value]
    return Skip(*(frozenset(int(i) for kind, _, i in on if kind == wanted) for wanted in ("attention", "mlp")))


class Study:
    """The sets evaluated so far, and facts by name. Errors of the file are OptionErrors of one line."""

    def __init__(self, path: Path, layers: int) -> None:
        self.path, self.layers = path, layers
        self.optuna = needs_optuna()
        with blaming(path):
            _check_is_study(path)
            self._storage = self._open(path)
            self._study = self.optuna.load_study(study_name=NAME, storage=self._storage)
            self._facts = dict(self._study.user_attrs)
            trials = self._study.get_trials(deepcopy=False)
        self.scored = [_scored(trial) for trial in trials]
        self.known = {one.skip: one for one in self.scored}

    @classmethod
    def create(cls, path: Path, layers: int, setup: JsonObject) -> Study:
        """A new study; its file appears only when `setup` is in it."""
        check_writable(path)
        beside = path.with_name(path.name + ".new")
        optuna = needs_optuna()
        with blaming(path):
            beside.unlink(missing_ok=True)
            try:
                storage = cls._open(beside)
                study = optuna.create_study(study_name=NAME, storage=storage, direction="maximize")
                study.set_user_attr(SETUP, dict(setup))
                storage.remove_session()
                storage.engine.dispose()
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)
                beside.with_name(beside.name + "-journal").unlink(missing_ok=True)
        return cls(path, layers)

    @staticmethod
    def _open(path: Path) -> RDBStorage:
        return needs_optuna().storages.RDBStorage(f"sqlite:///{path}")

    @property
    def setup(self) -> JsonObject:
        setup: JsonObject = self._facts[SETUP]
        return setup

    def fact(self, name: str) -> JsonObject | None:
        """A fact noted before, or None."""
        return self._facts.get(name)

    def note(self, name: str, fact: JsonObject) -> None:
        with blaming(self.path):
            self._study.set_user_attr(name, fact)
        self._facts[name] = fact

    def book(self, one: Scored) -> None:
        """Remember an evaluated set, in one transaction."""
        with blaming(self.path):
            self._study.add_trial(self.trial(one))
        self.scored.append(one)
        self.known.setdefault(one.skip, one)

    def trial(self, one: Scored) -> FrozenTrial:
        """The set as a finished trial of Optuna."""
        on = self.optuna.distributions.CategoricalDistribution([False, True])
        params = switches(one.skip, self.layers)
        facts = {"stage": one.stage, **one.facts()}
        return self.optuna.create_trial(
            params=params, distributions=dict.fromkeys(params, on), value=one.value, user_attrs=facts
        )


def _check_is_study(path: Path) -> None:
    """Asked before Optuna opens the file, for it would put its tables into any file. Errors: sqlite3.Error."""
    place = f"{path.absolute().as_uri()}?mode=rw"  # never make an empty file
    with closing(sqlite3.connect(place, uri=True)) as connection:
        if not connection.execute("SELECT 1 FROM studies WHERE study_name = ?", (NAME,)).fetchone():
            raise sqlite3.OperationalError("no such study")


def _scored(trial: FrozenTrial) -> Scored:
    facts = trial.user_attrs
    return Scored(
        skip_from(trial.params),
        facts["stage"],
        facts["agreement"],
        facts["c"],
        facts["num_speculative_tokens"],
        facts["speed"],
        trial.value,
    )


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the study's file into one line. Errors: OptionError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise OptionError(_blame(path, str(error))) from error
    except Exception as error:  # Optuna and SQLAlchemy wrap what SQLite says, each in its own way
        if type(error).__module__.partition(".")[0] not in ("optuna", "sqlalchemy", "builtins"):
            raise
        raise OptionError(_blame(path, _root(error))) from error


def _root(error: BaseException) -> str:
    while (cause := error.__cause__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _blame(path: Path, said: str) -> str:
    if any(sign in said for sign in ("not a database", SETUP, "no such table", "no such study")):
        return f"{path} is no study of 'selfdraft tune': give another --study, or move the file away"
    if "full" in said or "disk I/O" in said or "No space" in said or "too large" in said:
        return f"study {path} cannot be written: the disk is full; what was booked before stays. Free some space"
    return f"study {path} cannot be used ({said}): give another --study"
