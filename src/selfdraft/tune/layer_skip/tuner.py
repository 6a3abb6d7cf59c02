"""Tuning layer skip from a model and prompts to a set that was confirmed by the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters.layer_skip import LayerSkip
from selfdraft.drafters.none import NoDrafter
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.skip_sets import lists_of, skip_of
from selfdraft.models.identity import weights_hash
from selfdraft.models.reference import Model
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter
from selfdraft.tune.layer_skip.search import Scorer, Search, check_sampler, frontier
from selfdraft.tune.layer_skip.simulate import Replay, replay
from selfdraft.tune.layer_skip.study import Scored, Study, needs_optuna
from selfdraft.tune.layer_skip.teacher_forcing import Forced, Forcing, Text
from selfdraft.tune.passes import Costs, costs_from, fixed, measure_costs, measure_round
from selfdraft.tune.sublayer_times import clock_of
from selfdraft.types import JsonObject, SamplingParams, Skip, within

THRESHOLDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Exit thresholds among which the replay chooses."""
FINALISTS = 12
"""Sets whose deeper drafts are looked at after the search."""

Counter = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tuned: a model, its target, and prompts as token ids."""

    model: Model
    target: HFTarget
    prompts: SequenceOf[SequenceOf[int]]
    eos: frozenset[int] = frozenset()
    facts: Mapping[str, object] = field(default_factory=dict)
    """The conditions: machine, dtype, threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to search. Errors: OptionError names the option, the value and its limits."""

    study: Path
    trials: int = 1000
    seed: int = 0
    sampler: str = "tpe"
    max_new_tokens: int = 48
    temperature: float = 0.0
    num_speculative_tokens: int = 8
    """Longest draft."""
    max_cost: float | None = None
    """Seek the best agreement among sets of at most this cost, not the best speed."""
    confirm: int = 3
    """So many of the best are decoded with, for real; 0 chooses by prediction."""
    runs: int = 3

    def __post_init__(self) -> None:
        within("trials", self.trials, 1, 10**6)
        within("seed", self.seed, 0, 2**62)
        within("max_new_tokens", self.max_new_tokens, 4, 2**20)
        within("temperature", self.temperature, 0.0, 100.0)
        within("num_speculative_tokens", self.num_speculative_tokens, 1, 64)
        within("confirm", self.confirm, 0, FINALISTS)
        within("runs", self.runs, 1, 100)
        if self.max_cost is not None:
            within("max_cost", self.max_cost, 0.0, 1.0, open_low=True)

    @property
    def fixed(self) -> JsonObject:
        """The settings that one study keeps; trials and confirmations may grow."""
        names = ("seed", "sampler", "max_new_tokens", "temperature", "num_speculative_tokens", "max_cost")
        return {name: getattr(self, name) for name in names}

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_new_tokens, seed=self.seed)


class Tuning:
    """One search over one study; taken up again where it stopped. See `Search` for its order.

    `costs`: times measured before, as `Costs.as_dict` gives them. Errors: OptionError for a study of another model
    or other settings; RequestError when the prompts get no answers to learn from.
    """

    def __init__(self, subject: Subject, options: Options, costs: object = None) -> None:
        self.subject, self.options = subject, options
        most = options.num_speculative_tokens
        layers = subject.target.layers
        known = None if costs is None else costs_from(costs, layers, most, "--costs")
        needs_optuna()
        check_sampler(options.sampler)
        self.study = Study(options.study, layers) if options.study.is_file() else self._create(known)
        setup = self.study.setup
        self._check(setup)
        self.texts = [
            Text(tuple(text["tokens"]), text["prompt_length"], text["seed"], frozenset(text["ends"]))
            for text in setup["texts"]
        ]
        self.costs = costs_from(setup["costs"], layers, most, str(options.study))
        if known is not None and known != self.costs:
            raise OptionError(f"study {options.study} has costs of its own: leave out --costs, or give another --study")
        self.forcing = Forcing(subject.model, self.texts, options.sampling)
        self.scorer = Scorer(self.forcing, self.costs, most, options.max_cost)
        self.search = Search(self.study, self.scorer, trials=options.trials, seed=options.seed, sampler=options.sampler)

    def _create(self, costs: Costs | None) -> Study:
        """The setup of a new study: the target's own texts, and what drafting costs."""
        subject, options = self.subject, self.options
        texts = own_texts(subject, options.sampling)
        if costs is None:
            longest = max(texts, key=lambda text: len(text.tokens))
            first = self.requests(texts[texts.index(longest) : texts.index(longest) + 1])[0]
            costs = measure_costs(subject.target, longest.tokens, first, options.num_speculative_tokens)
        setup = {
            "fingerprint": weights_hash(subject.model),
            "prompts": [list(prompt) for prompt in subject.prompts],
            "settings": options.fixed,
            "texts": [{**asdict(text), "ends": sorted(text.ends)} for text in texts],
            "costs": costs.as_dict(),
            "conditions": dict(subject.facts),
        }
        return Study.create(options.study, subject.target.layers, setup)

    def _check(self, setup: JsonObject) -> None:
        place = self.options.study
        if setup["fingerprint"] != weights_hash(self.subject.model):
            raise OptionError(f"study {place} is of another model or dtype: give another --study, or its own model")
        if setup["prompts"] != [list(prompt) for prompt in self.subject.prompts]:
            raise OptionError(f"study {place} was begun with other prompts: give those, or another --study")
        for name, value in self.options.fixed.items():
            if setup["settings"].get(name) != value:
                raise OptionError(
                    f"study {place} was begun with {name}={setup['settings'].get(name)}, not {value}: "
                    "give that, or another --study"
                )

    def requests(self, texts: SequenceOf[Text]) -> list[Callable[[], Sequence]]:
        """Makers of the requests that were answered by these texts."""
        return [request_of(self.subject, text, self.options.sampling) for text in texts]

    def finalists(self) -> list[JsonObject]:
        """The best of the search with their deeper drafts, the fastest by replay first."""
        known = self.study.fact("finalists") or {}
        found = []
        for one in self.search.best()[:FINALISTS]:
            key = _key(one.skip)
            if key not in known:
                known[key] = self._look_deeper(one)
                self.study.note("finalists", known)
            found.append(known[key])
        by = "agreement" if self.options.max_cost is not None else "predicted"
        return sorted(found, key=lambda record: -record[by])

    def _look_deeper(self, one: Scored) -> JsonObject:
        most = self.options.num_speculative_tokens
        forced = self.forcing.draft(one.skip, most)
        draft = self.costs.draft(one.skip)
        plans = []
        for drafts in range(1, most + 1):
            for threshold in THRESHOLDS if drafts > 1 else (0.0,):
                run = replay(self.texts, forced, drafts, threshold=threshold, edge=self.subject.target.next_boundary)
                plans.append((run.speed(draft, self.costs.verify), -drafts, -threshold, run))
        speed, drafts, threshold, run = max(plans, key=lambda plan: plan[:3])
        return {
            **lists_of(one.skip),
            "agreement": one.agreement,
            "agreement_by_depth": [round(rate, 4) for rate in forced.by_depth],
            "c": one.c,
            "num_speculative_tokens": -drafts,
            "confidence_threshold": -threshold,
            "predicted": speed,
            "predicted_acceptance": run.acceptance,
        }

    def confirmed(self, records: SequenceOf[JsonObject]) -> Iterator[JsonObject]:
        """The records with what was measured: decoding with each in alternation with plain decoding."""
        measured = self.study.fact("measured") or {}
        for record in records:
            key = _key(skip_of(record))
            if key not in measured:
                settings = (record["num_speculative_tokens"], record["confidence_threshold"])
                measured[key] = confirm(self.subject, self.texts, self.costs, skip_of(record), *settings, self.options)
                self.study.note("measured", measured)
            yield {**record, **measured[key]}

    def record(self, best: JsonObject) -> JsonObject:
        """The set with everything that its figures depend on."""
        setup = self.study.setup
        return {
            **best,
            "positions": sum(len(text.bases) for text in self.texts),
            "sets_tried": len({one.skip for one in self.study.scored}),
            "fingerprint": setup["fingerprint"],
            "settings": setup["settings"],
            "conditions": setup["conditions"],
            "costs": setup["costs"],
        }

    def evidence(self, least_agreement: float = 0.85, most_cost: float = 0.65) -> JsonObject:
        """Every single sublayer, every pair, the best of the sets, and whether any reaches both figures."""
        stages = {"single": list[Scored](), "pair": list[Scored]()}
        for one in self.study.scored:
            if one.stage in stages:
                stages[one.stage].append(one)
        everything = list({one.skip: one for one in self.study.scored}.values())
        reached = [one for one in everything if one.agreement >= least_agreement and one.c <= most_cost]
        cheap = sorted((one for one in everything if one.c <= most_cost), key=lambda one: -one.agreement)
        setup = self.study.setup
        return {
            "question": {"agreement_at_least": least_agreement, "c_at_most": most_cost},
            "reached": [_row(one) for one in reached],
            "positions": sum(len(text.bases) for text in self.texts),
            "sets_evaluated": len(everything),
            "sets_of_the_search": len({one.skip for one in self.search.tried()}),
            "best_agreement_at_that_cost": [_row(one) for one in cheap[:20]],
            "best_by_speed": [_row(one) for one in sorted(everything, key=lambda one: -one.speed)[:20]],
            "frontier": [_row(one) for one in frontier(everything)],
            "single": [_row(one) for one in stages["single"]],
            "pairs": [_row(one) for one in stages["pair"]],
            **{name: setup[name] for name in ("fingerprint", "settings", "conditions", "costs")},
        }


def _row(one: Scored) -> JsonObject:
    return {**lists_of(one.skip), "agreement": round(one.agreement, 4), "c": round(one.c, 4)}


def _key(skip: Skip) -> str:
    return " ".join(str(lists_of(skip)[kind]) for kind in ("attention", "mlp"))


def own_texts(subject: Subject, sampling: SamplingParams) -> list[Text]:
    """What the target says to the prompts, plainly decoded. Errors: RequestError when that is next to nothing."""
    texts = []
    for i, prompt in enumerate(subject.prompts):
        seed = (sampling.seed or 0) + i
        sequence = open_sequence(prompt, sampling, seed=seed, eos=subject.eos, context=subject.target.max_length)
        for _ in Engine(subject.target, NoDrafter(subject.target)).generate([sequence]):
            pass
        texts.append(Text(tuple(sequence.tokens), sequence.prompt_length, seed, sequence.stop_ids))
    texts = [text for text in texts if len(text.bases)]
    if sum(len(text.bases) for text in texts) < 8:
        raise RequestError("the model's answers to these prompts are too short to measure agreement: give more prompts")
    return texts


def request_of(subject: Subject, text: Text, sampling: SamplingParams) -> Callable[[], Sequence]:
    prompt = text.tokens[: text.prompt_length]
    context = subject.target.max_length
    return lambda: open_sequence(prompt, sampling, seed=text.seed, eos=subject.eos, context=context)


def decode_seconds(target: HFTarget, drafter: Drafter, request: Callable[[], Sequence]) -> tuple[float, Sequence]:
    """Seconds behind the prefill of one request, and the sequence it became."""
    now, sequence = clock_of(target), request()
    began = ended = now()
    first = True
    for _ in Engine(target, drafter).generate([sequence]):
        ended = now()
        if first:
            began, first = ended, False
    return ended - began, sequence


def measured_speed(
    subject: Subject, texts: SequenceOf[Text], sampling: SamplingParams, make: Callable[[], LayerSkip], runs: int
) -> tuple[float, float]:
    """(speed-up over plain decoding behind the prefill, acceptance): medians of `runs` in alternation.

    Errors: OptionError when a text differs from plain decoding; no speed is given then.
    """
    plain_seconds = drafted_seconds = 0.0
    drafted = accepted = 0
    for place, text in enumerate(texts):
        request, target = request_of(subject, text, sampling), subject.target
        plains, drafts = [], []
        for run in range(0 if place == 0 else 1, runs + 1):
            plain, one = decode_seconds(target, NoDrafter(target), request)
            short, other = decode_seconds(target, make(), request)
            if one.tokens != other.tokens:
                raise OptionError("a drafted text differs from the plain one: run 'selfdraft doctor'")
            if run:  # run 0 warms up
                plains.append(plain)
                drafts.append(short)
        plain_seconds, drafted_seconds = plain_seconds + median(plains), drafted_seconds + median(drafts)
        drafted += other.stats.num_draft_tokens
        accepted += other.stats.num_accepted_draft_tokens
    return plain_seconds / drafted_seconds, accepted / drafted if drafted else 0.0


def confirm(
    subject: Subject,
    texts: SequenceOf[Text],
    costs: Costs,
    skip: Skip,
    drafts: int,
    threshold: float,
    options: Options,
) -> JsonObject:
    """Time the parts of a set's rounds, then whole decoding of the very texts that its speed was predicted on."""
    round_ = measure_round(subject.target, longest_of(texts), costs, skip, [drafts])
    speed, acceptance = measured_speed(
        subject, texts, options.sampling, lambda: fixed(subject.target, skip, drafts, threshold), options.runs
    )
    return {"c_measured": round_.c, "measured": speed, "measured_acceptance": acceptance}


def longest_of(texts: SequenceOf[Text]) -> tuple[int, ...]:
    return max((text.tokens for text in texts), key=len)


@dataclass(frozen=True, slots=True)
class Check:
    """Predicted beside measured speed-up of one set at one draft length."""

    name: str
    num_speculative_tokens: int
    agreement: float
    c: float
    predicted: float
    measured: float
    predicted_acceptance: float
    measured_acceptance: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1

    def as_dict(self) -> JsonObject:
        return {**asdict(self), "error": self.error}


def check_sets(
    subject: Subject, sets: Mapping[str, Skip], lengths: SequenceOf[int], sampling: SamplingParams, runs: int = 3
) -> Iterator[Check]:
    """Predict and measure every set at every draft length, without an exit threshold.

    Predicted: rounds replayed on a teacher-forced pass, with the measured times of their parts. Measured: decoding
    the same prompts, plainly and drafted in alternation.
    """
    texts = own_texts(subject, sampling)
    forcing = Forcing(subject.model, texts, sampling)
    request = request_of(subject, texts[0], sampling)
    costs = measure_costs(subject.target, longest_of(texts), request, max(lengths))
    for name, skip in sets.items():
        forced: Forced = forcing.draft(skip, max(lengths))
        for drafts in lengths:
            run: Replay = replay(texts, forced, drafts, edge=subject.target.next_boundary)
            every = sorted({size for size in run.drafted if size})
            parts = measure_round(subject.target, longest_of(texts), costs, skip, every)
            make = partial(fixed, subject.target, skip, drafts)
            speed, acceptance = measured_speed(subject, texts, sampling, make, runs)
            predicted = run.speed(parts.draft, partial(_verify_cost, parts.verify))
            yield Check(name, drafts, forced.agreement, parts.c, predicted, speed, run.acceptance, acceptance)


def _verify_cost(costs: Mapping[int, float], drafts: int) -> float:
    """A step without drafts is a plain one."""
    return costs[drafts] if drafts else 1.0
