"""The law of sampled text: every random branch is enumerated, so "the same distribution" is an equation, not a test.

A choice is asked for through `Flip`, which replays one branch after the other and multiplies its weights. What the
rounds of verification give, summed over all branches, must be the law of plain decoding to 1e-12; the classic
mistakes of speculative sampling, planted into a textbook sampler, must miss it by far.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdraft.core import verify as verify_module
from selfdraft.core.commit import commit
from selfdraft.core.noise import gumbel, random_bits
from selfdraft.core.one_row import Ids
from selfdraft.core.rows import Rows
from selfdraft.core.sampler import choose, process
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import ROOT, Draft
from selfdraft.core.verify import Result, walk
from selfdraft.engine.step import step
from selfdraft.errors import EngineError
from selfdraft.protocols import DraftExtras
from selfdraft.types import Budget, PassVariant, SamplingParams

Prefix = tuple[int, ...]
Weights = list[float]
Chances = Callable[[Prefix], Weights]
"""p(next token | prefix)."""
ALPHA = 1e-9
TEST = settings(max_examples=60, deadline=None, derandomize=True)


# --- the harness ------------------------------------------------------------------------------------------------


class Flip:
    """The only source of chance: `flip(weights)` is an index. Replays `script`, then takes the first open branch."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.used, self.weight = script, 0, 1.0
        self.others: list[list[int]] = []

    def __call__(self, weights: SequenceOf[float]) -> int:
        open_branches = [i for i, weight in enumerate(weights) if weight > 0.0]
        if self.used == len(self.script):
            self.others += [[*self.script, other] for other in open_branches[1:]]
            self.script.append(open_branches[0])
        taken = self.script[self.used]
        self.used += 1
        self.weight *= weights[taken]
        return taken


def branches(program: Callable[[Flip], Prefix]) -> Iterator[tuple[Prefix, float]]:
    """Every outcome of a program that draws by `flip`, with the probability of the branch that led there."""
    scripts: list[list[int]] = [[]]
    while scripts:
        flip = Flip(scripts.pop())
        outcome = program(flip)
        scripts += flip.others
        yield outcome, flip.weight


Round = Callable[[Prefix, Flip], Prefix]
"""One round of a sampler: the prefix, longer by at least one token."""


def law_of(one: Round, start: Prefix, ended: Callable[[Prefix], bool]) -> dict[Prefix, float]:
    """The law of the text that rounds give from `start` on; a text that has `ended` stays."""
    law: dict[Prefix, float] = defaultdict(float)
    open_texts = {start: 1.0}
    while open_texts:
        prefix = min(open_texts, key=len)  # all ways that lead to a prefix are added up before it goes on
        weight = open_texts.pop(prefix)
        if ended(prefix):
            law[prefix] += weight
            continue
        for text, chance in branches(partial(one, prefix)):
            assert len(text) > len(prefix)
            open_texts[text] = open_texts.get(text, 0.0) + weight * chance
    return law


def error(p: Chances, one: Round, start: Prefix, ended: Callable[[Prefix], bool]) -> float:
    """Largest difference between the law of the rounds and that of plain decoding; their mass is 1."""
    plain = law_of(lambda prefix, flip: (*prefix, flip(p(prefix))), start, ended)
    ours = law_of(one, start, ended)
    assert abs(sum(plain.values()) - 1) <= 1e-12
    assert abs(sum(ours.values()) - 1) <= 1e-12
    return max(abs(plain.get(text, 0.0) - ours.get(text, 0.0)) for text in plain.keys() | ours.keys())


def random_chances(vocab: int, seed: int) -> Chances:
    """Dirichlet laws, one per prefix: dense, with zeros, with ties, or a point."""

    @cache
    def chances(prefix: Prefix) -> Weights:
        draw = random.Random(f"{seed} {prefix}")
        kind = draw.randrange(5)
        weights = [draw.gammavariate(0.7, 1.0) + 1e-3 for _ in range(vocab)]
        if kind == 1 or vocab > 6:
            weights = [w if i in draw.sample(range(vocab), 3) else 0.0 for i, w in enumerate(weights)]
            weights[draw.randrange(vocab)] += 0.5
        elif kind == 2:
            weights = [float(draw.randrange(1, 3)) for _ in range(vocab)]
        elif kind == 3:
            weights = [float(i == prefix[-1]) for i in range(vocab)]
        return [weight / sum(weights) for weight in weights]

    return chances


def random_draft(vocab: int, size: int, seed: int, prefix: Prefix) -> Draft:
    """A chain or any tree, equal siblings and all: as unlike the target as may be."""
    draw = random.Random(f"{seed} draft {prefix}")
    tokens = [draw.randrange(vocab) for _ in range(size)]
    if seed % 2:
        return Draft.chain(tokens, "chain")
    parents = tuple(draw.randrange(-1, node) for node in range(size))
    return Draft(tuple(tokens), parents, ("tree",) * size, size)


def path_to(draft: Draft, node: int) -> Prefix:
    return () if node == ROOT else (*path_to(draft, draft.parents[node]), draft.tokens[node])


# --- our verification -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "size"), [(4, 1), (4, 2), (4, 3), (4, 4), (6, 1), (6, 2), (6, 3), (8, 1), (8, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_the_walk_keeps_the_law(vocab: int, size: int, seed: int) -> None:
    """Chains and trees of any shape, several rounds: output is longer than the draft by two at least."""
    p = random_chances(vocab, seed)

    def one(prefix: Prefix, flip: Flip) -> Prefix:
        draft = random_draft(vocab, size, seed, prefix)
        path, tokens = walk(draft, lambda node: flip(p(prefix + path_to(draft, node))))
        assert tokens[:-1] == [draft.tokens[node] for node in path]
        return (prefix + tuple(tokens))[: 1 + size + 2]

    assert error(p, one, (0,), lambda text: len(text) >= 1 + size + 2) <= 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_the_law_through_commit(seed: int) -> None:
    """An end id that absorbs, from `min_tokens` on, and a limit that cuts within a block."""
    vocab, size, most, end = 4, 3, 5, 1
    p = random_chances(vocab, seed)
    sampling = SamplingParams(max_tokens=most, min_tokens=seed % 3)

    def one(prefix: Prefix, flip: Flip) -> Prefix:
        sequence = Sequence(list(prefix), 1, sampling, stop_ids=frozenset({end}), max_length=1 + most)
        draft = random_draft(vocab, size, seed, prefix)
        path, tokens = walk(draft, lambda node: flip(p(prefix + path_to(draft, node))))
        emitted = commit(sequence, Result(draft, tuple(path), tuple(tokens)))
        assert sequence.finished == ended(tuple(sequence.tokens))
        assert emitted == len(sequence.tokens) - len(prefix)
        return tuple(sequence.tokens)

    def ended(text: Prefix) -> bool:
        return len(text) == 1 + most or (text[-1] == end and len(text) - 1 >= max(1, sampling.min_tokens))

    assert error(p, one, (0,), ended) <= 1e-12


class TableTarget:
    """A target without a network: logits are a function of the row's own path, told by the parents in the rows."""

    vocab, num_mask_ids, max_length, extras = 4, 0, 64, DraftExtras()

    def __init__(self, table: Callable[[Prefix], Tensor], memory: SequenceOf[int]) -> None:
        self.table, self.memory = table, list(memory)
        self.rows: list[int] = []

    def next_boundary(self, position: int) -> int:
        return self.max_length

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        (span,) = rows.spans
        assert span.base == len(self.memory)
        self.rows = list(rows.tokens)
        known = (*self.memory, *self.rows[: span.pending])
        paths = [known + path_to(span.draft, node) for node in range(ROOT, len(span.draft))]
        assert [rows.positions[row] for row in rows.logit_rows] == [len(path) - 1 for path in paths]
        return torch.stack([self.table(path) for path in paths])

    def reuse(self, slot: int, source: int, count: int) -> None:
        raise AssertionError("each sequence has its own slot")

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        self.memory = self.memory[:base] + [self.rows[row] for row in order]


class TreeDrafter:
    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [random_draft(TableTarget.vocab, self.size, self.seed, tuple(s.tokens)) for s in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass


HISTORY = SamplingParams(
    temperature=0.7,
    repetition_penalty=1.4,
    presence_penalty=0.3,
    frequency_penalty=0.5,
    bad_words_ids=((2, 3), (0, 0, 1)),
    min_tokens=2,
    max_tokens=5,
    logits_processors=(lambda path, logits: logits - torch.arange(4) * 0.2 * (sum(path) % 3),),
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sampling", [HISTORY, replace(HISTORY, top_k=2), replace(HISTORY, top_p=0.7, min_p=0.1)])
def test_the_law_of_the_whole_step(seed: int, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess, rows, verification, commit and memory, with everything that looks at the history switched on."""
    start, ends = (3, 0), frozenset({1})

    @cache
    def table(prefix: Prefix) -> Tensor:
        draw = torch.Generator().manual_seed(hash((seed, prefix)) % 2**60)
        return torch.randn(TableTarget.vocab, generator=draw, dtype=torch.float64)

    @cache
    def p(prefix: Prefix) -> Weights:
        scores = process(table(prefix), sampling, prefix, len(start), ends)
        return [float(chance) for chance in scores.softmax(-1)]

    def one(prefix: Prefix, flip: Flip) -> Prefix:
        monkeypatch.setattr(verify_module, "choose", lambda scores, *_: flip(scores.softmax(-1).tolist()))
        sequence = open_sequence(start, sampling, seed=0, eos=ends, context=TableTarget.max_length)
        sequence.tokens += prefix[len(start) :]
        sequence.num_cached = len(prefix) - 1
        target = TableTarget(table, prefix[:-1])
        step(target, TreeDrafter(3, seed), [(sequence, 1)], 8)
        assert target.memory == sequence.tokens[:-1]
        assert sequence.finished == ended(tuple(sequence.tokens))
        return tuple(sequence.tokens)

    def ended(text: Prefix) -> bool:
        written = len(text) - len(start)
        return written == sampling.max_tokens or (written >= 2 and text[-1] in ends)

    assert error(p, one, start, ended) <= 1e-12


# --- the harness is sharp ---------------------------------------------------------------------------------------


def normal(weights: SequenceOf[float]) -> Weights:
    return [weight / sum(weights) for weight in weights]


def residual(p: Weights, q: Weights, token: int) -> Weights:
    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    return normal(left) if sum(left) > 0 else p


@dataclass(frozen=True)
class Rule:
    """Speculative sampling as in Leviathan et al. (arXiv 2211.17192), algorithm 1, with each step exchangeable."""

    propose: Callable[[Weights], Weights] = lambda q: q
    accept: Callable[[float, float, int], float] = lambda p, q, depth: min(1.0, p / q)
    refuse: Callable[[Weights, Weights, int], Weights] = residual
    bonus: Callable[[Weights, Weights], Weights] = lambda p, q: p

    def round(self, p: Chances, q: Chances, size: int, prefix: Prefix, flip: Flip) -> Prefix:
        text = prefix
        for depth in range(size):
            here, there = p(text), q(text)
            token = flip(self.propose(there))
            chance = self.accept(here[token], there[token], depth)
            if flip([chance, 1.0 - chance]):
                return (*text, flip(self.refuse(here, there, token)))
            text = (*text, token)
        return (*text, flip(self.bonus(p(text), q(text))))


def greedy_of(p: Weights, q: Weights) -> Weights:
    return [float(i == p.index(max(p))) for i in range(len(p))]


MUTANTS: dict[str, Rule] = {
    "residual |p-q|": Rule(refuse=lambda p, q, x: normal([abs(a - b) + 1e-300 for a, b in zip(p, q, strict=True)])),
    "first draft never verified": Rule(accept=lambda p, q, depth: 1.0 if depth == 0 else min(1.0, p / q)),
    "resample from p": Rule(refuse=lambda p, q, x: p),  # as SPACE's code does
    "greedy draft, sampled ratio": Rule(propose=lambda q: greedy_of(q, q)),  # Draft & Verify, do_sample_draft=False
    "mask only the rejected": Rule(refuse=lambda p, q, x: normal([0.0 if i == x else a for i, a in enumerate(p)])),
    "bonus from q": Rule(bonus=lambda p, q: q),
    "bonus greedy": Rule(bonus=greedy_of),
    "draft from q^1.1": Rule(propose=lambda q: normal([b**1.1 for b in q])),
    "ratio + 0.001": Rule(accept=lambda p, q, depth: min(1.0, p / q + 0.001)),
    "draft from 8-bit q": Rule(propose=lambda q: normal([max(round(b * 256), b > 0) for b in q])),
}


def rule_error(rule: Rule, vocab: int, size: int, seed: int) -> float:
    p, q = random_chances(vocab, seed), random_chances(vocab, seed + 1000)

    def dense(chances: Chances, prefix: Prefix) -> Weights:  # a drafter whose law covers what it may say
        return normal([chance + 0.05 for chance in chances(prefix)])

    def one(prefix: Prefix, flip: Flip) -> Prefix:
        text = rule.round(lambda t: dense(p, t), lambda t: dense(q, t), size, prefix, flip)
        return text[: 1 + size + 2]

    return error(lambda t: dense(p, t), one, (0,), lambda text: len(text) >= 1 + size + 2)


@pytest.mark.parametrize("size", [1, 2])
def test_the_harness_passes_the_textbook_rule(size: int) -> None:
    assert max(rule_error(Rule(), 4, size, seed) for seed in range(4)) <= 1e-12


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_harness_catches_every_classic_mistake(mutant: str) -> None:
    assert max(rule_error(MUTANTS[mutant], 4, 2, seed) for seed in range(2)) > 1e-6


def one_token(rule: Rule, p: Weights, q: Weights) -> Weights:
    """The law of the first token of a round, by enumeration."""
    found = [0.0] * len(p)
    for text, chance in branches(lambda flip: rule.round(lambda _: p, lambda _: q, 1, (), flip)):
        found[text[0]] += chance
    return found


def test_the_biases_of_the_original_codes_are_the_published_ones() -> None:
    """`methods.md` D6 and A6, and that the textbook rule has neither."""
    space = one_token(MUTANTS["resample from p"], [0.7, 0.3], [0.3, 0.7])
    assert space == pytest.approx([0.58, 0.42])
    draft_and_verify = one_token(MUTANTS["greedy draft, sampled ratio"], [0.5, 0.5], [0.9, 0.1])
    assert draft_and_verify == pytest.approx([0.5 / 0.9, 1 - 0.5 / 0.9])
    assert one_token(Rule(), [0.7, 0.3], [0.3, 0.7]) == pytest.approx([0.7, 0.3])


# --- Gumbel-max and its noise -----------------------------------------------------------------------------------


def chi_square(counts: Tensor, chances: Tensor) -> float:
    """p-value of Pearson's test; nothing was estimated, so all cells but one are free."""
    wanted = chances * counts.sum()
    assert float(wanted.min()) >= 5
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    free = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(free, statistic / 2))


SCORES = torch.tensor([1.0, 0.0, -1.0, 2.0, 2.0, 0.5, -3.0, float("-inf")], dtype=torch.float64)
SAMPLED = SamplingParams(temperature=1.0)


def draws(keys: SequenceOf[tuple[int, int]]) -> Tensor:
    """How often each of the living tokens of SCORES is chosen over (seed, position) keys."""
    said = torch.tensor([choose(SCORES, SAMPLED, seed, position) for seed, position in keys])
    return said.bincount(minlength=len(SCORES)).double()


@pytest.mark.parametrize("axis", ["position", "seed"])
def test_choose_draws_from_the_softmax(axis: str) -> None:
    """25 000 keyed draws along each axis of the key."""
    counts = draws([(5, i) if axis == "position" else (i, 17) for i in range(25_000)])
    assert counts[-1] == 0
    assert chi_square(counts[:-1], SCORES[:-1].softmax(-1)) > ALPHA


def test_gumbel_max_draws_from_the_softmax() -> None:
    """100 000 draws at once, over positions, seeds and blocks of token ids."""
    blocks = [gumbel(key, -key * 7, torch.arange(7_000)).view(1_000, 7) for key in range(-50, 50)]
    counts = (torch.cat(blocks) + SCORES[:7]).argmax(1).bincount(minlength=7).double()
    assert chi_square(counts, SCORES[:7].softmax(-1)) > ALPHA
    spoilt = (torch.cat(blocks) * 1.05 + SCORES[:7]).argmax(1).bincount(minlength=7).double()
    assert chi_square(spoilt, SCORES[:7].softmax(-1)) < ALPHA, "the test sees noise that is five hundredths too wide"


@pytest.mark.parametrize("bug", ["half of the noise", "no position", "no token"])
def test_bad_noise_is_rejected(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the same test with the noise spoilt."""
    spoilt: dict[str, Callable[[int, SequenceOf[int], Ids], Ids]] = {
        "half of the noise": lambda seed, positions, tokens: random_bits(seed, positions, tokens) >> 1,
        "no position": lambda seed, positions, tokens: random_bits(seed, [0] * len(positions), tokens),
        "no token": lambda seed, positions, tokens: random_bits(seed, positions, tokens * 0),
    }
    monkeypatch.setattr("selfdraft.core.noise.random_bits", spoilt[bug])
    monkeypatch.setattr("selfdraft.core.one_row.random_bits", spoilt[bug])
    assert chi_square(draws([(5, i) for i in range(5_000)])[:-1], SCORES[:-1].softmax(-1)) < ALPHA


def kolmogorov(values: Tensor) -> float:
    """sqrt(n) times the largest distance to the uniform law; above 3.27 with probability below 1e-9."""
    ordered, n = values.sort().values, len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


TOKENS = torch.arange(100_000)
KEYS = [(0, 0), (1, 0), (0, 1), (-1, 0), (2**63 - 1, 5), (-(2**63), 5), (2**40, 2**31), (1, 1)]


def uniform(seed: int, position: int, tokens: Tensor) -> Tensor:
    """The uniform numbers that the noise is made of."""
    return torch.exp(-torch.exp(-gumbel(seed, position, tokens)))


def test_noise_is_uniform_along_every_axis() -> None:
    for seed, position in KEYS:
        assert kolmogorov(uniform(seed, position, TOKENS)) < 3.27
    one = torch.tensor([3])
    assert kolmogorov(torch.cat([uniform(9, i, one) for i in range(8_000)])) < 3.27
    assert kolmogorov(torch.cat([uniform(i - 4_000, 9, one) for i in range(8_000)])) < 3.27
    assert kolmogorov(uniform(0, 0, TOKENS) ** 1.05) > 3.27


def test_streams_do_not_know_each_other() -> None:
    """Neighbouring seeds, positions and tokens: correlation below six standard errors, no value shared."""
    streams = torch.stack([uniform(seed, position, TOKENS) for seed, position in KEYS])
    streams = torch.cat([streams, streams[:1].roll(1, 1)])
    found = torch.corrcoef(streams) - torch.eye(len(streams))
    assert float(found.abs().max()) * math.sqrt(len(TOKENS)) < 6.1
    assert bool((streams[:-1].flatten().sort().values.diff() > 0).all())


@TEST
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.lists(st.integers(0, 300_000), min_size=1))
def test_noise_is_a_function(seed: int, position: int, ids: list[int]) -> None:
    """Equal calls are equal, whichever other tokens are asked for; open interval; Gumbel is finite."""
    tokens = torch.tensor(ids)
    noise = uniform(seed, position, tokens)
    assert torch.equal(noise, uniform(seed, position, tokens))
    assert torch.equal(noise.flip(0), uniform(seed, position, tokens.flip(0)))
    assert torch.equal(noise[:1], uniform(seed, position, tokens[:1]))
    assert bool(((noise > 0) & (noise < 1)).all())
    assert bool(gumbel(seed, position, tokens).isfinite().all())


# --- what survives, and with which score ------------------------------------------------------------------------

LOGITS = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20, width=32), st.just(float("-inf"))),
    min_size=2,
    max_size=12,
).filter(lambda values: max(values) > float("-inf"))


def alive(scores: Tensor) -> set[int]:
    return {i for i, score in enumerate(scores.tolist()) if score > float("-inf")}


def processed(values: list[float], **options: object) -> Tensor:
    sampling = SamplingParams(temperature=1.0, **options)  # type: ignore[arg-type]
    return process(torch.tensor(values, dtype=torch.float64), sampling, (0,), 1, frozenset())


@TEST
@given(LOGITS, st.integers(0, 14))
def test_top_k(values: list[float], k: int) -> None:
    """The k likeliest, and all that tie with the last of them (as transformers has it)."""
    found = alive(processed(values, top_k=k))
    least = sorted(values, reverse=True)[min(k or len(values), len(values)) - 1]
    assert found == {i for i, value in enumerate(values) if value >= least and value > float("-inf")}


@TEST
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p(values: list[float], p: float) -> None:
    """The shortest run of likeliest tokens that reaches p; of equals the lowest id goes first."""
    weights = [math.exp(value - max(values)) for value in values]
    chances = [weight / sum(weights) for weight in weights]
    wanted, mass = set(), 0.0
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        if abs(mass - p) < 1e-12 and p < 1.0:
            return  # rounding decides
        if (mass < p or p == 1.0) and values[i] > float("-inf"):
            wanted.add(i)
        mass += chances[i]
    assert alive(processed(values, top_p=p)) == wanted


@TEST
@given(LOGITS, st.floats(0.0, 1.0))
def test_min_p(values: list[float], p: float) -> None:
    ratios = [math.exp(value - max(values)) for value in values]
    if any(abs(ratio - p) < 1e-12 for ratio in ratios[1:]) and p < 1.0:
        return
    found = alive(processed(values, min_p=p))
    assert found == {i for i, ratio in enumerate(ratios) if ratio >= p - 1e-12 and values[i] > float("-inf")}


@TEST
@given(LOGITS, st.integers(1, 6), st.floats(0.1, 1.0), st.floats(0.0, 0.9))
def test_the_truncations_in_their_order(values: list[float], k: int, p: float, least: float) -> None:
    """All three are one after the other, each on what the one before left over; somebody always stays."""
    left = processed(values, top_k=k)
    left = processed(left.tolist(), top_p=p)
    left = processed(left.tolist(), min_p=least)
    whole = processed(values, top_k=k, top_p=p, min_p=least)
    assert torch.equal(whole, left)
    assert alive(whole)


@TEST
@given(LOGITS, st.sampled_from([1e-6, 1e-30, 1e-38, 1e-60]), st.integers(0, 1000))
def test_a_tiny_temperature_and_top_1_are_greedy(values: list[float], temperature: float, seed: int) -> None:
    logits = torch.tensor(values, dtype=torch.float32)
    ordered = sorted(values, reverse=True)
    if ordered[0] - ordered[1] < 1e-3:
        return
    for sampling in (SamplingParams(temperature=temperature), SamplingParams(temperature=5.0, top_k=1)):
        scores = process(logits, sampling, (0,), 1, frozenset())
        assert choose(scores, sampling, seed, 3) == choose(logits, SamplingParams(), seed, 3) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_is_an_error(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, allowed_token_ids=(1,), bad_words_ids=((1,),))
    with pytest.raises(EngineError, match="banned"):
        choose(process(torch.zeros(3), sampling, (0,), 1, frozenset()), sampling, 0, 1)


def test_greedy_ties_go_to_the_lowest_id() -> None:
    for size in (3, 61, 5000):
        assert choose(torch.ones(size), SamplingParams(), 0, 0) == 0
        assert choose(torch.cat([torch.zeros(2), torch.ones(size)]), SamplingParams(), 0, 0) == 2


def test_penalties_by_hand() -> None:
    """Prompt 0 1, output 2 2 3: repetition counts all of them, presence and frequency the output alone."""
    logits = torch.tensor([2.0, -1.0, 4.0, 0.5, 3.0], dtype=torch.float64)
    before = logits.clone()
    path = (0, 1, 2, 2, 3)

    def said(**options: float) -> list[float]:
        return process(logits, SamplingParams(**options), path, 2, frozenset()).tolist()  # type: ignore[arg-type]

    assert said(repetition_penalty=2.0) == [1.0, -2.0, 2.0, 0.25, 3.0]
    assert said(presence_penalty=0.5) == [2.0, -1.0, 3.5, 0.0, 3.0]
    assert said(frequency_penalty=0.25) == [2.0, -1.0, 3.5, 0.25, 3.0]
    assert said(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0) == [1.0, -2.0, -1.0, -1.75, 3.0]
    assert said(temperature=0.5) == [-4.0, -10.0, 0.0, -7.0, -2.0], "up to a constant"
    assert torch.equal(logits, before)


def test_bounds_by_hand() -> None:
    logits = torch.zeros(5)

    def left(path: Prefix, **options: object) -> set[int]:
        sampling = SamplingParams(**options)  # type: ignore[arg-type]
        return alive(process(logits, sampling, path, 2, frozenset({4})))

    assert left((0, 1), allowed_token_ids=(1, 3)) == {1, 3}
    assert left((0, 1), min_tokens=1) == {0, 1, 2, 3}
    assert left((0, 1, 2), min_tokens=1) == {0, 1, 2, 3, 4}
    words = ((0,), (2, 3), (2, 2, 1))
    assert left((0, 1), bad_words_ids=words) == {1, 2, 3, 4}
    assert left((0, 2), bad_words_ids=words) == {1, 2, 3, 4}, "a word that began in the prompt is no output"
    assert left((0, 1, 2), bad_words_ids=words) == {1, 2, 4}
    assert left((0, 1, 2, 2), bad_words_ids=words) == {2, 4}
    assert left((0, 1, 2, 0, 2), bad_words_ids=words) == {1, 2, 4}
    biased = process(logits, SamplingParams(logit_bias={2: 1.5, 0: -3.0}), (0, 1), 2, frozenset())
    assert biased.tolist() == [-3.0, 0.0, 1.5, 0.0, 0.0]
    assert not logits.any()


def test_processors_see_the_path_and_a_copy() -> None:
    seen: list[Prefix] = []

    def spoil(path: SequenceOf[int], scores: Tensor) -> Tensor:
        seen.append(tuple(path))
        scores[0] = 9.0
        return scores

    logits = torch.zeros(3)
    sampling = SamplingParams(logits_processors=(spoil,), logit_bias={1: 2.0})
    assert process(logits, sampling, (1, 2), 1, frozenset()).tolist() == [9.0, 2.0, 0.0]
    assert seen == [(1, 2)]
    assert not logits.any()
    half = process(torch.zeros(3, dtype=torch.bfloat16), sampling, (1,), 1, frozenset())
    assert half.dtype == torch.float32
