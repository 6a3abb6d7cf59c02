"""What mask rows say, asked at once: the guesses of every place are those that are asked for one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from selfdraft.core import verify
from selfdraft.core.rows import tree_rows
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.drafting.mask_prediction import Groups, MaskTokens, Place, places, read_group, scored, with_groups
from selfdraft.drafting.mask_tables import UNKNOWN, MaskTables, ask, foresee, mask_rows
from selfdraft.types import SamplingParams
from tests.models import VOCAB, tiny_target
from tests.test_oracle import MIXED, OPTIONS, WAYS, decode, same_text, target_for

MASKS = range(VOCAB, VOCAB + 4)
GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.7, top_k=30, top_p=0.95)
SAMPLINGS = {"greedy": GREEDY, "warm": WARM, "allowed": replace(GREEDY, allowed_token_ids=(5, 9, 30, 31))}
READ = {(): 3, (0,): 2, (1,): 2, (0, 2): 1, (1, 4): 1, (0, 2, 3): 0}
"""End of acceptance in `TREE` -> masks that speak of what comes behind it (`hung`)."""
TREE = Draft((7, 8, 9, 10, 11), (-1, -1, 0, 2, 1), ("",) * 5, 5, (0.5,) * 5)


def trained() -> MaskTokens:
    """Masks whose link moves the order of the guesses."""
    draw = torch.Generator().manual_seed(3)
    table = 2.0 * torch.randn(VOCAB, VOCAB, generator=draw)

    def one(token: int, ids: Tensor) -> Tensor:
        return table[token, ids]

    def many(before: Tensor, ids: Tensor) -> Tensor:
        return table[before[:, :, None], ids[:, None]]

    return MaskTokens(MASKS, one, many)


def request(sampling: SamplingParams, seed: int = 5) -> Sequence:
    return open_sequence([1, 2, 3], sampling, seed=seed, eos=frozenset(), context=64)


def answers(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_chain_of_places_is_foreseen_in_one_question(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, one, two = trained(), request(SAMPLINGS[name]), request(SAMPLINGS[name], 6)
    said = [(answers(4), one), (answers(3), two)]
    by_row = [places(logits, sequence) for logits, sequence in said]
    monkeypatch.setattr(verify, "apart", lambda logits: True)
    at_once = foresee(said, masks, 3)
    assert [len(found) for found in at_once] == [4, 3]
    for known, asked, (_, sequence) in zip(at_once, by_row, said, strict=True):
        before = [sequence.tokens[-1]]
        for told, place in zip(known, asked, strict=True):
            for token in before:
                exact, found = place.after(token, masks.shift, 3), told.after(token, masks.shift, 3)
                likely = [pair for pair in zip(exact.tokens, exact.chances, strict=True) if pair[1] > 0]
                assert list(found.tokens[: len(likely)]) == [token for token, _ in likely]
                assert found.chances[: len(likely)] == pytest.approx([chance for _, chance in likely], abs=1e-6)
            before = place.ids[:6].tolist()


def test_behind_a_token_that_nobody_thought_of_there_is_no_link() -> None:
    masks, logits = trained(), answers(1)
    part = scored(logits, GREEDY, 0, [0])
    question = ask([part], torch.tensor([ROOT]), torch.tensor([[4]]), masks, 3)
    (known,) = question.read(question.numbers)
    assert known.before.tolist() == [*[UNKNOWN] * 32, 4]
    assert known.after(4, masks.shift, 3).tokens != known.after(5, masks.shift, 3).tokens
    assert list(known.after(5, masks.shift, 2).tokens) == logits[0].topk(2).indices.tolist()


def test_without_a_link_there_is_one_answer() -> None:
    part = scored(answers(2), GREEDY, 0, [0, 1])
    question = ask([part], torch.tensor([ROOT, 0]), torch.tensor([[4], [5]]), MaskTokens(MASKS), 2)
    assert question.before == 0
    assert [place.after(9, trained().shift, 2).tokens for place in question.read(question.numbers)] == [
        tuple(row.topk(2).indices.tolist()) for row in answers(2)
    ]


def hung() -> tuple[Draft, Groups]:
    """Three masks under the last token, two under candidate 1, none under the others."""
    return with_groups(TREE, [(ROOT, 3), (1, 2)], MASKS, "space")


def test_which_tokens_may_stand_before_a_mask() -> None:
    """Behind candidate 0 the second mask of the root's group is read first, behind 4 the second of another."""
    draft, _ = hung()
    (span,) = tree_rows([(0, 2, 3, draft)]).spans
    found = mask_rows(span, MASKS)
    assert found.rows == [6, 7, 8, 9, 10]
    assert found.parents == [ROOT, 0, 1, ROOT, 3]
    assert found.ends == [[0], [1], [3], [2], [5]]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("path", READ, ids=str)
def test_a_group_says_the_same_wherever_acceptance_ends(path: tuple[int, ...], name: str) -> None:
    """All rows are asked about before the end is known; those behind it then know the token that came."""
    masks, sequence = trained(), request(SAMPLINGS[name])
    draft, groups = hung()
    rows, logits = tree_rows([(0, 2, 3, draft)]), answers(1 + len(draft))
    said = torch.tensor([(7 * row + 2) % VOCAB for row in range(len(logits))])
    tables = MaskTables(masks, 3)
    numbers = tables.ask(rows, [sequence], logits, said)
    assert numbers is not None
    tables.take(numbers)
    end = int(said[1 + path[-1] if path else 0])
    sequence.tokens += [*(draft.tokens[node] for node in path), end]
    result = Result(draft, path, tuple(sequence.tokens[3:]), (), logits, proposed=draft, nodes=tuple(range(len(draft))))
    exact, known = (
        read_group(groups, sequence, result, MaskTables(masks, 3)),
        read_group(groups, sequence, result, tables),
    )
    assert len(exact) == len(known) == READ[path]
    before = [end]
    for asked, told in zip(exact, known, strict=True):
        for token in before:
            mine, others = told.after(token, masks.shift, 3), asked.after(token, masks.shift, 3)
            alive = sum(chance > 0 for chance in others.chances)
            assert mine.tokens[:alive] == others.tokens[:alive]
        assert isinstance(asked, Place)
        before = asked.ids[:5].tolist()


def test_a_request_whose_sampling_looks_further_is_asked_row_by_row() -> None:
    tables, far = MaskTables(trained(), 3), request(replace(WARM, repetition_penalty=1.2))
    draft, _ = hung()
    rows, logits = tree_rows([(0, 2, 3, draft)]), answers(1 + len(draft))
    assert tables.ask(rows, [far], logits, torch.zeros(len(logits), dtype=torch.int64)) is None
    assert tables.places(far, [6]) is None


@pytest.mark.parametrize("drafter", ["space", "s3d", "merged"])
def test_the_text_is_that_of_plain_decoding(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samplings in one batch, with this machine taken for a device that is waited for."""
    monkeypatch.setattr(verify, "apart", lambda logits: True)
    target = target_for(WAYS["tight"])
    options = {"masks": True} if drafter == "merged" else OPTIONS.get(drafter)
    same_text(decode(target, build(drafter, target, options), MIXED, WAYS["tight"]), MIXED)


def test_links_of_many_tokens_are_those_of_each() -> None:
    masks = tiny_target().extras.masks_for("space")
    before, ids = torch.tensor([[3, 9], [4, 4]]), torch.tensor([[1, 2, 30], [8, 7, 6]])
    shifts = masks.shifts(before, ids)
    assert shifts is not None
    for row in range(2):
        for place in range(2):
            one = masks.shift(int(before[row, place]), ids[row])
            assert one is not None
            torch.testing.assert_close(shifts[row, place], one)
