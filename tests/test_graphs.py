"""Passes of fixed shape, replayed without a GPU (`tests/graphs.py`): they say the plain text with every drafter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from selfdraft.core.rows import Rows, pack, tree_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import NAMES, build
from selfdraft.errors import RunnerUnavailable, UnsupportedModel
from selfdraft.models import load
from selfdraft.models.attention import Scores
from selfdraft.models.exactness import Shapes
from selfdraft.models.graph.cuda import cuda_settings, one_class
from selfdraft.models.graph.graph_runner import CLASSES, GraphSettings
from selfdraft.models.graph.parts import joined, parts_of
from selfdraft.models.graph.plain_tree_attention import Reach, attend_plainly
from selfdraft.models.graph.sheet import MOVES, PATH, Part, Sheet, SheetSize, cut, lay_out
from selfdraft.models.graph.stacked_cache import LayerShape, StackedCache
from selfdraft.models.proof.one_class import equal_rows
from selfdraft.models.proof.whole_model import prove
from selfdraft.models.target import HFTarget
from selfdraft.types import Budget, SamplingParams
from tests.clocks import Ticking, on_passes
from tests.graphs import Again, settings
from tests.models import VOCAB, random_adapters, run, tiny_llama
from tests.test_families import FAMILIES, NEW, generated, model_of
from tests.test_families import prompts as family_prompts
from tests.test_oracle import (
    MIXED,
    OPTIONS,
    TREES,
    Adversary,
    Way,
    decode,
    expected,
    hidden,
    mask_probes,
    prompts,
    same_text,
    scribble,
    too_long,
)

ALL = os.environ.get("SELFDRAFT_TEST_GRAPHS") == "all"
"""Everything that the default run leaves out for its time."""
SOME_FAMILIES = ("mistral", "gemma2", "gemma3", "phi", "opt", "gpt_oss", "deepseek_v3")
"""Windows, soft caps, both, one norm for two sublayers, positions in a table, sinks and experts, wide keys."""
SIZES: load.Sizes = {
    "slots": 2,
    "context": None,
    "adapters": (),
    "kv_cache_dtype": "auto",
    "clock": Ticking(),
}
ONE = 16
"""Rows of the one class in tests of it: most trees need several passes."""


def graph_target(slots: int = 1, dtype: torch.dtype = torch.float64, **changes: object) -> HFTarget:
    model = tiny_llama(dtype)
    adapters = random_adapters(model)
    return on_passes(HFTarget(model, slots=slots, adapters=adapters, graphs=settings(**changes)))


def replays(target: HFTarget) -> int:
    """How many passes were replayed."""
    assert target.graphs is not None
    capture = target.graphs.settings.capture
    assert isinstance(capture, Again)
    return sum(graph.runs for graph in capture.made)


@pytest.mark.skipif(not ALL, reason="takes half an hour: SELFDRAFT_TEST_GRAPHS=all runs every combination")
def test_every_combination_is_run() -> None:
    """The parameters below are all there."""
    assert len(RUNS) == len(NAMES) * 4
    assert len(MEMBERS) == len(FAMILIES) * len(NAMES) * 2


RUNS = [
    (name, slots, classes)
    for name in NAMES
    for slots in (1, 4)
    for classes in ("many", "one")
    if ALL or (slots == 4 and (classes == "many" or name in ("layer_skip", "space", "merged")))
]
MEMBERS = [
    (name, drafter, slots)
    for name in FAMILIES
    for drafter in NAMES
    for slots in (1, 4)
    if ALL or (name in SOME_FAMILIES and drafter == "space" and slots == 4)
]


@pytest.mark.parametrize(("name", "slots", "classes"), RUNS)
def test_every_drafter_and_sampling(name: str, slots: int, classes: str) -> None:
    """16 requests of 12 samplings."""
    target = graph_target(slots, classes=(ONE,) if classes == "one" else CLASSES)
    same_text(decode(target, build(name, target, OPTIONS.get(name)), MIXED, Way(slots=slots)), MIXED)
    assert replays(target) > 20


@pytest.mark.parametrize(("name", "drafter", "slots"), MEMBERS)
def test_every_family(name: str, drafter: str, slots: int) -> None:
    model = model_of(name)
    graphs = settings(piece=16, shortest=32)
    target = on_passes(HFTarget(model, slots=slots, adapters=random_adapters(model), graphs=graphs))
    texts = run(target, drafter, family_prompts() * 2, SamplingParams(max_tokens=NEW), slots=slots)
    assert [sequence.output for sequence in texts] == generated(name) * 2
    assert replays(target) > 0


@pytest.mark.parametrize("classes", [(ONE,), (1, 4, 32)], ids=["one", "many"])
@pytest.mark.parametrize(
    "tree", TREES if ALL else [hidden, mask_probes, too_long, scribble], ids=lambda tree: tree.__name__
)
def test_adversaries(tree: Callable[[Adversary, Sequence, Budget], Draft], classes: tuple[int, ...]) -> None:
    target = graph_target(5, classes=classes)
    same_text(decode(target, Adversary(target, tree), MIXED, Way(slots=5, chunk=16)), MIXED)


def test_the_cache_grows() -> None:
    """Places for a handful of tokens at first: what is kept is moved before, and graphs are captured anew."""
    target = graph_target(3, classes=(8,))
    assert target.graphs is not None
    target.graphs.cache = target.cache = StackedCache(3, 4, target.graphs.cache._shapes, torch.empty(0).double())
    same_text(decode(target, Adversary(target, hidden), MIXED[4:10], Way(slots=3, chunk=5)), MIXED[4:10])
    assert target.cache.places > 32
    target = graph_target(1, classes=(8,))
    for _ in range(2):  # graphs of the size before do not write into memory that is no longer the cache's
        same_text(decode(target, build("none", target), MIXED[4:5], Way()), MIXED[4:5])
        with torch.inference_mode():
            target.cache.reserve(target.cache.places)


# --- what is kept, moved and answered ---------------------------------------------------------------------------


def step(target: HFTarget, sequence: Sequence, draft: Draft, keep: SequenceOf[int]) -> Tensor:
    """One pass over all pending tokens and a draft; the rows `keep` are remembered."""
    rows = pack([(sequence, len(sequence.tokens) - sequence.num_cached, draft)])
    said = target.forward(rows)
    target.keep(sequence.slot, sequence.num_cached, keep)
    sequence.num_cached += len(keep)
    return said


def known(length: int, slot: int = 0) -> Sequence:
    return Sequence(prompts()[9][:length], length, SamplingParams(), slot=slot)


def branch(*tokens: int) -> Draft:
    """`tokens` behind a wrong one, so that accepting them moves rows."""
    chain = range(1, len(tokens))
    return Draft(((tokens[0] + 1) % VOCAB, *tokens), (-1, -1, *chain), ("",) * (len(tokens) + 1), len(tokens) + 1)


def test_answers_outlive_the_next_pass() -> None:
    target, sequence = graph_target(), known(8)
    step(target, sequence, EMPTY, range(8))
    said = []
    for token in (3, 4, 5, 6):
        sequence.tokens.append(token)
        said.append(step(target, sequence, EMPTY, [0]))
    before = [logits.clone() for logits in said]
    sequence.tokens.append(7)
    step(target, sequence, EMPTY, [0])
    assert replays(target) > 2
    assert all(torch.equal(*pair) for pair in zip(said, before, strict=True))
    assert all(logits.isfinite().all() for logits in said)


@pytest.mark.parametrize("kept", ["lazily", "at once", "too many"])
def test_rows_that_are_kept_stand_in_their_places(kept: str) -> None:
    """Moves wait for the next pass; one that is no graph, a copy, or too many of them do not let them wait."""
    target, sequence = graph_target(2), known(8)
    tokens = [(i * 7) % VOCAB for i in range(MOVES + 3 if kept == "too many" else 5)]
    step(target, sequence, EMPTY, range(8))
    sequence.tokens.append(11)
    step(target, sequence, branch(*tokens), [0, *range(2, len(tokens) + 2)])
    sequence.tokens += [*tokens, 12]
    if kept == "at once":
        target.reuse(1, 0, sequence.num_cached)
        sequence.slot = 1
    said = step(target, sequence, EMPTY, [0])
    with torch.inference_mode():
        whole = tiny_llama()(torch.tensor([sequence.tokens]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(said[0], whole, rtol=0, atol=1e-11)


def test_the_next_request_of_a_slot_does_not_get_the_moves_of_the_last_one() -> None:
    """They are done before its prompt is written, not afterwards."""
    target = graph_target()
    first, second = known(8), known(20)
    step(target, first, EMPTY, range(8))
    first.tokens.append(11)
    step(target, first, branch(3, 4), [0, 2, 3])
    step(target, second, EMPTY, range(20))
    second.tokens.append(11)
    said = step(target, second, EMPTY, [0])
    with torch.inference_mode():
        whole = tiny_llama()(torch.tensor([second.tokens]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(said[0], whole, rtol=0, atol=1e-11)


def test_keeping_twice_without_a_pass_between() -> None:
    """What the second call moves is what the first one has put there."""
    cache = StackedCache(1, 32, {0: LayerShape(1, 1, 1, 1)}, torch.empty(0))
    target = graph_target()
    assert target.graphs is not None
    target.graphs.cache = cache
    cache.stacks[0][..., 0] = torch.arange(32.0)
    target.graphs.keep(0, 4, [0, 3, 5])
    target.graphs.keep(0, 4, [0, 2])
    target.graphs.flush()
    assert cache.keys[0][0, 0, 4:10, 0].tolist() == [4, 9, 9, 7, 8, 9]


def test_a_prefill_is_a_pass_of_its_own() -> None:
    """Whoever decodes beside it, its rows are alone; answers come in the order in which they were asked for."""
    sequences = [known(8, 0), known(5, 1), known(7, 2)]
    sequences[0].num_cached, sequences[2].num_cached = 3, 6
    draft = Draft.chain([4, 5], "")
    rows = pack([(sequences[0], 5, EMPTY), (sequences[1], 3, EMPTY), (sequences[2], 1, draft)])
    parts = [*parts_of(rows)]
    assert [(part.decodes, len(part.rows), part.answers) for part in parts] == [
        (True, 3, (1, 2, 3)),
        (False, 5, (0,)),
        (False, 3, ()),
    ]
    assert parts[0].rows.tokens == rows.tokens[8:]
    said = joined([(part, torch.tensor([[float(i)] for i in part.answers]).reshape(-1, 1)) for part in parts])
    assert said[:, 0].tolist() == [0, 1, 2, 3]


def test_a_broken_request_leaves_nothing_in_its_slot() -> None:
    """NaN in places that the next request does not see, and where padding is written."""
    target = graph_target()
    for strips in (*target.cache.keys.values(), *target.cache.values.values()):
        strips[:] = float("nan")
    same_text(decode(target, build("merged", target), MIXED[4:8], Way()), MIXED[4:8])


# --- graphs -----------------------------------------------------------------------------------------------------


def test_a_pass_that_cannot_be_captured_is_run_call_by_call() -> None:
    target = graph_target(4, capture=Again(fails_from=2))
    same_text(decode(target, build("lookup", target), MIXED[:8], Way(slots=4)), MIXED[:8])
    assert target.runs == "eager: a pass cannot be captured: operation not permitted when stream is capturing"


def test_graphs_are_captured_when_a_pass_comes_again_and_the_oldest_go() -> None:
    capture = Again()
    target = graph_target(4, capture=capture, most=2)
    same_text(decode(target, build("merged", target), MIXED[:8], Way(slots=4)), MIXED[:8])
    assert target.graphs is not None
    assert len(target.graphs._graphs) == 2
    open_ones = [graph for graph in capture.made if not graph.closed]
    assert len(open_ones) <= 2 < len(capture.made)
    target.graphs.close()
    assert all(graph.closed for graph in capture.made)


def test_a_capture_that_does_not_blank_the_sheet_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the runs before a capture then move rows and write keys of the pass before once more."""
    monkeypatch.setattr(Sheet, "blank", lambda *_: None)
    target = graph_target(4)
    sequences = decode(target, Adversary(target, hidden), MIXED, Way(slots=4))
    assert any(sequence.output != expected(*which) for sequence, which in zip(sequences, MIXED, strict=True))


def test_drafts_end_at_the_edge_of_a_piece_where_bits_are_promised() -> None:
    one, many = graph_target(classes=(ONE,)), graph_target()
    assert [one.next_boundary(position) for position in (0, 63, 64)] == [64, 64, 128]
    assert many.next_boundary(0) == many.max_length


def test_one_class_has_one_graph_for_plain_and_drafted_passes() -> None:
    target = graph_target(4, classes=(ONE,), shortest=512)
    for drafter in ("none", "lookup"):
        same_text(decode(target, build(drafter, target), MIXED[:6], Way(slots=4)), MIXED[:6])
    assert target.graphs is not None
    assert len(target.graphs._graphs) == 1
    assert target.runs == f"fast: graphs, one class of {ONE} rows"


def test_graphs_of_a_model_that_was_moved_are_captured_anew() -> None:
    target = graph_target(1, classes=(ONE,))
    assert target.graphs is not None
    decode(target, build("none", target), MIXED[4:5], Way())
    before = {*target.graphs._graphs.values()}
    target.graphs._weight = torch.nn.Parameter(torch.zeros(1))
    same_text(decode(target, build("none", target), MIXED[4:5], Way()), MIXED[4:5])
    assert not before & {*target.graphs._graphs.values()}


def test_warming_up_captures_the_largest_class_first() -> None:
    target = graph_target(classes=(1, 2, 8))
    assert target.graphs is not None
    assert [*target.graphs.warm_up()] == [2, 1, 0]
    assert [key.rows for key in target.graphs._graphs] == [8, 2, 1]
    same_text(decode(target, build("none", target), MIXED[4:5], Way()), MIXED[4:5])


def test_what_graphs_do_not_go_with() -> None:
    for options in ({"shapes": Shapes(4, 64)}, {"kv_cache_dtype": "int8"}):
        with pytest.raises(RunnerUnavailable, match="natural shapes, and with keys and values stored as they are"):
            HFTarget(tiny_llama(), graphs=settings(), **options)


# --- bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_class_have_the_bits_of_plain_decoding(dtype: torch.dtype) -> None:
    assert equal_rows(tiny_llama(dtype), settings(classes=(32,))) == (150, 150)


def test_rows_of_several_classes_need_not_have_them() -> None:
    """The negative control: another number of rows is another order of sums."""
    equal, rows = equal_rows(tiny_llama(torch.float32), settings(classes=(1, 2, 4, 8, 16, 32)))
    assert equal < rows == 150


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_a_target_is_proved_through_its_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done at load on a GPU, with a capture that needs none."""

    def here(device: torch.device, dtype: torch.dtype, classes: tuple[int, ...] = CLASSES) -> GraphSettings:
        return settings(classes=classes, places=None if name == "llama" else 64)

    monkeypatch.setattr(load, "cuda_settings", here)
    model = model_of(name)
    target = load._open_graphs(model, "bitwise", **SIZES)
    if FAMILIES[name].experts:
        assert target.exactness.level == "token"
        assert target.runs == "fast: graphs, classes of 1 to 128 rows"
    else:
        assert target.exactness.why == "150 rows of two blocks had the same bits plain and drafted, in one graph"
        assert target.runs == "fast: graphs, one class of 64 rows"
    texts = run(target, "lookup", family_prompts(), SamplingParams(max_tokens=NEW), slots=2)
    assert [sequence.output for sequence in texts] == generated(name)


def test_the_proof_sees_attention_that_is_wrong() -> None:
    def bent(
        query: Tensor, keys: Tensor, values: Tensor, sheet: Mapping[str, Tensor], reach: Reach, scores: Scores
    ) -> Tensor:
        return attend_plainly(query, keys, values, sheet, reach, replace(scores, scale=1.01 * scores.scale))

    with pytest.raises(UnsupportedModel, match="logits differ"):
        prove(HFTarget(tiny_llama(), graphs=settings(attention=bent)), tiny_llama())


def test_graphs_are_for_a_gpu() -> None:
    with pytest.raises(RunnerUnavailable, match="graphs are replayed by an NVIDIA GPU; the model is on cpu"):
        cuda_settings(torch.device("cpu"), torch.float32)
    with pytest.raises(RunnerUnavailable, match="take another dtype than float64"):
        cuda_settings(torch.device("cuda"), torch.float64)
    assert [one_class(slots) for slots in (1, 2, 4, 16)] == [(32,), (64,), (64,), (128,)]


# --- the sheet --------------------------------------------------------------------------------------------------

DRAFT = Draft((7, 8, 9, 10), (-1, -1, 1, 0), ("",) * 4, 4)


def two() -> Rows:
    """A tree behind 20 tokens of slot 1, and a single row behind 3 of slot 0."""
    return tree_rows([(1, 20, 5, DRAFT), (0, 3, 6, EMPTY)])


def sheet_of(rows: Rows, part: Part | None = None, *, repeated: bool = False) -> dict[str, list[int]]:
    lines = lay_out(rows, {1: [2, 5]})
    sheet = Sheet(SheetSize(8, 2, 2, gates=2), torch.device("cpu"), repeated=repeated)
    sheet.fill(lines, part or Part(0, len(lines), 2), [(1, 23, 21)], trash=99)
    return {name: column.flatten().tolist() for name, column in sheet.parts.items()}


def test_a_sheet_by_hand() -> None:
    said = sheet_of(two())
    assert said["tokens"] == [5, 7, 8, 9, 10, 6, 0, 0]
    assert said["positions"] == [20, 21, 21, 22, 22, 3, 0, 0]
    assert said["slots"] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert said["bases"] == [20, 20, 20, 20, 20, 3, 0, 0]
    assert said["places"] == [20, 21, 22, 23, 24, 3, 99, 99]
    assert said["seen"] == [21, 22, 22, 23, 23, 4, 0, 0]
    paths = [said["path"][row * PATH : (row + 1) * PATH] for row in range(8)]
    wanted = [[20], [20, 21], [20, 22], [20, 22, 23], [20, 21, 24], [3], [], []]
    assert paths == [path + [0] * (PATH - len(path)) for path in wanted]
    assert said["gate0"] == [0] * 8
    assert said["gate1"] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert said["tile_first"] == [0, 2, 4, 5, 0, 0, 0]
    assert said["tile_rows"] == [2, 2, 1, 1, 0, 0, 0]
    assert (said["move_slot"][:2], said["move_from"][:2], said["move_to"][:2]) == ([1, 0], [23, 99], [21, 99])


def test_padding_of_experts_is_the_first_row_again() -> None:
    said = sheet_of(two(), repeated=True)
    for name in ("tokens", "positions", "slots", "bases", "seen", "gate1"):
        assert said[name][6:] == [said[name][0]] * 2
    assert said["places"][6:] == [99, 99]
    assert said["path"][6 * PATH : 6 * PATH + 2] == [20, 0]
    assert said["tile_rows"] == [2, 2, 1, 1, 2, 0, 0]


def test_a_wide_pass_is_cut_and_later_rows_see_earlier_ones() -> None:
    lines = lay_out(two(), {})
    assert [*cut(lines, 4, 2)] == [Part(0, 4, 1), Part(4, 6, 2)]
    assert [*cut(lines, 8, 1)] == [Part(0, 5, 1), Part(5, 6, 1)]
    said = sheet_of(two(), Part(4, 6, 2))
    assert said["path"][:3] == [20, 21, 24]
    assert said["gate1"] == [0, 1, *[0] * 6]


def test_a_blank_sheet_changes_nothing() -> None:
    sheet = Sheet(SheetSize(8, 2, 2), torch.device("cpu"))
    sheet.blank(99)
    said = {name: column.flatten().tolist() for name, column in sheet.parts.items()}
    assert {*said["places"], *said["move_from"], *said["move_to"]} == {99}
    assert not any(said["seen"] + said["tile_rows"])


def test_a_block_is_written_again_only_when_it_was_sent() -> None:
    happened: list[str] = []

    class Point:
        def __init__(self) -> None:
            self.name = str(len([None for one in happened if one.startswith("made")]))
            happened.append(f"made {self.name}")

        def record(self) -> None:
            happened.append(f"sent {self.name}")

        def synchronize(self) -> None:
            happened.append(f"wait {self.name}")

    sheet = Sheet(SheetSize(2, 1, 1), torch.device("cpu"), event=Point)
    for _ in range(4):
        sheet.blank(9)
    assert happened == ["made 0", "made 1", "sent 0", "sent 1", "wait 0", "sent 0", "wait 1", "sent 1"]


# --- attention --------------------------------------------------------------------------------------------------

LAYERS = {
    "plain": Scores(0.4),
    "window": Scores(0.4, window=9),
    "cap": Scores(2.0, cap=5.0),
    "sinks": Scores(0.4, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)),
    "all": Scores(2.0, 9, 5.0, torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)),
}


def by_definition(query: Tensor, keys: Tensor, values: Tensor, slot: int, path: SequenceOf[int], how: Scores) -> Tensor:
    """One row [heads, dim]: softmax over the keys of its path, in plain words."""
    shared = query.shape[0] // keys.shape[1]
    said = []
    for head, asked in enumerate(query):
        some, their = keys[slot, head // shared, [*path]], values[slot, head // shared, [*path]]
        scored = some @ asked * how.scale
        scored = scored if how.cap is None else how.cap * torch.tanh(scored / how.cap)
        if how.window is not None:
            scored[: max(len(path) - how.window, 0)] = float("-inf")
        if how.sinks is not None:
            scored = torch.cat([scored, how.sinks[head : head + 1]])
        said.append(scored.softmax(0)[: len(path)] @ their)
    return torch.stack(said)


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_is_softmax_over_the_path(layer: str) -> None:
    draw = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, 2, 64, dim, generator=draw, dtype=torch.float64) for dim in (8, 5))
    query = torch.randn(8, 6, 8, generator=draw, dtype=torch.float64)
    lines = lay_out(two(), {})
    sheet = Sheet(SheetSize(8, 2, 2), torch.device("cpu"))
    sheet.fill(lines, Part(0, 6, 2), (), trash=63)
    said = attend_plainly(query, keys, values, sheet.parts, Reach(32, 8, 2), LAYERS[layer])
    for row, path in enumerate(lines.paths):
        whole = [*range(lines.bases[row]), *path]
        wanted = by_definition(query[row], keys, values, lines.slots[row], whole, LAYERS[layer])
        torch.testing.assert_close(said[row], wanted, rtol=0, atol=1e-12)
    longer = attend_plainly(query, keys, values, sheet.parts, Reach(64, 8, 2), LAYERS[layer])
    assert torch.equal(longer[:6], said[:6])
