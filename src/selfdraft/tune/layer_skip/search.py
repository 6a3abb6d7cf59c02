"""The search for a skip set: each sublayer alone, nested sets of the cheapest, a Bayesian search, the neighbours.

Source: Zhang et al., "Draft & Verify" (arXiv 2309.08168), section 3.2: Bayesian optimisation over 2L switches. There
every trial is a timed generation; here it is one teacher-forced pass, and its speed is the formula E / (m c + t_v).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, combinations
from typing import TYPE_CHECKING

from selfdraft.drafters.layer_skip import usual_skip
from selfdraft.errors import OptionError
from selfdraft.tune.layer_skip.study import Scored, Study
from selfdraft.tune.layer_skip.teacher_forcing import Forcing
from selfdraft.tune.passes import Costs
from selfdraft.tune.speedup import best_length, expected_tokens
from selfdraft.types import Skip

if TYPE_CHECKING:
    import optuna

NEIGHBOURS = 4
"""The last quarter of the trials goes to the neighbours of the best set."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Agreement of a set by one pass, and what it is worth.

    `most`: longest draft. `max_cost`: seek the best agreement among sets of at most this c, not the best speed.
    """

    forcing: Forcing
    costs: Costs
    most: int
    max_cost: float | None = None

    def score(self, skip: Skip, stage: str) -> Scored:
        return self.worth(skip, stage, self.forcing.draft(skip).agreement)

    def worth(self, skip: Skip, stage: str, agreement: float) -> Scored:
        c = self.costs.c(skip)
        verify = [self.costs.verify(drafts) for drafts in range(self.most + 1)]
        drafts, speed = best_length(lambda m: expected_tokens(agreement, m), self.costs.draft(skip), verify, self.most)
        value = speed
        if self.max_cost is not None:
            value = agreement if c <= self.max_cost else agreement - 1 - (c - self.max_cost)
        return Scored(skip, stage, agreement, c, drafts, speed, value)


class Search:
    """Books scored sets into a study. What comes next depends only on the seed and on what is booked."""

    def __init__(self, study: Study, scorer: Scorer, *, trials: int, seed: int = 0, sampler: str = "tpe") -> None:
        self.study, self.scorer, self.trials = study, scorer, trials
        self.seed, self.layers = seed, study.layers
        self._proposer = _Proposer(study, sampler)

    @property
    def total(self) -> int:
        """Evaluations from the first to the last."""
        return 2 * self.layers + self.trials

    def run(self) -> Iterator[Scored]:
        """Evaluate what is not booked yet; yields every set of the search, those known from before first."""
        yield from [one for one in self.study.scored if one.stage != "pair"][: self.total]
        singles = {one.skip for one in self._staged("single")}
        for skip in singles_of(self.layers):
            if skip not in singles:
                yield self._book(skip, "single")
        seeds = self.seeds()
        while (done := len(self.tried())) < self.trials:
            tried = {one.skip for one in self.tried()} | {*singles_of(self.layers), Skip()}
            fresh = [skip for skip in seeds if skip not in tried]
            if len(tried) == 4**self.layers:
                return  # nothing is left to try
            if fresh:
                yield self._book(fresh[0], "seed")
            elif done >= self.trials - self.trials // NEIGHBOURS:
                yield self._book(self._neighbour(tried), "neighbour")
            else:
                wanted = self._proposer.ask(f"{self.seed}:{done}")
                yield self._book(self._untried(wanted, tried, done), "sampler")

    def pairs(self) -> Iterator[Scored]:
        """Every two sublayers together, for evidence."""
        booked = {one.skip: one for one in self._staged("pair")}
        for one, other in combinations(singles_of(self.layers), 2):
            skip = Skip(one.attention | other.attention, one.mlp | other.mlp)
            yield booked.get(skip) or self._book(skip, "pair")

    def _staged(self, stage: str) -> list[Scored]:
        return [one for one in self.study.scored if one.stage == stage]

    def tried(self) -> list[Scored]:
        """All sets of the search proper; the ranking and the pairs do not count."""
        return [one for one in self.study.scored if one.stage not in ("single", "pair")]

    def best(self) -> list[Scored]:
        """Best first; of equal ones the first found."""
        found: dict[Skip, Scored] = {}
        for one in self.study.scored:
            if one.stage != "pair":
                found.setdefault(one.skip, one)
        return sorted(found.values(), key=lambda one: -one.value)

    def _book(self, skip: Skip, stage: str) -> Scored:
        known = self.study.known.get(skip)
        one = self.scorer.worth(skip, stage, known.agreement) if known else self.scorer.score(skip, stage)
        self.study.book(one)
        return one

    def ranking(self) -> list[Scored]:
        """The single sublayers, the least agreement lost for the time saved first."""
        return sorted(self._staged("single"), key=lambda one: (1 - one.agreement) / max(1 - one.c, 1e-9))

    def seeds(self) -> list[Skip]:
        """The usual pattern, and nested sets of the best-ranked sublayers."""
        nested, skip = [], Skip()
        for one in self.ranking():
            skip = Skip(skip.attention | one.skip.attention, skip.mlp | one.skip.mlp)
            nested.append(skip)
        return [usual_skip(self.layers), *nested[1:-1]]

    def _untried(self, skip: Skip, tried: set[Skip], number: int) -> Skip:
        """The set itself, or one a few random switches away."""
        draw = random.Random(f"{self.seed}:{number}")
        while skip in tried:
            skip = flipped(skip, draw.randrange(2 * self.layers), self.layers)
        return skip

    def _neighbour(self, tried: set[Skip]) -> Skip:
        """The first untried set one switch, then one swap, away from the best; then from the second best."""
        for one in self.best():
            for skip in chain(neighbours(one.skip, self.layers), swaps(one.skip, self.layers)):
                if skip not in tried:
                    return skip
        return self._untried(Skip(), tried, len(tried))


class _Proposer:
    """What Optuna would try next. Its sampler is seeded anew for every question, so a resumed search asks the same."""

    def __init__(self, study: Study, sampler: str) -> None:
        self.study, self.optuna, self.name = study, study.optuna, sampler
        self._memory: optuna.Study | None = None
        self._told = 0

    def ask(self, seed: str) -> Skip:
        if self._memory is None:
            self._memory = self.optuna.create_study(direction="maximize")
        told = [one for one in self.study.scored if one.stage != "pair"]
        self._memory.add_trials([self.study.trial(one) for one in told[self._told :]])
        self._told = len(told)
        self._memory.sampler = self._make(random.Random(seed).randrange(2**31))
        trial = self._memory.ask({name: self._on() for name in self.study.trial(told[0]).params})
        skip = Skip(*(frozenset(i for i in range(self.study.layers) if trial.params[f"{kind}.{i}"]) for kind in KINDS))
        self._memory.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return skip

    def _on(self) -> optuna.distributions.CategoricalDistribution:
        return self.optuna.distributions.CategoricalDistribution([False, True])

    def _make(self, seed: int) -> optuna.samplers.BaseSampler:
        samplers = self.optuna.samplers
        if self.name == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0, constant_liar=False)
        return samplers.GPSampler(seed=seed, n_startup_trials=0)


def check_sampler(name: str) -> None:
    """Errors: OptionError for a sampler that is unknown or lacks its library."""
    if name not in ("tpe", "gp"):
        raise OptionError(f"--sampler {name!r} is unknown; there are tpe and gp")
    if name == "gp" and find_spec("scipy") is None:  # Optuna's GP sampler is built on it
        raise OptionError("--sampler gp needs scipy: pip install scipy, or take --sampler tpe")


KINDS = ("attention", "mlp")


def singles_of(layers: int) -> list[Skip]:
    return [flipped(Skip(), switch, layers) for switch in range(2 * layers)]


def flipped(skip: Skip, switch: int, layers: int) -> Skip:
    """The set with one switch turned; the first `layers` switches are attentions, the others MLPs."""
    if switch < layers:
        return Skip(skip.attention ^ {switch}, skip.mlp)
    return Skip(skip.attention, skip.mlp ^ {switch - layers})


def neighbours(skip: Skip, layers: int) -> Iterator[Skip]:
    return (flipped(skip, switch, layers) for switch in range(2 * layers))


def swaps(skip: Skip, layers: int) -> Iterator[Skip]:
    """One sublayer put back, another one left out."""
    on = [i in skip.attention for i in range(layers)] + [i in skip.mlp for i in range(layers)]
    for back, out in ((a, b) for a, x in enumerate(on) if x for b, y in enumerate(on) if not y):
        yield flipped(flipped(skip, back, layers), out, layers)


def frontier(scored: SequenceOf[Scored]) -> list[Scored]:
    """Sets than which none agrees better at the same or a lower cost, by falling cost."""
    front: list[Scored] = []
    for one in sorted(scored, key=lambda one: (one.c, -one.agreement)):
        if not front or one.agreement > front[-1].agreement:
            front.append(one)
    return front[::-1]
