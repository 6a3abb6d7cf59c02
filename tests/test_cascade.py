"""The cascade: inner passes where they pay, what costs no pass where they do not, and the plain text in every case."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from selfdraft.core.rows import Rows, tree_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import build
from selfdraft.drafters.auto import Auto
from selfdraft.drafters.cascade import Cascade
from selfdraft.drafting.autoregressive import Chain
from selfdraft.drafting.context_tree import ContextTree
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.estimators import TRUSTED
from selfdraft.drafting.inner_passes import PAUSES, TOGETHER, InnerPasses, InnerPassRule, Link
from selfdraft.drafting.mixing import Credit, Merger
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.sources import Contexts, Copies, Reader
from selfdraft.models.packed.arena import Arena
from selfdraft.models.packed.quantise import quantised_linear
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter
from selfdraft.types import Budget, PassVariant, Rounded, SamplingParams
from tests.clocks import on_passes
from tests.models import VOCAB, run, tiny_llama, tiny_target

PROMPTS = [[(i * i * 7 + k) % VOCAB for i in range(9)] for k in range(2)]


class Machine:
    """A clock that moves only while the target runs: `whole` and `inner` are seconds of a pass, `row` of each row."""

    def __init__(self, whole: float, inner: float, row: float = 0.0) -> None:
        self.now = self.began = 0.0
        self.whole, self.inner, self.row = whole, inner, row
        self.inner_rows: list[int] = []
        self.inner_requests: list[int] = []

    def __call__(self) -> float:
        return self.now


def slowed(target: HFTarget, machine: Machine) -> HFTarget:
    """The target, its passes as slow as those of the machine."""
    forward: Callable[..., Tensor] = target.forward

    def slow(rows: Rows, short: PassVariant | None = None) -> Tensor:
        machine.now += (machine.whole if short is None else machine.inner) + machine.row * len(rows)
        if short is not None:
            machine.inner_rows.append(len(rows))
            machine.inner_requests.append(len(rows.spans))
        return forward(rows, short)

    target.forward = slow  # type: ignore[method-assign]
    target.clock = machine
    return target


def timed(
    machine: Machine, name: str, sampling: SamplingParams, options: dict[str, object] | None = None, again: bool = False
) -> tuple[Drafter, list[Sequence]]:
    """The answers to PROMPTS on a machine of these costs; `again`: when the drafter has answered them once before."""
    target = slowed(tiny_target(), machine)
    drafter = build(name, target, options)
    for _ in range(again):
        run(target, drafter, PROMPTS, sampling)
    machine.began = machine.now
    return drafter, run(target, drafter, PROMPTS, sampling)


GREEDY, WARM = SamplingParams(max_tokens=60), SamplingParams(max_tokens=60, temperature=1.0, seed=3)


def inner_of(drafter: Drafter) -> InnerPasses:
    """The inner passes of `cascade`, or of `auto` with bits."""
    assert isinstance(drafter, Cascade | Auto)
    assert isinstance(drafter.inner, InnerPasses)
    return drafter.inner


NOTHING_KNOWN: dict[str, object] = {"recycling": False}
"""On sampled text that does not repeat itself, whatever costs no pass then has nothing to say."""


@pytest.mark.parametrize(
    ("inner", "row", "sampling"), [(0.1, 0.0, WARM), (0.3, 0.01, GREEDY), (1.0, 0.0, WARM), (3.0, 0.1, GREEDY)]
)
def test_never_slower_than_what_it_is_made_of(inner: float, row: float, sampling: SamplingParams) -> None:
    """Once it knows the machine: as fast as the better of plain and merged, but for a trial or two, and a step."""
    seconds, texts = {}, []
    for name in ("none", "merged", "cascade"):
        machine = Machine(1.0, inner, row)
        options = NOTHING_KNOWN if name != "none" else None
        texts.append([sequence.output for sequence in timed(machine, name, sampling, options, again=name != "none")[1]])
        seconds[name] = machine.now - machine.began
    assert texts[0] == texts[1] == texts[2]
    assert seconds["cascade"] <= 1.05 * min(seconds["none"], seconds["merged"]) + 4 * (inner + row) + 1


class Never(InnerPassRule):
    """No pass pays, and none is tried."""

    def pays(self, worth: float, cost: float) -> bool:
        return False

    def tries(self, worth: float, cost: float) -> bool:
        return False


def test_without_inner_passes_it_is_merged() -> None:
    """The very same trees, through an end of a bucket, the end of the answer, and the first small steps."""
    counts = []
    for name in ("merged", "cascade"):
        target = tiny_target()
        target.clock = lambda: 0.0
        drafter = build(name, target)
        if isinstance(drafter, Cascade):
            drafter.inner.rule = Never()
        texts = run(target, drafter, PROMPTS, WARM)
        counts.append([(s.stats.num_draft_tokens, s.stats.acceptance_histogram) for s in texts])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "options"), [("cascade", {}), ("auto", {"bits": 4})])
def test_cheap_passes_are_used_and_pay(name: str, options: dict[str, object]) -> None:
    machine, alone = Machine(1.0, 0.1), Machine(1.0, 0.1)
    drafter, texts = timed(machine, name, WARM, {**NOTHING_KNOWN, **options})
    assert isinstance(drafter, Cascade | Auto)
    assert drafter.guard.node_time.seconds == 0, "passes are no time of making trees"
    timed(alone, "merged", WARM, NOTHING_KNOWN)
    steps = sum(sequence.stats.num_steps for sequence in texts)
    assert sum(sequence.stats.num_draft_passes for sequence in texts) > 2 * steps
    assert machine.now < 0.5 * alone.now


@pytest.mark.parametrize(("name", "options"), [("cascade", {}), ("auto", {"bits": 4})])
def test_dear_passes_are_only_tried(name: str, options: dict[str, object]) -> None:
    machine = Machine(1.0, 2.0)
    drafter, texts = timed(machine, name, WARM, {**NOTHING_KNOWN, **options})
    passes = sum(sequence.stats.num_draft_passes for sequence in texts)
    assert TRUSTED <= passes <= TRUSTED + 8
    assert inner_of(drafter).rule.pause > PAUSES[0]


def test_inner_trees_are_verified_in_one_pass() -> None:
    """On a text that repeats itself, inner passes have a tree under the chain, and bring more than one token each."""
    machine = Machine(1.0, 0.05)
    target = slowed(tiny_target(), machine)
    drafter = build("cascade", target)
    (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(max_tokens=120))
    assert sequence.output == run(tiny_target(), "none", [[1, 2, 3]], SamplingParams(max_tokens=120))[0].output
    assert max(machine.inner_rows) > 2
    assert "cascade" in sequence.sources


class Eager(InnerPassRule):
    """Whatever a pass costs, it pays."""

    def pays(self, worth: float, cost: float) -> bool:
        return True


@pytest.mark.parametrize("profile", [None, Profile((1, 8, 64), (1.0, 1.2, 3.0), (0.0, 0.0, 0.0), host=0.1)])
def test_a_batch_of_chains(profile: Profile | None) -> None:
    """Sequences of different lengths, ends and limits in one inner pass."""
    wanted = [s.output for s in run(tiny_target(), "none", PROMPTS, WARM, eos=frozenset({5, 9}))]
    target = tiny_target(slots=3)
    target.profile = profile
    drafter = build("cascade", target)
    assert isinstance(drafter, Cascade)
    drafter.inner.rule = Eager()
    texts = run(target, drafter, PROMPTS, WARM, slots=3, eos=frozenset({5, 9}))
    assert [sequence.output for sequence in texts] == wanted
    assert sum(s.stats.num_draft_passes for s in texts) > sum(s.stats.num_steps for s in texts) / 2


def left_alone() -> HFTarget:
    """A model that rounding to 8 bits leaves as it is."""
    model = copy.deepcopy(tiny_llama())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(quantised_linear(layer, 8, Arena()).dequantised(torch.float64))
    return HFTarget(model)


def test_a_chain_that_is_hardly_right_is_not_taken_along() -> None:
    """In a batch each chain has to be worth its rows: one that is good must not pay for one that is not."""
    inner = inner_of(build("cascade", tiny_target(slots=2)))
    for rows in (1, 2, 3, 4) * 9:
        inner.rule.time.observe(rows, 0.1 + 0.1 * rows)
    inner.rule.throughput.observe(2, 1.0)
    for _ in range(200):
        inner.rule.confidence.observe([0.05], 0)
        inner.rule.confidence.observe([0.95], 1)
    links = [Link(Chain(Sequence([1, 2], 1, GREEDY, slot=slot), 8), Budget(0, 8, 0)) for slot in range(2)]
    for link, score in zip(links, (0.05, 0.95), strict=True):
        link.chain.add(3, score)
    inner._row_costs = [0.0] * 8
    assert inner._going(links, 0.0, first=False) == links[1:]
    assert inner._going(links[:1], 0.0, first=False) == []


@pytest.mark.parametrize(("row", "least", "most"), [(0.0, 4.0, 99.0), (0.5, 0.0, 2.0)])
def test_a_token_of_a_chain_pays_for_its_row_in_the_whole_pass(row: float, least: float, most: float) -> None:
    """Inner passes are nearly free here and often right: what they add must be worth the rows that verify it."""
    target = slowed(left_alone(), Machine(1.0, 0.01))
    target.profile = Profile((1, 64), (1.0, 1.0 + 63 * row), (0.0, 0.0))
    drafter = build("cascade", target, {"bits": 8, **NOTHING_KNOWN})
    for accepted in (0, 1, 1) * 70:
        inner_of(drafter).rule.confidence.observe([0.05], accepted)
    (sequence,) = run(target, drafter, PROMPTS[:1], WARM)
    assert least <= sequence.stats.num_draft_passes / sequence.stats.num_steps <= most


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_a_model_that_rounding_leaves_alone_agrees_with_itself(sampling: SamplingParams) -> None:
    """Every link is right then: noise, positions and memory of the inner passes are those of the target."""
    target = on_passes(left_alone())
    drafter = build("cascade", target, {"bits": 8})
    assert isinstance(drafter, Cascade)
    drafter.inner.rule = Eager()
    run(target, drafter, [[1, 2, 3], *PROMPTS], sampling)
    acceptance = drafter.inner.rule.confidence.acceptance
    assert acceptance.total == acceptance.weight > 30


@pytest.mark.parametrize("name", ["cascade", "auto"])
def test_a_chain_is_cut_by_how_often_its_tokens_are_right(name: str) -> None:
    """Not by the chances that the rounded model states: they are small here, and yet the model says the same."""
    target = slowed(left_alone(), Machine(1.0, 0.01, 0.04))
    target.profile = Profile((1, 64), (1.04, 3.56), (0.0, 0.0))
    drafter = build(name, target, {"bits": 8, **NOTHING_KNOWN})
    inner_of(drafter).rule = Eager()
    run(target, drafter, PROMPTS, WARM)
    for sequence in run(target, drafter, PROMPTS, WARM):
        assert sequence.stats.mean_acceptance_length > 8


# the rule


def test_worth_is_what_a_simulation_says() -> None:
    """Tokens with an inner pass minus tokens without, over many draws of independent tokens."""
    rule, draw = InnerPassRule(), random.Random(1)
    for _ in range(3000):
        rule.confidence.observe([0.95], int(draw.random() < 0.9))
    rate = rule.confidence.acceptance.value
    guessed, later = 2, 1
    rule.guessed.observe(later)

    def streak(most: int, chance: float) -> int:
        length = 0
        while length < most and draw.random() < chance:
            length += 1
        return length

    gained = []
    for _ in range(20000):
        right = streak(1 + guessed, rate)
        gained.append(right + (later if right == 1 + guessed else 0) - guessed)
    assert rule.worth([], guessed) == pytest.approx(sum(gained) / len(gained), abs=0.05)
    assert rule.worth([0.95], guessed) == pytest.approx(rate * rule.worth([], guessed), rel=0.1)


@pytest.mark.parametrize(("right", "made"), [(0.0, TRUSTED + 9), (0.5, 80)])
def test_trees_are_made_where_they_save_passes(right: float, made: int) -> None:
    """A pass takes a second, a tree 0.2: half a token that is guessed right is worth it, and nothing is not."""
    rule, count = InnerPassRule(), 0
    for _ in range(80):
        rule.time.observe(1, 1.0)
        if rule.hangs():
            count += 1
            rule.guessed.observe(right)
            rule.hanging.observe(0.2)
    assert count == made


@pytest.mark.parametrize("together", [TOGETHER, TOGETHER + 1])
def test_with_many_requests_at_a_time_no_inner_pass_is_run(together: int) -> None:
    prompts = [[3 * number + k for k in range(4)] for number in range(together)]
    machine = Machine(1.0, 0.01)
    target = slowed(tiny_target(slots=together), machine)
    run(target, build("auto", target, {"bits": 4}), prompts, GREEDY, slots=together)
    _, *drafting = machine.inner_requests  # the first pass is for no draft
    assert max(drafting) <= TOGETHER
    assert together > TOGETHER or max(drafting) == TOGETHER


def test_trials_become_rare() -> None:
    rule, tried = InnerPassRule(), []
    for step in range(5000):
        if rule.tries(0.9, rule.time.at(1)):
            tried.append(step)
            rule.time.observe(1, 1.0)
    assert tried[:TRUSTED] == list(range(TRUSTED))
    assert len(tried) <= TRUSTED + 12
    rule.paid()
    assert sum(rule.tries(0.9, rule.time.at(1)) for _ in range(PAUSES[0])) == 1


def test_a_hopeless_pass_is_tried_once() -> None:
    """Where the plain path makes its weights anew for every pass, eight of them would be felt."""
    machine = Machine(1.0, 20.0)
    _, texts = timed(machine, "cascade", WARM, NOTHING_KNOWN)
    assert sum(sequence.stats.num_draft_passes for sequence in texts) <= 5


def test_what_hangs_under_a_path_is_what_hangs_there_later() -> None:
    """The tree under a path that is only thought equals the tree once the path was said, but for depth."""
    text = [1, 2, 3, 4, 5, 6, 7] * 4 + [1, 2]
    trees = []
    ways: list[tuple[list[int], list[int]]] = [(text, [3, 4]), ([*text, 3, 4], [])]
    for read, path in ways:
        reader = Reader(ContextTree(), own=True)
        merger = Merger([Contexts("context", reader), Copies("copy", reader)], Credit())
        for token in read:
            reader.push(token)
        trees.append(merger.tree(Budget(4, 4, 4), [0.05] * 4, path).tokens)
    assert trees[0] == trees[1] == (5, 6, 7, 1)


def test_a_tree_under_a_path_is_not_booked_as_the_texts() -> None:
    reader = Reader(ContextTree(), own=True)
    merger = Merger([Copies("copy", reader)], Credit())
    for token in [1, 2, 3, 4, 5] * 3:
        reader.push(token)
    merger.tree(Budget(4, 4, 4), [0.05] * 4, [1, 2])
    merger.score([1])
    (mean,) = merger.credit.counts["copy"]._means.values()
    assert mean.value > mean.guess, "the copy said 1, and 1 it was"


def test_tree_rows() -> None:
    tree = Draft((5, 6, 7), (-1, -1, 1), ("x",) * 3, 3)
    rows = tree_rows([(2, 10, 4, tree), (0, 3, 9, EMPTY)])
    assert list(rows.tokens) == [4, 5, 6, 7, 9]
    assert list(rows.positions) == [10, 11, 11, 12, 3]
    assert rows.logit_rows == (0, 1, 2, 3, 4)


def test_memory_is_its_own() -> None:
    drafter = build("cascade", tiny_target(), {"memory": 50})
    assert isinstance(drafter, Cascade)
    assert isinstance(drafter.memory, Memory)
    assert drafter.inner.short == Rounded(4)
