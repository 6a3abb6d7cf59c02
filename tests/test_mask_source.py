"""Masks as a source of the merged tree: where their groups hang, what they are worth, and that the text stays."""

from __future__ import annotations

import pytest
import torch

from selfdraft import LLM, SamplingParams
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.drafting.cost_guard import START
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.mask_prediction import MaskTokens, Place, endings
from selfdraft.drafting.mask_source import BINS, FIRST_GAIN, MASKS, TRY_EVERY, MaskGroups, MaskSource
from selfdraft.drafting.mixing import Credit
from selfdraft.drafting.source_tree import RequestSources, Sources, SourceTree
from selfdraft.errors import OptionError
from selfdraft.models.pocket import POCKET
from selfdraft.models.target import HFTarget
from selfdraft.protocols import standstill
from selfdraft.types import Budget
from tests.clocks import Ticking, on_passes
from tests.models import random_adapters, run, tiny_llama

TREE = Draft((7, 8, 9), (ROOT, 0, ROOT), ("x",) * 3, 3, (0.6, 0.5, 0.3))
"""Chances to be reached: 0.6, 0.3 behind it, 0.3 beside it; acceptance ends at the root with 0.1."""


def silent(token: int, ids: torch.Tensor) -> None:
    return None


def groups(count: int = 3) -> MaskGroups:
    return MaskGroups(MaskTokens(range(100, 100 + count)))


def test_where_acceptance_ends() -> None:
    assert [point for point, _ in endings(TREE, chances_of(TREE))] == [0, 1, 2, ROOT]
    assert [chance for _, chance in endings(TREE, chances_of(TREE))] == pytest.approx([0.3, 0.3, 0.3, 0.1])
    assert endings(EMPTY, []) == [(ROOT, 1.0)]


def test_a_mask_row_has_to_bring_its_price() -> None:
    """Gains at first 0.3, 0.15, 0.075; a row under a place that is reached with 0.3 brings 0.09, 0.045, 0.0225."""
    source = MaskSource(silent, standstill)
    hung = groups().hang(source, TREE, [0.04] * 9, 99)
    assert hung.tokens == (7, 8, 9, *(100, 101) * 3)
    assert hung.parents == (ROOT, 0, ROOT, 0, 3, 1, 5, 2, 7)
    assert hung.num_candidates == 3
    assert {*hung.sources[3:]} == {MASKS}
    assert source.groups == {0: (3, 2), 1: (5, 2), 2: (7, 2)}
    assert groups().hang(source, TREE, [0.1] * 9, 99) == TREE
    assert source.groups == {}
    rising = [0.04, 0.04, 0.08, 0.5, *[0.5] * 5]
    assert groups().hang(source, TREE, rising, 99).tokens[3:] == (100, 101, 100)
    assert groups().hang(source, TREE, [0.0] * 2, 99).tokens[3:] == (100, 101), "no more rows than prices"
    assert groups().hang(source, EMPTY, [0.1] * 9, 99).tokens == (100, 101)


def test_no_mask_stands_too_deep() -> None:
    source = MaskSource(silent, standstill)
    assert groups().hang(source, TREE, [0.0] * 99, 2).depths == (1, 2, 1, 2, 2, 1, 2)
    assert groups().hang(source, EMPTY, [0.0] * 99, 0) == EMPTY


def test_what_does_not_pay_is_tried_again() -> None:
    hanging, source = groups(), MaskSource(silent, standstill)
    for _ in range(TRY_EVERY):
        assert hanging.hang(source, TREE, [9.0] * 9, 99) == TREE
    assert len(hanging.hang(source, TREE, [9.0] * 9, 99)) == len(TREE) + 2
    assert hanging.hang(source, TREE, [9.0] * 9, 99) == TREE


def test_gains_are_tokens_that_no_other_source_named() -> None:
    hanging, source = groups(), MaskSource(silent, standstill)
    sequence = Sequence([1, 2, 3], 1, SamplingParams(), seed=0)
    for _ in range(200):
        source.update([Place(torch.tensor([5]), torch.zeros(1), torch.zeros(1), 1.0)] * 3, 3)
        draft = Draft((5, 6, 7), (ROOT, 0, 1), (MASKS, f"copy+{MASKS}", MASKS), 3)
        hanging.learn(source, sequence, Result(draft, (0, 1, 2), (5, 6, 7, 8), proposed=draft, nodes=(0, 1, 2)))
    assert [round(gain.value, 1) for gain in hanging.gains] == [0.9, 0.0, 0.9]
    assert FIRST_GAIN < 0.9


def test_what_a_place_says() -> None:
    """The three likeliest tokens behind the token before, with the class of their chance."""
    wanted = torch.tensor([0.7, 0.2, 0.06, 0.04]).log()
    place = Place(torch.tensor([5, 6, 7, 8]), wanted, torch.zeros(4), 1.0)
    source = MaskSource(lambda token, ids: torch.tensor([-9.0, 0.0, 0.0, 0.0]) if token == 2 else None, standstill)
    assert source.state is None
    source.update([place, place], 1)
    assert source.state == (0, 1)
    assert source.guess((0, 1)) == {5: 4, 6: BINS + 1, 7: 2 * BINS}
    assert source.step((0, 1), 2) == (1, 2)
    assert [*source.guess((1, 2))] == [6, 7, 8], "the link says what cannot follow"
    assert source.step((1, 2), 6) is None
    source.update([], -1)
    assert source.state is None


def test_what_masks_said_of_an_older_place_is_forgotten() -> None:
    """Steps that draft nothing move the text on."""
    sequence = Sequence([1, 2, 3], 1, SamplingParams(), seed=0)
    note = RequestSources(sequence, Sources(), None, Credit(), MaskTokens(range(100, 103)), standstill)
    assert note.masks is not None
    note.masks.update([Place(torch.tensor([5]), torch.zeros(1), torch.zeros(1), 1.0)], 3)
    note.resume(sequence)
    assert note.masks.state == (0, 3)
    sequence.tokens.append(4)
    note.resume(sequence)
    assert note.masks.state is None


def test_masks_that_lose_are_paused_until_a_new_request() -> None:
    """What masks took is booked against what they alone brought; others named tokens, too, and those do not count."""
    tree = SourceTree(Sources(request=True), 8, standstill, masks=MaskTokens(range(100, 103)))
    sequence = Sequence([1, 2, 3], 1, SamplingParams(), max_length=12)
    hung, wide = Draft((5,), (ROOT,), ("copy+masks",), 1).with_probes((100, 101), (ROOT, 0), MASKS), Budget(8, 8, 8)
    right, asked = Result(hung, (0,), (5, 6)), list[tuple[int, float]]()

    def dear(rows: int, seconds: float) -> float:
        asked.append((rows, seconds))
        return 1.0

    steps = 0
    while not tree.masks.paused and steps < 99:
        tree.book_masks([right], dear)
        steps += 1
    assert START - 1 < steps < START + 3, "each step took a token and brought none"
    assert {*asked} == {(2, 0.0)}
    before = len(asked)
    tree.book_masks([right], dear)
    assert len(asked) == before, "nothing is booked during a pause"
    assert tree.with_masks([sequence], [EMPTY], [wide], [0.0] * 8) == [EMPTY]
    fresh = Sequence([1, 2, 3], 2, SamplingParams(), max_length=12)
    assert len(tree.with_masks([fresh], [EMPTY], [wide], [0.0] * 8)[0]) == 3, "a new request is given a trial"


def test_masks_that_pay_go_on() -> None:
    tree = SourceTree(Sources(request=True), 8, standstill, masks=MaskTokens(range(100, 103)))
    hung = Draft((5, 6), (ROOT, 0), (MASKS, "copy"), 2).with_probes((100,), (-3,), MASKS)
    for _ in range(100):
        tree.book_masks([Result(hung, (0, 1), (5, 6, 7))], lambda rows, seconds: 1.9)
    assert not tree.masks.paused, "both tokens are there because of the masks"


@pytest.mark.parametrize("name", ["merged", "auto"])
def test_masks_is_a_bool_and_may_be_missing(name: str) -> None:
    bare = on_passes(HFTarget(tiny_llama()))
    with pytest.raises(OptionError, match="masks='yes' is neither True nor False"):
        build(name, bare, {"masks": "yes"})
    assert build(name, bare, {"masks": True}).tree.groups is None  # type: ignore[attr-defined]
    gated = on_passes(HFTarget(tiny_llama(), adapters=random_adapters(tiny_llama())))
    assert build(name, gated, {"masks": True}).tree.groups is not None  # type: ignore[attr-defined]
    for seconds, tried in ((None, False), (1.45, True), (1.55, False)):
        gated.profile = None if seconds is None else Profile((1, 8), (1.0, seconds), (0.0, 0.0))
        found = build(name, gated).tree.groups  # type: ignore[attr-defined]
        assert (found is not None) == (tried and name == "auto"), "only where rows are known to be cheap"
    gated.profile = Profile((1, 8), (1.0, 1.1), (0.0, 0.0))
    for masks in (None, True):
        found = build("auto", gated, {"bits": 4, "masks": masks}).tree.groups  # type: ignore[attr-defined]
        assert (found is not None) == (masks is True), "beside a rounded copy only where they are asked for"
    assert build(name, gated, {"masks": False}).tree.groups is None  # type: ignore[attr-defined]


@pytest.mark.skipif(not (POCKET / "selfdraft_space").is_dir(), reason="the package holds no trained masks for pocket")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_masks_make_passes_longer_and_change_no_text(temperature: float) -> None:
    """Where rows cost the same, the tree with masks brings more tokens a pass than the one without."""
    llm = LLM("pocket", drafter="none", max_num_seqs=3, clock=Ticking())
    texts = [llm.encode(text) for text in ("def area(r):\n", "There was a king who", "She went to the market and")]
    sampling = SamplingParams(max_tokens=80, temperature=temperature, seed=2)
    plain = [s.output for s in run(llm.target, "none", texts, sampling)]
    lengths = []
    for masks in (False, True):
        drafter = build("merged", llm.target, {"masks": masks, "min_probability": 0.05})
        drafted = run(llm.target, drafter, texts, sampling, slots=3)
        assert [s.output for s in drafted] == plain
        lengths.append(sum(len(s.output) for s in drafted) / sum(s.stats.num_steps for s in drafted))
    assert lengths[1] > lengths[0] + 0.1, lengths
