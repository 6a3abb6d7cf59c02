"""What drafting costs on this machine, measured through the target's own forward pass: medians of interleaved runs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from statistics import median
from typing import cast

from torch import Tensor

from selfdraft.core.rows import Rows, chain_rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import verify
from selfdraft.drafters.layer_skip import LayerSkip
from selfdraft.drafters.none import NoDrafter
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Target
from selfdraft.tune.sublayer_times import SublayerClock, clock_of
from selfdraft.types import Budget, SamplingParams, Skip

Request = Callable[[], Sequence]
LINKS = 4
"""Links of the draft by which the work beside a drafting pass is measured."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, at `context` known tokens. A set's cost is c = 1 - (its sublayers' seconds) / T(1)."""

    context: int
    passes: tuple[float, ...]
    """passes[n - 1] = T(n): one full pass with n rows."""
    attention: tuple[float, ...]
    """Of each block, for one row, with the norm that only the attention reads."""
    mlp: tuple[float, ...]
    block: tuple[float, ...]
    """Whole blocks: what leaving out both sublayers saves."""
    step: float
    """One step of plain decoding, all the work beside the pass included."""
    link: float
    """The work beside the pass in one link of a draft: packing, choosing."""

    def c(self, skip: Skip) -> float:
        """Cost of a drafting pass in full passes."""
        both = skip.attention & skip.mlp
        saved = sum(self.block[i] for i in both)
        saved += sum(self.attention[i] for i in skip.attention - both) + sum(self.mlp[i] for i in skip.mlp - both)
        return 1 - saved / self.passes[0]

    def draft(self, skip: Skip) -> float:
        """Cost of a link in plain steps, the work beside the pass included."""
        return (self.c(skip) * self.passes[0] + self.link) / self.step

    def verify(self, drafts: int) -> float:
        """t_v: cost of a step that verifies so many drafts, in plain steps."""
        return 1 + (self.passes[drafts] - self.passes[0]) / self.step

    def as_dict(self) -> dict[str, object]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def costs_from(record: object, layers: int, most: int, place: str) -> Costs:
    """Costs that were measured before. Errors: OptionError when they are no costs, or of another model."""
    given = record if isinstance(record, dict) else {}
    try:
        lists = {name: tuple(float(x) for x in given[name]) for name in ("passes", "attention", "mlp", "block")}
        costs = Costs(context=int(given["context"]), step=float(given["step"]), link=float(given["link"]), **lists)
    except (TypeError, KeyError, ValueError) as error:
        raise OptionError(f"{place} holds no measured costs: give a file that 'selfdraft tune' wrote") from error
    if len(costs.block) != layers:
        raise OptionError(f"{place} has the costs of {len(costs.block)} blocks; the model has {layers}")
    if len(costs.passes) <= most:
        raise OptionError(
            f"{place} has the costs of {len(costs.passes) - 1} draft tokens; give --num-speculative-tokens at most that"
        )
    return costs


class Bench:
    """A target with some tokens in slot 0, on which passes can be timed. Only one sequence at a time may use it."""

    def __init__(self, target: HFTarget, tokens: SequenceOf[int], most: int) -> None:
        self.target, self.now = target, clock_of(target)
        size = len(tokens) - 1
        while size > 1 and target.next_boundary(size) - 1 - size <= most:
            size -= 1  # drafts end before the edge of a bucket
        self.tokens = list(tokens)
        self.sequence = Sequence(list(tokens[: size + 1]), size + 1, SamplingParams(max_tokens=4096), slot=0)
        self.sequence.max_length = target.max_length

    @property
    def context(self) -> int:
        return len(self.sequence.tokens) - 1

    def prefill(self) -> None:
        """Read the tokens but the last one; another user of slot 0 may have overwritten them."""
        known = Sequence(self.sequence.tokens[:-1], 1, SamplingParams(), slot=0)
        self.target.forward(pack([(known, self.context, EMPTY)]))
        self.target.keep(0, 0, range(self.context))
        self.sequence.num_cached = self.context

    def time(self, work: Callable[[], object]) -> float:
        began = self.now()
        work()
        return self.now() - began

    def step(self, draft: Draft = EMPTY) -> None:
        """A step's passes and verification; nothing is committed."""
        rows = pack([(self.sequence, 1, draft)])
        verify(rows, self.target.forward(rows), [self.sequence])

    def draft_with(self, drafter: LayerSkip, links: int) -> Draft:
        return drafter.draft([self.sequence], [Budget(links, links, links)])[0]


def fixed(target: HFTarget, skip: Skip, drafts: int, threshold: float = 0.0) -> LayerSkip:
    """A layer-skip drafter whose settings do not move."""
    return LayerSkip(
        target,
        skip_attention=skip.attention,
        skip_mlp=skip.mlp,
        num_speculative_tokens=drafts,
        confidence_threshold=threshold,
        adaptive=False,
    )


def measure_costs(target: HFTarget, tokens: SequenceOf[int], request: Request, most: int, runs: int = 25) -> Costs:
    """Time passes of 1 to `most` + 1 rows behind `tokens`, every sublayer, plain steps and draft links.

    All kinds take turns, and each is set against the one-row pass of its own turn: another user of the machine
    disturbs both alike. `request` is decoded plainly.
    """
    bench = Bench(target, tokens, most)
    bench.prefill()
    last = bench.sequence.tokens[-1]
    chains = [Draft.chain([(last + i) % target.vocab for i in range(size)], "x") for size in range(most + 1)]
    watch, row = SublayerClock(target), chain_rows([(0, bench.context, last)])
    half = Skip(frozenset(range(target.layers // 2, target.layers)))
    watched = _Watched(target)
    drafter = fixed(cast(HFTarget, watched), half, LINKS)
    passes: list[list[float]] = []
    shares: dict[str, list[list[float]]] = {"attention": [], "mlp": [], "block": []}
    links: list[float] = []
    for run in range(-2, runs):
        watched.seconds = 0.0
        drafting = bench.time(lambda: bench.draft_with(drafter, LINKS))
        bench.step()  # takes what the drafting passes left, so that the next ones are whole
        turn = [_forward_seconds(bench, chain) for chain in chains]
        times = watch.measure(row)
        if run < 0:  # warm-up
            continue
        passes.append(turn)
        links.append((drafting - watched.seconds) / LINKS)
        for kind, found in shares.items():
            found.append([seconds / times.whole for seconds in getattr(times, kind)])
    one = median(turn[0] for turn in passes)
    ratios = [median(turn[i] / turn[0] for turn in passes) for i in range(most + 1)]
    kinds = {kind: tuple(one * share for share in _shares(found)) for kind, found in shares.items()}
    step = one + beside_the_pass(target, request)
    return Costs(bench.context, tuple(one * ratio for ratio in ratios), **kinds, step=step, link=median(links))


def _shares(turns: list[list[float]]) -> list[float]:
    """Share of the pass that each sublayer takes: the median of all together, split by the medians of each.

    On a busy machine nearly every pass is interrupted somewhere, but hardly ever the same sublayer.
    """
    each = [median(column) for column in zip(*turns, strict=True)]
    together = median(sum(turn) for turn in turns)
    return [together * share / sum(each) for share in each]


def _forward_seconds(bench: Bench, draft: Draft) -> float:
    rows = pack([(bench.sequence, 1, draft)])
    return bench.time(lambda: bench.target.forward(rows))


def beside_the_pass(target: HFTarget, request: Request) -> float:
    """Seconds of a plain step outside the model's forward pass: the median over decoding one request."""
    watched = _Watched(target)
    seen = cast(Target, watched)
    beside = []
    began = None
    for _ in Engine(seen, NoDrafter(seen)).generate([request()]):
        ended = watched.now()
        if began is not None:
            beside.append(ended - began - watched.seconds)
        began, watched.seconds = ended, 0.0
    if not beside:
        raise OptionError("the prompts get answers of one token, on which nothing can be timed: give other prompts")
    return max(median(beside), 0.0)


class _Watched:
    """The target, and how long its forward passes took."""

    def __init__(self, target: HFTarget) -> None:
        self.target, self.now = target, clock_of(target)
        self.seconds = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self.target, name)

    def forward(self, rows: Rows, skip: Skip | None = None) -> Tensor:
        began = self.now()
        logits = self.target.forward(rows, skip)
        self.seconds += self.now() - began
        return logits


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """Measured parts of a round of one set, in plain steps."""

    c: float
    """A drafting pass alone, in full passes."""
    draft: float
    verify: dict[int, float]
    """Verification by number of drafts; what the drafting passes left in the cache is used, as in real rounds."""


def measure_round(
    target: HFTarget, tokens: SequenceOf[int], costs: Costs, skip: Skip, lengths: SequenceOf[int], runs: int = 15
) -> RoundCosts:
    """Time the parts of drafting rounds: links and verification, beside a plain step's passes."""
    bench = Bench(target, tokens, max(lengths))
    bench.prefill()
    row = chain_rows([(0, bench.context, bench.sequence.tokens[-1])])
    drafters = {m: fixed(target, skip, m) for m in lengths}
    shorts: list[float] = []
    links: list[float] = []
    verified: dict[int, list[float]] = {m: [] for m in lengths}
    for run in range(-1, runs):
        plain = bench.time(bench.step)
        whole = bench.time(lambda: target.forward(row))
        step = max(plain, whole * costs.step / costs.passes[0])
        turn = {}
        for m, drafter in drafters.items():
            began = bench.now()
            draft = bench.draft_with(drafter, m)
            drafted = bench.now()
            bench.step(draft)
            turn[m] = ((drafted - began) / len(draft) / step, (bench.now() - drafted + step - plain) / step)
        short = bench.time(lambda: target.forward(row, skip))
        bench.step()
        if run < 0:  # warm-up
            continue
        shorts.append(short / whole)
        for m, (link, verify_) in turn.items():
            links.append(link)
            verified[m].append(verify_)
    return RoundCosts(median(shorts), median(links), {m: median(times) for m, times in verified.items()})
