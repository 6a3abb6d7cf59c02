"""Lookahead's second half: what it measures, what it moves by it, its statistics, layouts and scaling law."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from math import log

import pytest
import torch

from selfdraft.core.noise import gumbel, gumbel_rows
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import ROOT
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.drafters.lookahead.adaptation import COLUMNS, MOVE, TRIAL, Sizes
from selfdraft.drafters.lookahead.drafter import GIVEN, GUESSES, PLAIN, WINDOWED, Lookahead
from selfdraft.drafters.lookahead.guesses import Guess, trie
from selfdraft.drafters.lookahead.pool import ANSWERS, PROMPT, TEXT, WINDOW, Pool
from selfdraft.drafters.lookahead.window import Window, window_parents
from selfdraft.drafting.estimators import Acceptance, Mean, StepTime
from selfdraft.drafting.successors import Answers, likeliest
from selfdraft.drafting.trials import PAUSES as TRIAL_PAUSES
from selfdraft.drafting.trials import SHORTEST, Trials
from selfdraft.engine.engine import Engine
from selfdraft.types import Budget, SamplingParams
from tests.models import VOCAB, run, tiny_target

MOTIF = [17, 4, 33, 8, 51, 22, 9]
WIDE = Budget(max_nodes=128, max_depth=64, max_probe_depth=256)
GREEDY = SamplingParams(max_tokens=60)
SAMPLED = SamplingParams(max_tokens=60, temperature=0.9, seed=3)


def opened(tokens: SequenceOf[int], sampling: SamplingParams = GREEDY, eos: frozenset[int] = frozenset()) -> Sequence:
    return open_sequence(tokens, sampling, seed=3, eos=eos, context=512)


# what is measured


def test_the_time_of_a_row_is_found() -> None:
    timed = StepTime()
    for step in range(200):
        rows = 1 + step * 7 % 20
        timed.observe(rows, 0.010 + 0.0005 * rows)
    assert timed.per_row == pytest.approx(0.0005, rel=0.05)
    assert timed.at(40) == pytest.approx(0.030, rel=0.05)


def test_a_hiccup_hardly_moves_the_time_and_a_new_load_does() -> None:
    timed = StepTime()
    for step in range(100):
        timed.observe(1 + step % 9, 0.010)
    timed.observe(5, 60.0)
    assert timed.at(5) < 0.011
    for step in range(300):
        timed.observe(1 + step % 9, 0.020)
    assert timed.at(5) == pytest.approx(0.020, rel=0.05)


def test_rows_are_free_until_they_were_seen_to_cost() -> None:
    timed = StepTime()
    for _ in range(50):
        timed.observe(8, 0.01)
    assert timed.per_row == 0.0
    for step in range(50):
        timed.observe(8 + step % 5, 0.01 - 0.001 * (step % 5))  # faster with more rows: noise, not a gift
    assert timed.per_row == 0.0


def test_means_start_at_their_guess_and_forget() -> None:
    mean = Mean(0.5, 2.0)
    assert mean.value == 0.5
    mean.observe(1.0)
    assert mean.value == pytest.approx(2 / 3)
    for _ in range(300):
        mean.observe(0.0)
    assert mean.value < 0.03
    rates = Acceptance()
    assert rates.rate("new") == 0.5
    for _ in range(50):
        rates.observe("good", True)
    assert rates.rate("good") > 0.95
    assert rates.rate("new") == 0.5


# which sizes follow


def sizes_after(steps: int, gain: float, per_row: float, *, width: int = 5, tokens: int = 2) -> Sizes:
    """Steps of 10 ms and so much for each row, in which the window brought `gain` tokens each."""
    sizes = Sizes(width, 4, 5)
    feed(sizes, steps, gain, per_row, tokens)
    return sizes


def feed(sizes: Sizes, steps: int, gain: float, per_row: float, tokens: int = 2) -> list[bool]:
    ran = []
    for step in range(steps):
        ran.append(sizes.running)
        rows = 1 + step % 5 + (sizes.width * (sizes.size - 1) - 1) * sizes.running
        sizes.time.observe(rows, 0.010 + per_row * rows)
        if sizes.running:
            sizes.gain.observe(gain)
        sizes.step(tokens)
    return ran


def test_the_price_is_what_a_row_costs_in_tokens() -> None:
    sizes = sizes_after(TRIAL - 1, 0.0, 0.0005)
    expected = 2 / sizes.time.seconds * 0.0005
    assert sizes.price == pytest.approx(expected, rel=0.15)
    sizes.own.observe(sizes.time.seconds)  # drafting takes as long as the pass: half the tokens per second
    assert sizes.price == pytest.approx(expected / 2, rel=0.15)


def test_a_window_that_pays_grows_to_where_one_more_column_would_not() -> None:
    sizes = Sizes(5, 4, 5)
    for _ in range(300):  # what the scaling law says of a window of this width
        feed(sizes, MOVE, 0.3 * log(1 + sizes.width), 0.00003)
    best = 0.3 / (sizes.price * 3) - 1
    assert 5 < sizes.width < COLUMNS
    assert sizes.width == pytest.approx(best, abs=1.5)
    assert sizes.running
    for _ in range(300):  # the machine got busy: rows cost more
        feed(sizes, MOVE, 0.3 * log(1 + sizes.width), 0.0001)
    assert sizes.running
    assert sizes.width == pytest.approx(0.3 / (sizes.price * 3) - 1, abs=1.5)
    assert sizes.width < best / 2


def test_a_window_runs_on_where_rows_are_free() -> None:
    sizes = sizes_after(500, 0.0, 0.0)
    assert sizes.running
    assert (sizes.width, sizes.size, sizes.guesses) == (5, 4, 5)


def test_the_guess_set_grows_while_its_last_rank_pays() -> None:
    sizes = Sizes(5, 4, 5)
    for rank in range(8):
        for _ in range(100):
            sizes.ranks.observe(rank, True)
    for rank in range(8, 20):
        for _ in range(500):
            sizes.ranks.observe(rank, False)
    feed(sizes, 400, 1.0, 0.001)
    assert sizes.guesses in (8, 9)
    assert sizes.guesses <= sizes.most == 20


# the drafter with a clock of its own


class Machine:
    """A clock that moves only while the target runs, by its rows."""

    def __init__(self, per_row: float) -> None:
        self.now, self.per_row = 0.0, per_row


def timed(
    per_row: float, prompts: SequenceOf[SequenceOf[int]], sampling: SamplingParams, **options: object
) -> Lookahead:
    target, machine = tiny_target(), Machine(per_row)
    forward = target.forward

    def slow(rows, skip=None):  # type: ignore[no-untyped-def]
        machine.now += 0.010 + machine.per_row * len(rows)
        return forward(rows, skip)

    target.forward = slow  # type: ignore[method-assign]
    drafter = build("lookahead", target, {"window_size": 5, "ngram_size": 4, "guess_set_size": 5, **options})
    assert isinstance(drafter, Lookahead)
    drafter.clock = lambda: machine.now
    wanted = [s.output for s in run(tiny_target(), "none", prompts, sampling)]
    assert [s.output for s in run(target, drafter, prompts, sampling)] == wanted
    return drafter


RANDOM = [[(i * i * 7 + k) % VOCAB for i in range(9)] for k in range(6)]


def test_the_drafter_measures_the_machine() -> None:
    drafter = timed(0.0004, RANDOM, GREEDY)
    assert drafter.sizes.time.per_row == pytest.approx(0.0004, rel=0.1)
    assert drafter.sizes.own.value == 0.0
    assert drafter.sizes.price > 0


STORY = [*MOTIF, 40, *MOTIF[:3], 41, 42, *MOTIF]


def spent(
    per_row: float, sampling: SamplingParams, requests: int, *, drafter: str = "lookahead", adaptive: bool = True
) -> tuple[float, int, int]:
    """(seconds, tokens, steps) of requests one after the other, on a machine whose rows cost so much."""
    target, machine = tiny_target(), Machine(per_row)
    forward = target.forward

    def slow(rows, skip=None):  # type: ignore[no-untyped-def]
        machine.now += 0.010 + machine.per_row * (len(rows) - 1)
        return forward(rows, skip)

    target.forward = slow  # type: ignore[method-assign]
    target.clock = lambda: machine.now
    sizes = {"window_size": 7, "ngram_size": 5, "guess_set_size": 7, "adaptive": adaptive}
    made = build(drafter, target, sizes if drafter == "lookahead" else {})
    tokens = steps = 0
    for sequence in run(target, made, [[*STORY, k] for k in range(requests)], sampling):
        tokens += sequence.num_output_tokens
        steps += sequence.stats.num_steps
    return machine.now, tokens, steps


@pytest.mark.parametrize("sampling", [replace(GREEDY, max_tokens=200), replace(SAMPLED, max_tokens=200)])
def test_where_rows_are_cheap_adaptive_makes_the_tokens_of_the_fixed_form(sampling: SamplingParams) -> None:
    seconds, tokens, steps = spent(1e-5, sampling, 8)
    fixed_seconds, fixed_tokens, fixed_steps = spent(1e-5, sampling, 8, adaptive=False)
    assert tokens == fixed_tokens
    assert tokens / steps > 0.95 * fixed_tokens / fixed_steps
    assert seconds < 1.05 * fixed_seconds


@pytest.mark.parametrize("per_row", [0.001, 0.005, 0.02])
def test_where_rows_are_dear_adaptive_costs_no_more_than_plain_decoding_and_its_trials(per_row: float) -> None:
    sampling = replace(SAMPLED, max_tokens=200)
    seconds, _, _ = spent(per_row, sampling, 8)
    plain, _, _ = spent(per_row, sampling, 8, drafter="none")
    fixed, _, _ = spent(per_row, sampling, 8, adaptive=False)
    trial = 3 * SHORTEST * 64 * per_row  # the first one of each way: 64 rows at most
    assert seconds < 1.03 * min(plain, fixed) + 2 * trial
    assert fixed > plain, "else nothing was to be learned here"


# trials


def decode(trials: Trials, costs: SequenceOf[tuple[int, float]], steps: int) -> float:
    """Steps in which way i makes `costs[i]` (tokens, seconds); returns seconds per token."""
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        made, took = costs[trials.way]
        tokens, seconds = tokens + made, seconds + took
        trials.step(made, took)
    return seconds / tokens


CHEAP = [(1, 1.0), (2, 1.9), (2, 1.5), (2, 1.2)]
DEAR = [(1, 1.0), (2, 2.5), (2, 5.0), (2, 9.0)]


def test_the_quickest_way_is_found_and_others_are_tried_ever_more_rarely() -> None:
    trials = Trials(4)
    decode(trials, CHEAP, 2000)
    assert trials.best == GIVEN
    assert decode(trials, CHEAP, 4000) < 0.6 * 1.03
    dear = Trials(4)
    decode(dear, DEAR, 110)
    assert dear.best == PLAIN
    tried = sum(dear.steps[1:])
    assert tried <= 64 + 12 + SHORTEST, "the nearer a way comes to the best, the longer it may take to lose"
    assert decode(dear, DEAR, 4000) < 1.03
    assert sum(dear.steps[1:]) - tried < 4 * tried


def test_a_change_from_dear_to_cheap_rows_and_back_is_followed() -> None:
    trials = Trials(4)
    decode(trials, DEAR, 1000)
    assert trials.best == PLAIN
    decode(trials, CHEAP, 2 * TRIAL_PAUSES[1])
    assert trials.best == GIVEN
    decode(trials, DEAR, 400)
    assert trials.best == PLAIN, "the best way became slower: the others are due at once"


def test_a_way_that_is_far_too_slow_is_given_up_after_a_few_steps() -> None:
    trials = Trials(2)
    decode(trials, [(1, 1.0), (2, 8.0)], 60)
    assert trials.steps[1] == SHORTEST


def test_one_hiccup_ends_no_way() -> None:
    trials = Trials(2)
    decode(trials, [(1, 1.0), (2, 1.0)], 300)
    assert trials.best == 1
    trials.step(2, 500.0)
    assert trials.best == 1
    decode(trials, [(1, 1.0), (2, 1.0)], 300)
    assert trials.best == 1


def test_a_clock_that_stands_still_leaves_steps_to_judge_by() -> None:
    trials = Trials(3)
    decode(trials, [(1, 0.0), (2, 0.0), (3, 0.0)], 1000)
    assert trials.best == GUESSES + 1


def test_with_fixed_sizes_nothing_moves() -> None:
    drafter = timed(0.02, RANDOM, SAMPLED, adaptive=False)
    assert drafter.sizes.running
    assert (drafter.sizes.width, drafter.sizes.size, drafter.sizes.guesses) == (5, 4, 5)
    assert drafter.sizes.time.steps == 0
    sequence = opened(MOTIF * 2)
    draft = drafter.draft([sequence], [WIDE])[0]
    assert len(draft) - draft.num_candidates == 5 * 3 - 1
    assert drafter._notes[sequence].window.pool.most == 5


def test_candidates_that_do_not_pay_are_left_out_but_still_judged() -> None:
    drafter = Lookahead(tiny_target(), ngram_size=4)
    drafter.trials.best = drafter.trials.way = WINDOWED
    feed(drafter.sizes, 40, 9.0, 0.001)
    sequence = opened([1, 2, 3, 4, 1, 5, 6, 7, 1])
    (whole,) = drafter.draft([sequence], [WIDE])
    assert set(whole.tokens[: whole.num_candidates]) == {2, 3, 4, 5, 6, 7}
    kind = next(node.kind for node in drafter._notes[sequence].nodes if node.token == 5)
    for _ in range(300):
        drafter.sizes.acceptance.observe(kind, False)
    (less,) = drafter.draft([sequence], [WIDE])
    assert set(less.tokens[: less.num_candidates]) == {2, 3, 4}, "5 hardly ever came, so nothing below it pays"
    assert drafter.sizes.acceptance.rate(kind) < 0.05
    sequence.tokens.append(5)
    result = Result(less, (), (5,), tuple(range(1 + len(less))), proposed=less, nodes=tuple(range(len(less))))
    before = drafter.sizes.acceptance.rate(kind)
    drafter.observe([sequence], [result])
    assert drafter.sizes.acceptance.rate(kind) > before


def test_a_width_that_moves_in_mid_request_keeps_the_columns_that_stay() -> None:
    text = [*MOTIF, 17]
    window = Window(4, 3, Pool(4, 2), 0)
    window.restart(text)
    before = [list(column) for column in window.columns]
    window.resize(2, text)
    assert (window.columns, len(window.ages)) == (before[:2], 2)
    window.resize(5, text)
    assert window.columns[:2] == before[:2]
    assert len(window.columns) == len(window.ages) == 5
    assert len(window.tokens()) == len(window_parents(5, 3))


def test_a_step_beside_a_prefill_is_not_timed() -> None:
    target = tiny_target(slots=2)
    drafter = Lookahead(target)
    engine = Engine(target, drafter, slots=2, chunk=8)
    engine.submit(opened(MOTIF))
    engine.advance()
    engine.advance()
    engine.advance()
    steps = drafter.sizes.time.steps
    assert steps > 0
    engine.submit(opened(list(range(30))))
    engine.advance()
    assert drafter.sizes.time.steps == steps


# guesses


def test_what_stood_before_ranks_the_tuples() -> None:
    pool = Pool(3, 5)
    text = [1, 2, 9, 30, 31, 5, 2, 9, 40, 41, 6, 9, 50, 51, 1, 2, 9]
    pool.feed(text, 0)
    assert pool.followers(9) == [(50, 51), (40, 41), (30, 31)]
    assert pool.ranked(text) == [((30, 31), TEXT, 2), ((40, 41), TEXT, 1), ((50, 51), TEXT, 0)]


def test_a_tuple_of_the_text_is_not_the_windows_merit() -> None:
    pool = Pool(3, 5, prompt=2)
    pool.add(7, (1, 2))
    pool.add(8, (1, 2))
    pool.feed([7, 1, 2, 8, 1, 2, 9, 9], 0)
    pool.add(7, (1, 2))
    sources = {key: [(found[0], found[1]) for found in pool.ranked([key])] for key in (7, 1, 8)}
    assert sources == {7: [((1, 2), PROMPT)], 1: [((2, 9), TEXT), ((2, 8), PROMPT)], 8: [((1, 2), TEXT)]}
    pool.add(60, (1, 2))
    assert pool.ranked([60])[0][1] == WINDOW


def test_a_copy_of_what_was_just_said_repeats_itself() -> None:
    window = Window(2, 4, Pool(5, 2), 0)
    text = [1, 2, 3, 4, 5, 6, 5]
    window.restart(text)
    assert window.copies(text) == [(6, 5, 6, 5)]
    assert window.copies([1, 2, 3, 4, 5, 6, 7]) == []
    late = Window(2, 4, Pool(5, 2), 6)  # the prompt is not to be used
    late.restart(text)
    assert late.copies(text) == []


def test_no_guess_goes_on_behind_an_end() -> None:
    drafter = Lookahead(tiny_target(), adaptive=False)
    sequence = opened([1, 2, 3, 4, 1], eos=frozenset({3}))
    (draft,) = drafter.draft([sequence], [WIDE])
    assert draft.tokens[: draft.num_candidates] == (2, 3)


def test_equal_prefixes_are_one_node_and_belong_to_who_needs_no_window() -> None:
    nodes = trie([Guess((1, 2), WINDOW, 0, 0, True), Guess((1, 3), TEXT, 1), Guess((4,), ANSWERS, 2)])
    assert [(node.token, node.parent, node.depth) for node in nodes] == [
        (1, ROOT, 1),
        (2, 0, 2),
        (3, 0, 2),
        (4, ROOT, 1),
    ]
    assert [node.guess.source for node in nodes] == [TEXT, WINDOW, TEXT, ANSWERS]


def test_noise_of_many_places_is_that_of_each() -> None:
    ids = torch.tensor([[3, 1, 60], [7, 7, 2]])
    rows = torch.from_numpy(gumbel_rows(-5, [11, 400], ids.numpy()))
    each = torch.stack([gumbel(-5, 11, ids[0]), gumbel(-5, 400, ids[1])])
    torch.testing.assert_close(rows, each, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_runners_up_are_what_the_target_would_choose_there(options: dict[str, float]) -> None:
    from selfdraft.core.sampler import choose, process

    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature=temperature, **options)  # type: ignore[arg-type]
        sequence, known = opened([1], sampling), Answers()
        scores, ids = likeliest(logits, sampling)
        for row in range(len(logits)):
            known.learn(9, scores[row], ids[row], False)
            wanted = choose(process(logits[row], sampling, [1], 1, frozenset()), sampling, 3, 50 + row)
            assert known.guess(9, sequence, 50 + row, 2)[0][0] == wanted
    assert Answers().guess(9, sequence, 1, 1) == ([], False)


# statistics


@pytest.mark.parametrize("adaptive", [False, True])
def test_statistics_count_what_was_accepted(adaptive: bool) -> None:
    target = tiny_target(slots=2)
    drafter = Lookahead(target, adaptive=adaptive)
    sequences = run(target, drafter, [MOTIF * 8, [*range(0, 60, 3)], MOTIF[:2]], GREEDY, slots=2)
    total = drafter.statistics()
    assert sum(total.accepted.values()) == sum(s.stats.num_accepted_draft_tokens for s in sequences)
    assert total.accepted[TEXT] > 0
    assert (total.accepted[ANSWERS] > 0) == adaptive
    assert 0 < total.hits <= total.steps
    assert total.hit_rate == total.hits / total.steps
    assert 0 <= total.mean_rank <= 24
    assert total.size == 0, "no request is running"
    assert total.as_dict()["accepted"] == total.accepted


def test_statistics_of_one_request() -> None:
    target = tiny_target()
    drafter = Lookahead(target)
    sequence, other = opened(MOTIF * 4), opened(MOTIF)
    engine = Engine(target, drafter)
    engine.submit(sequence)
    while sequence.num_output_tokens < 20:
        engine.advance()
    mine = drafter.statistics(sequence)
    assert sum(mine.accepted.values()) == sequence.stats.num_accepted_draft_tokens
    assert mine.size == len(drafter._notes[sequence].window.pool) > 0
    assert drafter.statistics(other).steps == 0


# what the original code gets wrong


def test_verification_begins_with_the_first_step() -> None:
    """The original code fills its window for N - 2 steps before it verifies anything."""
    drafter = Lookahead(tiny_target(), ngram_size=6, adaptive=False)
    sequence = opened(MOTIF * 2)
    (draft,) = drafter.draft([sequence], [WIDE])
    assert draft.tokens[: draft.num_candidates] == tuple(MOTIF[:5])


def test_the_pool_learns_every_token_of_a_step_that_accepted_many() -> None:
    """The original's history repeats the last token after a multi-token hit, and the pool learns wrong n-grams."""
    target = tiny_target()
    drafter = Lookahead(target, ngram_size=4, guess_set_size=200, adaptive=False)
    sequence = opened(MOTIF * 8)
    engine = Engine(target, drafter)
    engine.submit(sequence)
    while sequence.num_output_tokens < 40:
        engine.advance()
    assert max(sequence.stats.acceptance_histogram) > 1
    (pool,) = (note.window.pool for note in drafter._notes.values())
    fed = drafter._notes[sequence].window.fed
    for place in range(fed):
        assert tuple(sequence.tokens[place + 1 : place + 4]) in pool.followers(sequence.tokens[place])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_end_ids_in_the_window_are_tokens_like_others(sampling: SamplingParams) -> None:
    """Half of the vocabulary ends the text, so the window is full of ends; every one of them is honoured."""
    ends = frozenset(range(0, VOCAB, 2))
    prompts = [MOTIF * 3, MOTIF[:3], [5, 9, 11, 5, 9]]
    free = SamplingParams(**{**{f: getattr(sampling, f) for f in ("temperature", "seed")}, "max_tokens": 40})
    plain = run(tiny_target(), "none", prompts, free, eos=ends)
    drafted = run(tiny_target(), "lookahead", prompts, free, eos=ends)
    assert [s.output for s in drafted] == [s.output for s in plain]
    assert all(s.finish_reason == "stop" for s in drafted)
