"""The pure rules against plain definitions: tree, rows, cache, options, counts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfdraft.core.rows import Span, pack
from selfdraft.core.sequence import open_sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.errors import OptionError, SelfdraftError
from selfdraft.models.kv_cache import KVCache
from selfdraft.types import Budget, SamplingParams, Skip, Stats

# --- tree -------------------------------------------------------------------------------------------------------

PATHS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6)


@st.composite
def drafts(draw: st.DrawFn, low: int = 0, high: int = 3) -> Draft:
    """Any tree: equal siblings, probes under candidates and probes, several sources."""
    candidates, probes = draw(st.integers(0, 8)), draw(st.integers(0, 5))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(candidates + probes)]
    tokens = [draw(st.integers(low, high)) for _ in parents]
    sources = [draw(st.sampled_from(["a", "b", "c"])) for _ in parents]
    scores = tuple(1 / (2 + node) for node in range(len(parents))) if draw(st.booleans()) else ()
    return Draft(tuple(tokens), tuple(parents), tuple(sources), candidates, scores)


def spelled(draft: Draft, node: int) -> tuple[int, ...]:
    """The tokens from the root down to a node."""
    path: tuple[int, ...] = ()
    while node != ROOT:
        path, node = (draft.tokens[node], *path), draft.parents[node]
    return path


def line(draft: Draft, node: int) -> list[int]:
    """The nodes from the root down to a node."""
    return [] if node == ROOT else [*line(draft, draft.parents[node]), node]


@given(draft=drafts())
def test_depths_are_lengths_of_paths(draft: Draft) -> None:
    assert draft.depths == tuple(len(spelled(draft, node)) for node in range(len(draft)))


@given(paths=PATHS)
def test_branches_is_the_set_of_prefixes(paths: list[list[int]]) -> None:
    draft = Draft.branches(paths, "x")
    nodes = [spelled(draft, node) for node in range(len(draft))]
    assert sorted(nodes) == sorted({tuple(path[:size]) for path in paths for size in range(1, len(path) + 1)})
    assert draft.num_candidates == len(draft)
    assert set(draft.sources) <= {"x"}
    if paths:
        assert draft.tokens[: len(paths[0])] == tuple(paths[0]), "the first path comes first"


@given(tokens=st.lists(st.integers(0, 9), max_size=6))
def test_chain_is_one_branch(tokens: list[int]) -> None:
    assert Draft.chain(tokens, "x") == Draft.branches([tokens], "x")
    scored = Draft.chain(tokens, "x", [0.5] * len(tokens))
    assert scored.probabilities == (0.5,) * len(tokens)


@given(draft=drafts())
def test_children_and_leaves(draft: Draft) -> None:
    nodes = range(draft.num_candidates)
    for parent in (ROOT, *nodes):
        for token in range(4):
            same = [n for n in nodes if draft.parents[n] == parent and draft.tokens[n] == token]
            assert draft.children().get((parent, token)) == (same[0] if same else None)
    ends = [n for n in nodes if not any(draft.parents[m] == n for m in nodes)]
    assert draft.leaves() == [line(draft, n) for n in ends]
    assert {n for path in draft.leaves() for n in path} == set(nodes)


@settings(max_examples=300)
@given(
    draft=drafts(-2, 9),
    nodes=st.integers(0, 9),
    depth=st.integers(0, 6),
    reach=st.integers(0, 8),
    vocab=st.integers(1, 8),
    masks=st.integers(0, 2),
)
def test_clip(draft: Draft, nodes: int, depth: int, reach: int, vocab: int, masks: int) -> None:
    """A node stays iff it and all above it are allowed, and candidates while there are `nodes`."""
    clipped, kept = draft.clip(Budget(nodes, depth, reach), vocab, masks)
    wanted: list[int] = []
    for node in range(len(draft)):
        probe = node >= draft.num_candidates
        fine = 0 <= draft.tokens[node] < vocab + masks * probe and draft.depths[node] <= (reach if probe else depth)
        above = draft.parents[node] == ROOT or draft.parents[node] in wanted
        room = probe or sum(n < draft.num_candidates for n in wanted) < nodes
        if fine and above and room:
            wanted.append(node)
    assert kept == tuple(wanted)
    assert [spelled(clipped, n) for n in range(len(clipped))] == [spelled(draft, n) for n in kept]
    assert clipped.sources == tuple(draft.sources[n] for n in kept)
    assert clipped.probabilities == (tuple(draft.probabilities[n] for n in kept) if draft.probabilities else ())
    assert clipped.num_candidates == sum(n < draft.num_candidates for n in kept) <= nodes
    assert all(0 <= token < vocab for token in clipped.tokens[: clipped.num_candidates])
    assert clipped.clip(Budget(nodes, depth, reach), vocab, masks)[0] == clipped, "once is enough"


def test_clip_drops_what_hangs_under_an_unknown_id() -> None:
    draft = Draft.branches([[1, 99, 2], [3, -1], [3, 4]], "x").with_probes([7, 8], [-2 - 1, -2 - 3], "p")
    clipped, kept = draft.clip(Budget(9, 9, 9), 10)
    assert [draft.tokens[node] for node in kept] == [1, 3, 4, 8]
    assert clipped.tokens == (1, 3, 4, 8)
    assert clipped.parents == (ROOT, ROOT, 1, 1)


@given(draft=drafts(), data=st.data())
def test_with_probes(draft: Draft, data: st.DataObject) -> None:
    draft = Draft(
        draft.tokens[: draft.num_candidates],
        draft.parents[: draft.num_candidates],
        draft.sources[: draft.num_candidates],
        draft.num_candidates,
    )
    parents = [data.draw(st.integers(-1 - draft.num_candidates, i - 1)) for i in range(data.draw(st.integers(0, 5)))]
    grown = draft.with_probes([9] * len(parents), parents, "p")
    for i, parent in enumerate(parents):
        above: tuple[int, ...]
        if parent == ROOT:
            above = ()
        elif parent < ROOT:
            above = spelled(draft, -2 - parent)
        else:
            above = spelled(grown, draft.num_candidates + parent)
        assert spelled(grown, draft.num_candidates + i) == (*above, 9)
    assert grown.num_candidates == draft.num_candidates
    assert grown.tokens[: draft.num_candidates] == draft.tokens
    assert set(grown.sources[draft.num_candidates :]) <= {"p"}


@pytest.mark.parametrize("parents", [(0,), (1, ROOT), (-2,), (ROOT, 2, ROOT)])
def test_a_parent_comes_before_its_child(parents: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="before their children"):
        Draft((0,) * len(parents), parents, ("x",) * len(parents), len(parents))


def test_every_node_has_its_entries() -> None:
    with pytest.raises(AssertionError, match="one entry"):
        Draft((1, 2), (ROOT,), ("x",), 1)
    with pytest.raises(AssertionError, match="once"):
        EMPTY.with_probes([1], [ROOT], "p").with_probes([1], [ROOT], "p")


# --- rows -------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_pack(data: st.DataObject) -> None:
    """Rows of every sequence: its share of pending tokens in a chain, then its tree; answers where it is whole."""
    work = []
    for slot in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=9))
        sequence = open_sequence(prompt, SamplingParams(), seed=0, eos=frozenset(), context=99)
        sequence.slot, sequence.num_cached = slot + 5, data.draw(st.integers(0, len(prompt) - 1))
        share = data.draw(st.integers(1, len(prompt) - sequence.num_cached))
        whole = share == len(prompt) - sequence.num_cached
        work.append((sequence, share, data.draw(drafts()) if whole else EMPTY))
    rows = pack(work)
    tokens: list[int] = []
    positions: list[int] = []
    answers: list[int] = []
    for (sequence, share, draft), span in zip(work, rows.spans, strict=True):
        whole = sequence.num_cached + share == len(sequence.tokens)
        asked = 1 + len(draft) if whole else 0
        assert span == Span(sequence.slot, sequence.num_cached, len(tokens), share, draft, asked)
        assert span.size == share + len(draft)
        for i in range(share):
            tokens.append(sequence.tokens[sequence.num_cached + i])
            positions.append(sequence.num_cached + i)
        if whole:
            answers.append(len(tokens) - 1)
            assert span.start + span.row(ROOT) == len(tokens) - 1
        for node in range(len(draft)):
            answers.append(len(tokens))
            assert span.start + span.row(node) == len(tokens)
            tokens.append(draft.tokens[node])
            positions.append(len(sequence.tokens) - 1 + draft.depths[node])
    assert list(rows.tokens) == tokens
    assert list(rows.positions) == positions
    assert list(rows.logit_rows) == answers
    assert len(rows) == len(tokens)


def test_no_draft_during_prefill() -> None:
    sequence = open_sequence([1, 2, 3], SamplingParams(), seed=0, eos=frozenset(), context=9)
    with pytest.raises(AssertionError, match="draft hangs"):
        pack([(sequence, 2, Draft.chain([1], "x"))])


# --- cache ------------------------------------------------------------------------------------------------------

SLOTS, HEADS, DIM = 3, 2, 4


@dataclass
class Row:
    """Keys and values of one row, recognisable by a number."""

    number: int

    def key(self) -> Tensor:
        return torch.full((HEADS, 1, DIM), float(self.number))

    def value(self) -> Tensor:
        return torch.full((HEADS, 1, DIM + 1), -float(self.number))


@settings(max_examples=150)
@given(data=st.data())
def test_cache_is_a_table_of_rows(data: st.DataObject) -> None:
    """Write, keep, reserve in any order, against a dictionary (layer, slot, place) -> row.

    A write at place 0 begins a new sequence: what the old one left behind it is gone.
    """
    cache, model, number = KVCache(SLOTS, 8), dict[tuple[int, int, int], int](), 0
    layers = 2
    for _ in range(data.draw(st.integers(1, 12))):
        slot, what = data.draw(st.integers(0, SLOTS - 1)), data.draw(st.sampled_from(["write", "keep", "reserve"]))
        if what == "write":
            start = data.draw(st.integers(0, 10))
            rows = [Row(number + i + 1) for i in range(data.draw(st.integers(1, 6)))]
            number += len(rows)
            cache.reserve(start + len(rows))
            for layer in range(layers):
                keys, values = torch.cat([r.key() for r in rows], 1), torch.cat([r.value() for r in rows], 1)
                cache.write(layer, slot, start, keys + 100 * layer, values)
                if start == 0:
                    model = {at: row for at, row in model.items() if at[:2] != (layer, slot)}
                model |= {(layer, slot, start + i): row.number for i, row in enumerate(rows)}
        elif what == "keep":
            base = data.draw(st.integers(0, 5))
            order = sorted(data.draw(st.sets(st.integers(0, cache.places - base - 1), max_size=5)))
            cache.keep(slot, base, order)
            old = dict(model)
            for layer in range(layers):
                for i, row in enumerate(order):
                    model[layer, slot, base + i] = old.get((layer, slot, base + row), 0)
        else:
            before = cache.places
            cache.reserve(data.draw(st.integers(1, 30)))
            assert cache.places == before or cache.places >= 2 * before
    for layer in cache.keys:
        for slot in range(SLOTS):
            keys, values = cache.view(layer, slot, cache.places)
            assert keys.shape == (1, HEADS, cache.places, DIM)
            assert values.shape == (1, HEADS, cache.places, DIM + 1)
            for place in range(cache.places):
                known = model.get((layer, slot, place), 0)
                assert (keys[0, :, place] == (known + 100 * layer if known else 0)).all(), "fresh places hold zeros"
                assert (values[0, :, place] == -known).all()
    size = SLOTS * HEADS * cache.places * (2 * DIM + 1) * 4
    assert cache.bytes == size * len(cache.keys)


def test_fresh_places_are_never_nan() -> None:
    """Memory that held NaN before is handed out again; reading behind what was written must not show it."""
    for _ in range(20):
        poison = torch.full((SLOTS, HEADS, 64, DIM), math.nan)
        del poison
        cache = KVCache(SLOTS, 64)
        cache.write(0, 0, 0, Row(1).key(), Row(1).value())
        cache.reserve(65)
        for slot in range(SLOTS):
            assert all(bool(t.isfinite().all()) for t in cache.view(0, slot, cache.places))


def test_a_view_is_no_copy() -> None:
    cache = KVCache(1, 4)
    cache.write(0, 0, 0, Row(1).key(), Row(1).value())
    keys, _ = cache.view(0, 0, 1)
    cache.write(0, 0, 0, Row(2).key(), Row(2).value())
    assert (keys == 2).all()


# --- values -----------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
WRONG: list[tuple[str, object]] = [
    *(("temperature", v) for v in (-0.1, NAN, INF, "warm", True)),
    *(("top_k", v) for v in (-2, 1.5, 2**31 + 1)),
    *(("top_p", v) for v in (0.0, -0.5, 1.01, NAN)),
    *(("min_p", v) for v in (-0.01, 1.01, NAN)),
    *(("repetition_penalty", v) for v in (0.0, -1.0, INF, NAN)),
    *(("presence_penalty", v) for v in (INF, -INF, NAN)),
    *(("frequency_penalty", v) for v in (INF, -INF, NAN)),
    *(("min_tokens", v) for v in (-1, 0.5)),
    *(("max_tokens", v) for v in (0, -3, 2.5)),
    *(("n", v) for v in (0, 65, 1.5)),
    *(("seed", v) for v in (2**63, -(2**63) - 1, 0.5)),
    *(("logprobs", v) for v in (-1, 101)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_option_out_of_range_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert f"{name}={value!r}" in str(caught.value)
    assert isinstance(caught.value, SelfdraftError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, ("min_tokens=5", "max_tokens=4")),
        ({"stop": ("a", "")}, ("stop", "empty")),
        ({"stop": ""}, ("stop", "empty")),
        ({"bad_words_ids": ((1,), ())}, ("bad_words", "empty")),
        ({"allowed_token_ids": ()}, ("allowed_token_ids", "empty")),
        ({"logit_bias": {7: NAN}}, ("logit_bias[7]", "nan")),
        ({"logit_bias": {7: INF}}, ("logit_bias[7]", "inf")),
    ],
)
def test_options_that_contradict(options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_p": 1.0, "min_p": 1.0, "top_k": 2**31},
        {"min_tokens": 4, "max_tokens": 4},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"logprobs": 100},
        {"n": 64},
        {"repetition_penalty": 1e-9, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    ],
)
def test_ends_of_the_ranges_are_fine(options: dict[str, object]) -> None:
    SamplingParams(**options)  # type: ignore[arg-type]


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match="beam"):
        SamplingParams(beam=4)  # type: ignore[call-arg]


def test_options_are_frozen_copies() -> None:
    words = [[1, 2]]
    params = SamplingParams(stop="end", bad_words_ids=words)  # type: ignore[arg-type]
    words[0].append(3)
    assert params.stop == ("end",)
    assert params.bad_words_ids == ((1, 2),)
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"logit_bias": {1: 0.5}},
        {"bad_words_ids": ((1,),)},
        {"allowed_token_ids": (1,)},
        {"min_tokens": 1},
        {"logits_processors": (lambda path, scores: scores,)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
)
def test_plain_is_only_the_raw_argmax(options: dict[str, object]) -> None:
    assert SamplingParams(max_tokens=3, stop=("x",), top_k=4, top_p=0.5, seed=1).plain
    assert not SamplingParams(**options).plain  # type: ignore[arg-type]


@given(attention=st.frozensets(st.integers(0, 9)), mlp=st.frozensets(st.integers(0, 9)))
def test_first_skipped_block(attention: frozenset[int], mlp: frozenset[int]) -> None:
    both = attention | mlp
    assert Skip(attention, mlp).first == (min(both) if both else 0)


STEPS = st.lists(st.integers(0, 6).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))), max_size=20)


@given(first=STEPS, second=STEPS)
def test_stats_count_what_happened(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    parts = [Stats(num_draft_passes=2), Stats(num_draft_passes=3)]
    for stats, steps in zip(parts, (first, second), strict=True):
        for drafted, accepted in steps:
            stats.count(drafted, accepted, accepted + 1)
    whole = parts[0]
    whole.add(parts[1])
    steps = first + second
    assert whole.num_steps == len(steps)
    assert whole.num_spec_steps == sum(drafted > 0 for drafted, _ in steps)
    assert whole.num_draft_tokens == sum(drafted for drafted, _ in steps)
    assert whole.num_accepted_draft_tokens == sum(accepted for _, accepted in steps)
    assert whole.num_output_tokens == sum(accepted + 1 for _, accepted in steps)
    assert whole.num_draft_passes == 5
    assert whole.acceptance_histogram == Counter(accepted for drafted, accepted in steps if drafted)
    assert whole.mean_acceptance_length == (whole.num_output_tokens / len(steps) if steps else 0.0)
    rate = whole.num_accepted_draft_tokens / whole.num_draft_tokens if whole.num_draft_tokens else 0.0
    assert whole.draft_acceptance_rate == rate
    assert whole.as_dict()["num_output_tokens"] == whole.num_output_tokens
    assert list(whole.as_dict()["acceptance_histogram"]) == sorted(whole.acceptance_histogram)  # type: ignore[call-overload]
