"""Drafters that only read tokens: what they propose, what they remember, and that the text does not depend on them."""

from __future__ import annotations

import gc
from collections.abc import Sequence as SequenceOf
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdraft.core.rows import Span
from selfdraft.core.sampler import choose, process
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.drafters.lookahead.drafter import Lookahead
from selfdraft.drafters.lookahead.pool import Pool
from selfdraft.drafters.lookahead.window import Window, window_parents
from selfdraft.drafters.lookup import NgramIndex
from selfdraft.drafters.suffix import Suffix
from selfdraft.drafting.suffix_automaton import SuffixAutomaton
from selfdraft.errors import OptionError
from selfdraft.protocols import Drafter
from selfdraft.types import Budget, SamplingParams
from tests.models import VOCAB, run, tiny_llama, tiny_target

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)
WIDE = Budget(max_nodes=128, max_depth=64, max_probe_depth=256)
MOTIF = [17, 4, 33, 8, 51, 22, 9]
GREEDY = SamplingParams(max_tokens=60)
SAMPLED = SamplingParams(max_tokens=60, temperature=0.9, top_p=0.9, seed=3)


def opened(tokens: SequenceOf[int], max_tokens: int = 100) -> Sequence:
    return open_sequence(tokens, SamplingParams(max_tokens=max_tokens), seed=0, eos=frozenset(), context=512)


def one(drafter: Drafter, sequence: Sequence, budget: Budget = WIDE) -> Draft:
    return drafter.draft([sequence], [budget])[0]


def chain_of(draft: Draft) -> list[int]:
    assert draft.parents == tuple(range(-1, len(draft) - 1))
    assert draft.num_candidates == len(draft)
    return list(draft.tokens)


# suffix automaton and n-gram index


def longest_repeated_suffix(text: list[int]) -> int:
    """Brute force: length of the longest suffix that also ends earlier."""
    n = len(text)
    for size in range(n - 1, 0, -1):
        if any(text[end - size : end] == text[n - size :] for end in range(size, n)):
            return size
    return 0


@given(texts)
def test_automaton_finds_the_longest_suffix_that_occurred_before(text: list[int]) -> None:
    index = SuffixAutomaton()
    assert index.match() == (0, 0)
    for n, token in enumerate(text, 1):
        index.push(token)
        length, end = index.match()
        assert length == longest_repeated_suffix(text[:n])
        assert length <= end < n
        assert text[end - length : end] == text[n - length : n]


def test_automaton_prefers_the_latest_occurrence() -> None:
    index = SuffixAutomaton()
    for token in [1, 2, 7, 1, 2, 8, 1, 2]:
        index.push(token)
    assert index.match() == (2, 5)


@pytest.mark.parametrize("period", [1, 2, 997])
def test_automaton_stays_small(period: int) -> None:
    index = SuffixAutomaton()
    for place in range(3000):
        index.push(place % period)
    assert len(index._next) <= 2 * 3000
    assert sum(map(len, index._next)) <= 3 * 3000
    assert index.match()[0] == 3000 - period


@settings(max_examples=200)
@given(texts, st.integers(1, 3), st.integers(0, 3))
def test_ngram_index_agrees_with_brute_force(text: list[int], shortest: int, more: int) -> None:
    longest = shortest + more
    index = NgramIndex(shortest, longest)
    for n in range(1, len(text) + 1):
        seen = text[:n]
        wanted: list[int] = []
        for size in range(min(longest, n - 1), shortest - 1, -1):
            ends = [end for end in range(size, n) if seen[end - size : end] == seen[n - size :]]
            if ends:
                wanted = seen[ends[-1] : ends[-1] + 6]
                break
        assert index.continuation(seen, 6) == wanted


# suffix


@pytest.mark.parametrize(
    ("text", "options", "draft"),
    [
        ([1, 2, 3, 4, 5, 6, 9, 2], {"factor": 3.0}, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], {"factor": 2.0}, [3, 4, 5, 6]),
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], {"factor": 2.0, "num_speculative_tokens": 3}, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], {"factor": 0.1}, [3]),
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], {"suffix_min": 3}, []),
        ([7, 1, 2, 1, 2], {"factor": 3.0}, [1, 2, 1, 2, 1, 2]),  # the copy repeats itself
        ([1, 2, 3], {}, []),
    ],
)
def test_suffix_drafts_as_long_as_the_match_is_good(
    text: list[int], options: dict[str, object], draft: list[int]
) -> None:
    assert chain_of(one(build("suffix", tiny_target(), options), opened(text))) == draft


def test_suffix_stays_within_the_budget() -> None:
    drafter, sequence = Suffix(tiny_target()), opened(MOTIF * 4)
    assert len(one(drafter, sequence)) == 32
    assert len(one(drafter, sequence, Budget(max_nodes=128, max_depth=5, max_probe_depth=256))) == 5
    assert len(one(drafter, sequence, Budget(max_nodes=3, max_depth=9, max_probe_depth=256))) == 3
    assert len(one(drafter, sequence, Budget(max_nodes=9, max_depth=0, max_probe_depth=256))) == 0


def test_suffix_reads_what_was_written_since() -> None:
    drafter, sequence = Suffix(tiny_target()), opened([1, 2, 3])
    assert chain_of(one(drafter, sequence)) == []
    sequence.tokens += [5, 6, 1]
    assert chain_of(one(drafter, sequence)) == [2, 3, 5, 6]


# lookahead: pool


def test_pool_keeps_the_most_recent_tuples_of_each_key() -> None:
    pool = Pool(3, 2)
    for followers in [(1, 1), (2, 2), (1, 1), (3, 3)]:  # (1, 1) was used again, so (2, 2) goes
        pool.add(7, followers)
    pool.add(8, (4, 4))
    assert pool.followers(7) == [(3, 3), (1, 1)]
    assert pool.latest(7) == (3, 3)
    assert pool.followers(8) == [(4, 4)]
    assert pool.followers(9) == []
    assert pool.latest(9) == ()


@given(texts, st.integers(3, 5), st.integers(1, 3), st.lists(st.integers(1, 5)))
def test_pool_fed_in_pieces_holds_the_latest_ngrams(text: list[int], size: int, most: int, pieces: list[int]) -> None:
    pool, fed, known = Pool(size, most), 0, 0
    for piece in [*pieces, len(text)]:
        known = min(known + piece, len(text))
        fed = pool.feed(text[:known], fed)
    for key in set(text):
        wanted: list[tuple[int, ...]] = []
        for place in range(len(text) - size, -1, -1):
            followers = tuple(text[place + 1 : place + size])
            if text[place] == key and followers not in wanted:
                wanted.append(followers)
        assert pool.followers(key) == wanted[:most]


# lookahead: window


@pytest.mark.parametrize(("width", "size"), [(1, 3), (2, 3), (5, 4), (4, 6), (7, 5)])
def test_every_cell_stands_where_the_paper_puts_it(width: int, size: int) -> None:
    sequence = opened([*MOTIF, 60, 3, 2, 1, 17])
    drafter = Lookahead(tiny_target(), window_size=width, ngram_size=size, adaptive=False)
    draft = one(drafter, sequence)
    assert draft.num_candidates == size - 1
    assert len(draft) - draft.num_candidates == width * (size - 1) - 1
    columns = drafter._notes[sequence].window.columns
    last = len(sequence.tokens) - 1
    span = Span(0, last, 0, 1, draft, 0)
    for level in range(size - 1):
        for i in range(width):
            node = draft.num_candidates + level * width + i - 1 if level + i else ROOT
            path = []
            assert span.positions[span.row(node)] == last + level + i
            while node != ROOT:
                path.append(draft.tokens[node])
                assert node >= draft.num_candidates
                node = draft.parents[node]
            base = [column[0] for column in columns[1 : i + 1]]
            assert path[::-1] == base + columns[i][1 : level + 1]


def test_the_window_moves_as_far_as_the_text() -> None:
    text = [1, 2, 3]
    window = Window(4, 3, Pool(4, 2), 0)
    window.restart(text)
    window.columns = [[3, 10, 20], [11, 21, 31], [12, 22, 32], [13, 23, 33]]
    text.append(40)
    window.learn([50, 51, 52, 53], text)
    assert window.columns == [[40, 20, 50], [21, 31, 51], [22, 32, 52], [23, 33, 53]]
    text += [41, 42, 43]  # two tokens were accepted beyond the first
    window.learn([60, 61, 62, 63], text)
    assert window.columns[:2] == [[43, 52, 62], [33, 53, 63]]
    assert len(window.columns) == 4
    text += [44] * 9
    window.learn([70, 71, 72, 73], text)
    assert window.columns[0][0] == 44
    assert len(window.columns) == len(window.ages) == 4


def test_free_columns_continue_the_last_one_from_the_pool() -> None:
    text = [*MOTIF, 17]
    window = Window(3, 3, Pool(4, 2), 0)
    window.restart(text)
    assert window.columns == [[17, 4, 33], [4, 33, 8], [33, 8, 51]]
    assert window.ages == [2, 2, 2]


def test_guessed_columns_are_harvested_when_they_are_answers_only() -> None:
    pool, text = Pool(4, 2), [1, 2, 3]  # too short for an n-gram: the window starts with guesses
    window = Window(2, 3, pool, 99)
    window.restart(text)
    for step in range(2):
        window.learn([50 + step, 60 + step], text := [*text, 30 + step])
        assert not pool._tuples
    window.learn([52, 62], [*text, 32])
    assert pool.followers(31) == [(50, 51, 52)]
    assert pool.followers(60) == []
    assert sum(len(found) for found in pool._tuples.values()) == 2


class Recorder(Lookahead):
    """Notes, before it learns, under which text the window stood and what was in it."""

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if not hasattr(self, "seen"):
            self.seen: list[tuple[list[int], list[list[int]]]] = []
            self.pools: list[Pool] = []
        for sequence, result in zip(sequences, results, strict=True):
            note = self._notes.get(sequence)
            if note is not None and len(result.draft):
                window = note.window
                self.seen.append((sequence.tokens[: window.base], [list(c) for c in window.columns]))
                self.pools.append(window.pool)
        super().observe(sequences, results)


@torch.inference_mode()
def stock_says(tokens: list[int], sampling: SamplingParams) -> int:
    """What the stock model says next, for a sampled request with the noise of that place."""
    scores = process(tiny_llama()(torch.tensor([tokens])).logits[0, -1], sampling, tokens, 0, frozenset())
    return choose(scores, sampling, sampling.seed or 0, len(tokens))


@cache
def recorded(sampled: bool) -> tuple[Recorder, list[int]]:
    """A finished run's drafter, and its text."""
    target = tiny_target()
    drafter = Recorder(target, window_size=4, ngram_size=4, guess_set_size=256, pool_from_prompt=False, adaptive=False)
    (sequence,) = run(target, drafter, [MOTIF * 2], SAMPLED if sampled else GREEDY)
    assert len(drafter.seen) > 10
    return drafter, sequence.tokens


def answers_of(text: list[int], columns: list[list[int]], sampled: bool) -> list[int]:
    """What the stock model says after the deepest cell of each column, one sequence at a time."""
    base = [column[0] for column in columns]
    sampling = SAMPLED if sampled else GREEDY
    return [stock_says(text + base[1 : i + 1] + column[1:], sampling) for i, column in enumerate(columns)]


@pytest.mark.parametrize("sampled", [False, True])
def test_the_window_holds_the_models_own_answers(sampled: bool) -> None:
    drops = set()
    for (text, columns), (later, moved) in pairwise(recorded(sampled)[0].seen):
        dropped = len(later) - len(text) - 1
        answers = answers_of(text, columns, sampled)
        for i in range(4 - dropped):
            assert moved[i][-1] == answers[i + dropped]
            assert moved[i][1:-1] == columns[i + dropped][2:]
            assert moved[i][0] == (later[-1] if i == 0 else columns[i + dropped][1])
        drops.add(dropped)
    assert drops - {0} or sampled, "some step accepted a candidate"


@pytest.mark.parametrize("sampled", [False, True])
def test_the_pool_holds_text_and_trajectories_only(sampled: bool) -> None:
    drafter, text = recorded(sampled)
    allowed = {tuple(text[i : i + 4]) for i in range(len(MOTIF) * 2, len(text) - 3)}
    trajectories = set()
    for prefix, columns in drafter.seen:
        for column, answer in zip(columns, answers_of(prefix, columns, sampled), strict=True):
            trajectories.add((*column, answer))
    pool = drafter.pools[-1]
    held = {(key, *followers) for key in pool._tuples for followers in pool.followers(key)}
    assert held <= allowed | trajectories
    assert held - allowed, "the window gave n-grams that are not in the text"


# lookahead: the budget, and rows that were clipped away


def test_lookahead_stays_within_the_budget() -> None:
    sequence = opened([1, 2, 3, 4, 1, 2, 5, 6, 1, 7, 8, 9, 1])
    drafter = Lookahead(tiny_target(), window_size=3, ngram_size=4, adaptive=False)
    draft = one(drafter, sequence)
    assert draft.num_candidates == 8  # 7 8 9, 2 5 6 and 2 3 4: the 2 is shared
    assert draft.tokens[:3] == (7, 8, 9)
    shallow = one(drafter, sequence, Budget(max_nodes=99, max_depth=2, max_probe_depth=99))
    assert max(shallow.depths[: shallow.num_candidates]) == 2
    small = one(drafter, sequence, Budget(max_nodes=4, max_depth=9, max_probe_depth=99))
    assert small.tokens[:4] == (7, 8, 9, 2)
    assert small.num_candidates == 4
    edge = one(drafter, sequence, Budget(max_nodes=99, max_depth=0, max_probe_depth=99))
    assert (edge.num_candidates, len(edge)) == (0, 8)
    assert len(one(drafter, sequence, Budget(max_nodes=0, max_depth=0, max_probe_depth=3))) == 0
    last = opened([1, 2, 3, 4, 1], max_tokens=1)
    assert len(one(drafter, last)) == 0


def test_columns_whose_probes_were_clipped_away_are_filled_anew() -> None:
    sequence = opened([*MOTIF, 17])
    drafter = Lookahead(tiny_target(), window_size=4, ngram_size=4, adaptive=False)
    proposed = one(drafter, sequence)
    clipped, nodes = proposed.clip(
        Budget(max_nodes=1, max_depth=1, max_probe_depth=4), VOCAB
    )  # of the deepest cells 0 to 2 are left
    assert len(clipped) < len(proposed)
    answers = tuple(range(100, 101 + len(clipped)))
    sequence.tokens.append(4)
    drafter.observe([sequence], [Result(clipped, (), (4,), answers, proposed=proposed, nodes=nodes)])
    columns = drafter._notes[sequence].window.columns
    deepest = [nodes.index(proposed.num_candidates + 8 + i - 1) for i in range(3)]
    assert [column[-1] for column in columns[:3]] == [101 + node for node in deepest]
    assert len(columns) == 4
    assert all(token < VOCAB for token in columns[3])


def test_a_window_that_was_not_run_starts_again() -> None:
    sequence = opened([*MOTIF, 17])
    drafter = Lookahead(tiny_target(), window_size=5, ngram_size=4)
    first = one(drafter, sequence)
    assert one(drafter, sequence) == first, "a step that failed may be tried again"
    sequence.tokens += [4, 33]
    drafter.observe([sequence], [Result(Draft(), (), (33,), (33,))])
    assert one(drafter, sequence) == one(Lookahead(tiny_target(), window_size=5, ngram_size=4), sequence)


def test_window_parents_are_in_topological_order() -> None:
    for width in range(1, 6):
        for height in range(2, 5):
            parents = window_parents(width, height)
            assert len(parents) == width * height - 1
            assert all(ROOT <= parent < probe for probe, parent in enumerate(parents))


# all of them

READERS = ["lookup", "suffix", "lookahead"]


def reader(name: str) -> Drafter:
    """The drafter; lookahead as in the paper, since its adaptive form reads nothing in plain steps."""
    return build(name, tiny_target(), {"adaptive": False} if name == "lookahead" else {})


PROMPTS = [MOTIF * 8, list(range(0, 60, 3)), MOTIF[:2]]


@cache
def plain_outputs(sampled: bool) -> list[list[int]]:
    return [s.output for s in run(tiny_target(), "none", PROMPTS, SAMPLED if sampled else GREEDY)]


@pytest.mark.parametrize("name", READERS)
def test_notes_die_with_the_sequence(name: str) -> None:
    drafter = reader(name)
    sequence = opened(MOTIF * 2)
    one(drafter, sequence)
    notes = drafter._notes  # type: ignore[attr-defined]
    assert len(notes) == 1
    del sequence
    gc.collect()
    assert len(notes) == 0


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_shared_between_sequences(name: str) -> None:
    drafter = reader(name)
    other, mine = opened(MOTIF * 3), opened([1, 2, MOTIF[0]])
    draft = drafter.draft([other, mine], [WIDE, WIDE])[1]
    assert draft.num_candidates == 0
    assert set(draft.tokens) <= set(mine.tokens)
    assert draft == one(reader(name), mine)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lookup", {}),
        ("suffix", {}),
        ("suffix", {"factor": 1.0, "num_speculative_tokens": 3}),
        ("lookahead", {}),
        ("lookahead", {"window_size": 1, "ngram_size": 3, "guess_set_size": 1}),
        ("lookahead", {"window_size": 7, "ngram_size": 5, "pool_from_prompt": False}),
    ],
)
def test_the_text_is_that_of_plain_decoding(name: str, options: dict[str, object], sampling: SamplingParams) -> None:
    target = tiny_target(slots=2)
    drafted = run(target, build(name, target, options), PROMPTS, sampling, slots=2, chunk=24)
    assert [s.output for s in drafted] == plain_outputs(sampling is SAMPLED)
    assert sum(s.stats.num_accepted_draft_tokens for s in drafted) > 0 or sampling is SAMPLED


@pytest.mark.parametrize("name", READERS)
def test_repetition_is_accepted(name: str) -> None:
    (sequence,) = run(tiny_target(), name, [MOTIF * 8], GREEDY)
    assert sequence.stats.mean_acceptance_length > 1.5


def test_a_full_match_gets_its_bonus_token() -> None:
    target = tiny_target()
    (sequence,) = run(target, build("lookahead", target, {"ngram_size": 3}), [MOTIF * 8], GREEDY)
    assert max(sequence.stats.acceptance_histogram) == 2
    stats = sequence.stats
    assert stats.num_output_tokens == stats.num_steps + stats.num_accepted_draft_tokens


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("suffix", "num_speculative_tokens", 0),
        ("suffix", "suffix_min", 0),
        ("suffix", "factor", 0.0),
        ("lookahead", "window_size", 0),
        ("lookahead", "ngram_size", 2),
        ("lookahead", "ngram_size", 4.5),
        ("lookahead", "guess_set_size", 0),
        ("lookahead", "pool_from_prompt", "no"),
        ("lookahead", "adaptive", 1),
    ],
)
def test_values_out_of_range_are_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(OptionError, match=option):
        build(name, tiny_target(), {option: value})
