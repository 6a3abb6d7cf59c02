"""From what masks say to a tree: best first, calibrated, priced, and under sampling drawn with the target's noise."""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.core.sampler import choose, process
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters.s3d import S3D
from selfdraft.drafters.space import Space
from selfdraft.drafting.cost_model import RowCost
from selfdraft.drafting.mask_prediction import Calibration, Guess, Guesser, Place, expand, places, ranks
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.errors import MissingMasks, OptionError
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter
from selfdraft.types import Budget, PassVariant, SamplingParams
from tests.clocks import on_passes
from tests.models import VOCAB, run, tiny_llama, tiny_target

WIDE = Budget(max_nodes=64, max_depth=8, max_probe_depth=8)
Chances = list[tuple[float, ...]]
"""For each place, the chances of its tokens, likeliest first."""

shares = st.lists(st.integers(1, 60), min_size=1, max_size=3).map(
    lambda parts: tuple(sorted((part / (sum(parts) + 7) for part in parts), reverse=True))
)


def no_link(_token: int, _ids: Tensor) -> None:
    return None


def stated(_depth: int, _rank: int, raw: float) -> float:
    return raw


def tree_of(chances: Chances, budget: Budget, price: float = 0.0) -> Draft:
    """Token 10 * depth + rank has `chances[depth - 1][rank]`, whatever stands before it."""
    guesses = [Guess(tuple(10 * (i + 1) + rank for rank in range(len(each))), each) for i, each in enumerate(chances)]
    room = Budget(budget.max_nodes, min(budget.max_depth, len(chances)), 8)
    return expand(
        guesses[0], lambda depth, token, node, parent: guesses[depth], stated, room, [price] * room.max_nodes, "x"
    )


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    """For every node the tokens from the root down to it."""
    found: list[tuple[int, ...]] = []
    for node, parent in enumerate(draft.parents):
        found.append((*(found[parent] if parent != ROOT else ()), draft.tokens[node]))
    return found


def likely(path: tuple[int, ...], chances: Chances) -> float:
    return prod(chances[token // 10 - 1][token % 10] for token in path)


@given(chances=st.lists(shares, min_size=1, max_size=3), nodes=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_no_tree_of_that_size_is_accepted_longer(chances: Chances, nodes: int) -> None:
    """Expected accepted tokens: the sum over nodes of the chance of their path. Brute force over all trees."""
    ids = [[10 * (place + 1) + rank for rank in range(len(each))] for place, each in enumerate(chances)]
    every = [path for depth in range(1, len(ids) + 1) for path in product(*ids[:depth])]
    nodes = min(nodes, len(every))

    def is_tree(chosen: tuple[tuple[int, ...], ...]) -> bool:
        return all(len(path) == 1 or path[:-1] in chosen for path in chosen)

    best = max(
        sum(likely(path, chances) for path in chosen) for chosen in combinations(every, nodes) if is_tree(chosen)
    )
    draft = tree_of(chances, Budget(nodes, 8, 8))
    assert len(draft) == nodes
    assert sum(likely(path, chances) for path in paths_of(draft)) == pytest.approx(best)
    assert len(set(paths_of(draft))) == nodes


@given(chances=st.lists(shares, min_size=1, max_size=3), price=st.floats(0.001, 0.9))
def test_a_node_is_in_the_tree_iff_it_pays(chances: Chances, price: float) -> None:
    ids = [[10 * (place + 1) + rank for rank in range(len(each))] for place, each in enumerate(chances)]
    every = [path for depth in range(1, len(ids) + 1) for path in product(*ids[:depth])]
    clear = [path for path in every if abs(likely(path, chances) - price) > 1e-9]
    drawn = set(paths_of(tree_of(chances, WIDE, price)))
    assert {path for path in clear if likely(path, chances) > price} == drawn.intersection(clear)


def test_a_tree_ends_at_the_budget() -> None:
    chances: Chances = [(0.9, 0.05)] * 6
    assert max(tree_of(chances, Budget(64, 3, 8)).depths) == 3
    assert len(tree_of(chances, Budget(5, 8, 8))) == 5
    chain = tree_of([(0.9, 0.05)] * 4, Budget(4, 8, 8))
    assert (chain.parents, chain.probabilities) == ((-1, 0, 1, 2), (0.9,) * 4)
    assert ranks(Draft((1, 2, 3, 4), (-1, -1, 0, -1), ("x",) * 4, 4)) == [0, 1, 0, 2]


def test_calibration_books_only_what_was_tried() -> None:
    """Children of accepted nodes and of the root were tried; what hangs under a rejected node says nothing."""
    draft = Draft((1, 2, 3, 4, 5), (-1, -1, 0, 1, 2), ("x",) * 5, 5, (0.55, 0.2, 0.9, 0.95, 0.4))
    book = Calibration()
    for _ in range(200):
        book.observe(Result(draft, path=(0,), tokens=(1, 9)))
    assert book.chance(1, 0, 0.55) > 0.9, "accepted"
    assert book.chance(1, 1, 0.2) < 0.05, "its sibling was rejected"
    assert book.chance(2, 0, 0.9) < 0.1, "tried under the accepted node, and rejected"
    assert book.chance(3, 0, 0.4) == 0.4, "never tried: under a rejected node"
    book = Calibration()
    for _ in range(200):
        book.observe(Result(Draft((1, 4), (-1, 0), ("x",) * 2, 2, (0.5, 0.95)), path=(), tokens=(7,)))
    assert book.chance(2, 0, 0.95) == 0.95, "its parent was rejected"
    book.observe(Result(Draft.chain([3], "x"), tokens=(3,)))
    assert book.chance(1, 0, 0.8) == 0.8, "a draft without scores is no news"


def test_a_chance_starts_with_what_the_drafter_says() -> None:
    book = Calibration()
    book.observe(Result(Draft.chain([1], "x", [0.6]), path=(0,), tokens=(1, 2)))
    assert 0.6 < book.chance(1, 0, 0.6) < 0.75


def test_the_price_of_a_row() -> None:
    """Tokens per second now, times the seconds that a row adds: T(n) = 1 + 0.1 n and 2 tokens a step."""
    row_cost = RowCost()
    assert row_cost.tokens == 0.0, "nothing is known"
    for step in range(400):
        rows = (4, 12)[step % 2]
        row_cost.observe(rows, 1.0 + 0.1 * rows, 2)
    assert row_cost.tokens == pytest.approx(2 / 1.8 * 0.1, rel=0.1)
    for step in range(400):
        rows = (30, 50)[step % 2]
        row_cost.observe(rows, 1.0 + 0.1 * rows, 1)
    assert row_cost.tokens == pytest.approx(0.1 / 1.1, rel=0.1), "plain decoding has 1 token in 1.1 seconds"
    fixed = RowCost(0.3)
    fixed.observe(4, 1.0, 1)
    fixed.observe(40, 9.0, 1)
    assert fixed.tokens == 0.3


def test_rows_that_cost_nothing_are_free() -> None:
    row_cost = RowCost()
    for step in range(100):
        row_cost.observe((4, 12)[step % 2], 1.0, 2)
    assert row_cost.tokens == 0.0


def test_only_steps_that_were_drafted_for_are_timed() -> None:
    now = [1000.0]
    timer = StepTimer(lambda: now[0])
    step = Result(Draft.chain([1], "x", [0.5]), tokens=(5,), argmax=(5, 5))
    assert timer.seconds([Result(EMPTY, tokens=(5,), argmax=(5,))]) is None, "a prompt is read, and nobody drafts"
    timer.start(1)
    now[0] += 2.0
    assert timer.seconds([step]) == 2.0
    assert timer.seconds([step]) is None, "no step was begun"
    timer.start(1)
    assert timer.seconds([step, step]) is None, "the prompt of another is read beside it"
    timer.start(2)
    assert timer.seconds([step, Result(EMPTY)]) is None, "only a part of a prompt is read"
    guesser = Guesser(8, 2, RowCost())
    guesser.observe([step], None)
    assert guesser.row_cost.time.steps == 0
    guesser.observe([step], 0.1)
    assert guesser.row_cost.time.steps == 1


@given(seed=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_endings_are_a_distribution(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    chances: Chances = [tuple(torch.randn(3, generator=draw).softmax(0).sort(descending=True).values.tolist())] * 3
    ends = Guesser(8, 3, RowCost(0.0)).endings(tree_of(chances, Budget(7, 3, 3)))
    assert sum(chance for _, chance in ends) == pytest.approx(1.0)
    assert [chance for _, chance in ends] == sorted((chance for _, chance in ends), reverse=True)
    assert {point for point, _ in ends} == {ROOT, *range(7)}


SAMPLINGS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3, top_p=0.9),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5),
    "greedy penalties": SamplingParams(repetition_penalty=1.4, logit_bias={3: 2.0}),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_first_guess_is_what_the_target_would_choose(name: str) -> None:
    """Rows with the target's own logits guess the target's own words: the noise is the same, place by place."""
    sampling = SAMPLINGS[name]
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)).double()
    sequence = open_sequence([1, 2, 3], sampling, seed=7, eos=frozenset(), context=64)
    said = places(logits, sequence)
    path = list(sequence.tokens)
    for row, place in zip(logits, said, strict=True):
        scores = process(row, sampling, path, 3, frozenset())
        path.append(choose(scores, sampling, 7, len(path)))
        guess = place.after(path[-2], no_link, 2)
        assert guess.tokens[0] == path[-1]
        assert guess.chances[0] > guess.chances[1]


def test_a_link_is_added_before_the_noise() -> None:
    place = Place(torch.tensor([4, 5, 6]), torch.tensor([3.0, 2.0, 1.0]), torch.zeros(()), 0.5)
    assert place.after(9, no_link, 1).tokens == (4,)
    asked: list[int] = []

    def link(token: int, ids: Tensor) -> Tensor:
        asked.append(token)
        return torch.tensor([0.0, 0.0, 1.5])  # counts 3 at temperature 0.5

    guess = place.after(9, link, 3)
    assert (guess.tokens, asked) == ((6, 4, 5), [9])
    assert guess.chances[0] == pytest.approx(float(torch.tensor([4.0, 3.0, 2.0]).softmax(0)[0]))


class Mirror(HFTarget):
    """Its short pass leaves nothing out, so what the last token's row says there is what it will say in the end."""

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        return super().forward(rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_perfect_drafter_is_always_accepted(seed: int) -> None:
    """At temperature 1 each token is a throw of dice; a drafter with the target's logits throws the same."""
    adapters = [MaskAdapter("s3d", torch.zeros(1, 48))]
    target = on_passes(Mirror(tiny_llama(), slots=1, adapters=adapters))
    drafter = S3D(target, num_masks=1, num_speculative_tokens=1, branches=1, min_probability=0.0)
    (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(temperature=1.0, max_tokens=60, seed=seed))
    assert sequence.stats.num_draft_tokens >= 29
    assert sequence.stats.draft_acceptance_rate == 1.0
    assert len(set(sequence.output)) > 15, "it was no greedy text"


def space() -> Space:
    drafter = Space(tiny_target(), min_probability=0.0, branches=1)
    drafter._shift = no_link
    return drafter


def one_step(drafter: Space, groups: int) -> tuple[Sequence, Draft, Result]:
    """A draft of two candidates in a chain, and a step that accepts both; row i of the logits says token 20 + i."""
    drafter.groups = groups
    sequence = open_sequence([1, 2, 3], SamplingParams(), seed=0, eos=frozenset(), context=64)
    drafter.draft([sequence], [WIDE])  # makes the note
    note = drafter._notes[sequence]
    logits = torch.tensor([0.1, 0.0, 0.0])  # so that acceptance is most likely to end at the root
    note.places = [Place(torch.tensor([token, 30, 31]), logits, torch.zeros(()), 1.0) for token in (7, 8)]
    (draft,) = drafter.draft([sequence], [WIDE])
    assert draft.tokens[:2] == (7, 8)
    logits = torch.zeros(1 + len(draft), VOCAB)
    logits[torch.arange(len(logits)), 20 + torch.arange(len(logits))] = 5.0
    result = Result(draft, (0, 1), (7, 8, 9), tuple(range(1 + len(draft))), logits)
    result.proposed, result.nodes = draft, tuple(range(len(draft)))
    sequence.tokens += [7, 8, 9]
    return sequence, draft, result


def heard(drafter: Space, sequence: Sequence) -> list[int]:
    return [int(place.ids[0]) for place in drafter._notes[sequence].places if isinstance(place, Place)]


def test_space_reads_the_group_behind_the_end() -> None:
    drafter = space()
    sequence, draft, result = one_step(drafter, groups=3)
    group = [node for node in range(2, len(draft)) if draft.parents[node] == 1]
    drafter.observe([sequence], [result])
    assert len(group) == 1
    assert heard(drafter, sequence) == [20 + 1 + group[0] + i for i in range(4)], "all four masks"


def test_space_reads_the_later_masks_of_an_earlier_group() -> None:
    """Both candidates were accepted, but only one group was hung, and not behind them."""
    drafter = space()
    sequence, draft, result = one_step(drafter, groups=1)
    assert draft.tokens[2:] == tuple(drafter.masks), "one group"
    assert draft.parents[2] == ROOT
    drafter.observe([sequence], [result])
    first = 1 + 2  # behind the last token's row and two candidates
    assert heard(drafter, sequence) == [20 + first + 2, 20 + first + 3], "masks 0 and 1 spoke of what is known by now"


def test_space_drops_masks_that_were_clipped() -> None:
    drafter = space()
    sequence, draft, result = one_step(drafter, groups=3)
    clipped, nodes = draft.clip(Budget(2, 2, 3), VOCAB, 7)
    place = {old: new for new, old in enumerate(nodes)}
    assert len(clipped) < len(draft)
    short = Result(clipped, (place[0], place[1]), (7, 8, 9), result.argmax, result.logits)
    short.proposed, short.nodes = draft, nodes
    drafter.observe([sequence], [short])
    (group,) = [place[node] for node in range(2, len(draft)) if draft.parents[node] == 1 and node in place]
    assert heard(drafter, sequence) == [20 + 1 + group], "only what was run: depth 3 was the last"


RANGES: dict[str, tuple[type[Drafter], dict[str, object], str]] = {
    "nodes": (Space, {"num_speculative_tokens": 0}, r"num_speculative_tokens=0 .*at least 1, at most 256"),
    "branches": (Space, {"branches": 17}, r"branches=17 .*at most 16"),
    "groups": (Space, {"mask_groups": 0}, r"mask_groups=0 .*at least 1"),
    "probability": (Space, {"min_probability": 1.5}, r"min_probability=1.5 .*at most 1"),
    "masks": (S3D, {"num_masks": 4}, r"num_masks=4 .*at least 1, at most 3"),
    "no masks": (S3D, {"num_masks": 0}, r"num_masks=0 "),
    "text": (S3D, {"num_masks": "many"}, r"num_masks='many' is not a number"),
    "half": (S3D, {"skip_width": 1.5}, r"skip_width=1.5 is not a whole number"),
    "width": (S3D, {"skip_width": 4}, r"skip_width=4 .*at least 1, at most 3"),
    "s3d branches": (S3D, {"branches": 0}, r"branches=0 "),
    "nan": (S3D, {"min_probability": float("nan")}, "not a number"),
}


@pytest.mark.parametrize("name", RANGES)
def test_options_out_of_range(name: str) -> None:
    made, options, words = RANGES[name]
    with pytest.raises(OptionError, match=words):
        made(tiny_target(), **options)  # type: ignore[call-arg]


@pytest.mark.parametrize("made", [Space, S3D])
def test_without_masks_it_says_how_to_get_some(made: type[Drafter]) -> None:
    with pytest.raises(MissingMasks, match=r"selfdraft train --recipe (space|s3d) --model MODEL.*adapter"):
        made(HFTarget(tiny_llama()))  # type: ignore[call-arg]
