"""One table for all rows of a step: it says what is said row by row, and the text is that of plain decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from selfdraft.core import verify
from selfdraft.core.sampler import NOTHING, choose, process
from selfdraft.core.told import NAN, UNSAID, Asked, tell
from selfdraft.drafters import build
from selfdraft.drafting.successors import likeliest, topk
from selfdraft.errors import EngineError
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.models import run, tiny_llama
from tests.test_oracle import MIXED, OPTIONS, TYPES, WAYS, decode, same_text, target_for

VOCAB = 211
WARM = SamplingParams(temperature=0.8)
LOCAL = {
    "warm": WARM,
    "cold": replace(WARM, temperature=1e-30),
    "top_k": replace(WARM, top_k=7),
    "top_p": replace(WARM, top_p=0.6),
    "min_p": replace(WARM, min_p=0.1),
    "all": replace(WARM, temperature=1.3, top_k=40, top_p=0.9, min_p=0.02),
    "bias": replace(WARM, logit_bias={3: 2.5, 9: float("-inf")}, top_p=0.95),
    "allowed": replace(WARM, allowed_token_ids=(5, 17, 4, 200), top_k=3),
    "greedy-bias": SamplingParams(logit_bias={3: 0.5, 9: -1.0, 150: 4.0}),
    "greedy-allowed": SamplingParams(allowed_token_ids=(8, 2, 100)),
    "plain": SamplingParams(),
}
"""Ways to choose that look at nothing but the row."""
MEMORY = {
    "penalty": replace(WARM, repetition_penalty=1.2),
    "presence": replace(WARM, presence_penalty=0.1),
    "frequency": replace(WARM, frequency_penalty=0.1),
    "words": replace(WARM, bad_words_ids=((3, 4),)),
    "least": replace(WARM, min_tokens=4),
    "processor": replace(WARM, logits_processors=(lambda path, logits: logits,)),
}
"""Ways that look at what came before."""


def rows(dtype: str, count: int = 24) -> torch.Tensor:
    """Logits with ties: among small ones, and of the best token with a later one."""
    drawn = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(7)) * 3
    drawn[::3] = drawn[::3].round()
    drawn[1::4, 150] = drawn[1::4].amax(-1)
    return drawn.to(TYPES[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", LOCAL)
def test_every_row_is_chosen_as_alone(name: str, dtype: str) -> None:
    sampling, logits = LOCAL[name], rows(dtype)
    positions = [5 * i + 2 for i in range(len(logits))]
    said = tell(logits, [Asked(sampling, 11, positions[:9]), Asked(sampling, 12, positions[9:])])
    alone = [
        choose(process(row, sampling, [1], 1, frozenset()), sampling, 11 if i < 9 else 12, positions[i])
        for i, row in enumerate(logits)
    ]
    assert said.chosen == alone
    assert said.best == logits.max(-1).indices.tolist()


@pytest.mark.parametrize("name", LOCAL)
def test_a_sampling_that_looks_at_the_row_alone_needs_no_path(name: str) -> None:
    """So no step copies a long text for it; an end of the text is not banned because the path is short."""
    for row in rows("float32", 4):
        whole = process(row, LOCAL[name], [7] * 9, 5, frozenset({3, 150}))
        assert torch.equal(process(row, LOCAL[name], [], 5, frozenset({3, 150})), whole)


@pytest.mark.parametrize("name", MEMORY)
def test_what_looks_further_than_the_row_is_left_to_the_walk(name: str) -> None:
    assert not MEMORY[name].local
    said = tell(rows("float32", 3), [Asked(MEMORY[name], 0, [4]), Asked(WARM, 0, [4, 5])])
    assert said.chosen[0] == UNSAID
    assert min(said.chosen[1:]) >= 0


def test_nan_and_rows_where_all_is_banned() -> None:
    logits = rows("float32", 4)
    logits[2, 9] = float("nan")
    banned = SamplingParams(allowed_token_ids=(3,), logit_bias={3: float("-inf")})
    asked = [Asked(banned, 0, [1]), Asked(replace(banned, temperature=1.0), 0, [1]), Asked(WARM, 0, [1, 2])]
    said = tell(logits, asked)
    assert said.chosen[:2] == [NOTHING, NOTHING]
    assert [best == NAN for best in said.best] == [False, False, True, False]


def test_runners_up_and_chances_travel_in_the_table() -> None:
    logits = rows("bfloat16", 6)
    said = tell(logits, [Asked(WARM, 0, range(6))], 20, chances=True)
    assert said.top is not None
    values, _ = topk(logits, 20)
    assert torch.equal(said.top[0], values.double())
    assert torch.equal(logits.double().gather(1, said.top[1]), said.top[0])
    exact = logits.float().softmax(-1)[range(6), said.chosen]
    assert torch.allclose(torch.tensor(said.chances), exact.double().float())
    own, given = likeliest(logits, WARM, 20), likeliest(logits, WARM, 20, known=said.top)
    assert (own[0] == given[0]).all()
    assert tell(logits, [Asked(WARM, 0, range(6))], 1000).top[0].shape == (6, VOCAB)  # type: ignore[index]


DRAFTERS = ("none", "lookahead", "layer_skip", "auto", "space")


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_text_is_that_of_plain_decoding(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samplings in one batch, with this machine taken for a device that is waited for."""
    monkeypatch.setattr(verify, "apart", lambda logits: True)
    target = target_for(WAYS["tight"])
    same_text(decode(target, build(drafter, target, OPTIONS.get(drafter)), MIXED, WAYS["tight"]), MIXED)


def test_a_request_that_bans_every_token_ends_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "apart", lambda logits: True)
    banned = SamplingParams(max_tokens=3, allowed_token_ids=(3,), logit_bias={3: float("-inf")})
    with pytest.raises(EngineError, match="every token is banned here"):
        run(HFTarget(tiny_llama()), "none", [[1, 2]], banned)
