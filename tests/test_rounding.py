"""Rounded copies of a model, and drafts of them; `test_packed_layers.py` has the weights themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from selfdraft import LLM
from selfdraft.core.rows import Rows, chain_rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import build
from selfdraft.errors import OptionError
from selfdraft.models.packed.layers import BlockLinear
from selfdraft.models.packed.quantise import quantise_model
from selfdraft.models.rounded import rounding
from selfdraft.models.target import HFTarget
from selfdraft.types import Rounded, SamplingParams, Skip, Stats
from tests.clocks import Ticking
from tests.models import random_adapters, run, tiny_llama, tiny_target, unavailable
from tests.test_runner import fast_target

compiled = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def chain_of(rows: int) -> Rows:
    sequence = Sequence([1] * rows, rows, SamplingParams(), slot=0)
    return pack([(sequence, rows, EMPTY)])


# passes


def passes(target: HFTarget, bits: int) -> list[Tensor]:
    """A chain, a tree and mask rows in rounded passes behind a prompt."""
    sequence = Sequence([3, 1, 4, 1, 5, 9, 2], 7, SamplingParams(), slot=0)
    target.forward(pack([(sequence, 7, EMPTY)]))
    target.keep(0, 0, range(7))
    sequence.num_cached, sequence.tokens = 7, [*sequence.tokens, 6]
    tree = Draft((5, 6, 7, 8, 9), (-1, -1, 1, 0, 2), ("",) * 5, 5)
    masked = tree.with_probes(list(target.extras.masks_for("space").ids), [-4, 0, 1, -1], "space")
    return [
        target.forward(pack([(sequence, 1, draft)]), Rounded(bits)) for draft in (Draft.chain([5, 6], ""), tree, masked)
    ]


@compiled
@pytest.mark.parametrize("bits", [4, 8])
def test_the_tape_says_what_the_plain_path_says(bits: int) -> None:
    model = tiny_llama(torch.float32)
    plain = HFTarget(model, adapters=random_adapters(model))
    for a, b in zip(passes(fast_target(torch.float32), bits), passes(plain, bits), strict=True):
        # the last bit of a float may move a code of a row by one
        assert torch.allclose(a, b, atol=0.01), (a - b).abs().max()


def test_eight_bits_are_nearer_than_four() -> None:
    model = tiny_llama()
    target = HFTarget(model, adapters=random_adapters(model))
    whole = HFTarget(model, adapters=random_adapters(model))
    sequence = Sequence([3, 1, 4, 1, 5, 9, 2], 7, SamplingParams(), slot=0)
    rows = pack([(sequence, 7, Draft.chain([5, 6], ""))])
    wanted = whole.forward(rows)
    errors = [(target.forward(rows, Rounded(bits)) - wanted).abs().max().item() for bits in (8, 4)]
    assert 0 < errors[0] < errors[1] / 4 < 0.05
    assert target.copies[4].layers == target.copies[8].layers == 4 * 7 + 1
    assert target.copies[4].bytes < target.copies[8].bytes


@pytest.mark.parametrize(("name", "options"), [("quantised", {}), ("cascade", {}), ("auto", {"bits": 4})])
def test_the_copy_is_there_before_the_first_answer(name: str, options: dict[str, object]) -> None:
    """A server would make its first caller wait for it."""
    target = tiny_target()
    assert not target.copies
    build(name, target, options)
    assert {*target.copies} == {4}


def test_verification_takes_nothing_from_a_rounded_pass() -> None:
    """Not its keys and values, and no states that a skipped pass had left where it has written since."""
    said = []
    for drafted in (True, False):
        target = HFTarget(tiny_llama())
        sequence = Sequence([3, 1, 4], 3, SamplingParams(), slot=0)
        target.forward(pack([(sequence, 3, EMPTY)]))
        target.keep(0, 0, range(3))
        sequence.num_cached, sequence.tokens = 3, [3, 1, 4, 9]
        rows = pack([(sequence, 1, Draft.chain([2, 6, 7], "x"))])
        if drafted:
            target.forward(rows, Skip(frozenset({2})))
            for i, token in enumerate((9, 2, 6, 7)):
                target.forward(chain_rows([(0, 3 + i, token)]), Skip(frozenset({2})))
                target.forward(chain_rows([(0, 3 + i, token)]), Rounded(4))
        said.append(target.forward(rows))
        said += [target.cache.view(layer, 0, 7)[part].clone() for layer in range(4) for part in (0, 1)]
    half = len(said) // 2
    for one, other in zip(said[:half], said[half:], strict=True):
        assert torch.equal(one, other)


def test_layers_of_another_kind_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    model = copy.deepcopy(tiny_llama())
    old = model.model.layers[1].mlp.up_proj
    own = Own(old.in_features, old.out_features, bias=False, dtype=torch.float64)
    own.weight = old.weight
    model.model.layers[1].mlp.up_proj = own
    changed, made = rounding(model, 4, Ticking())
    assert made.seconds == 1.0
    assert (made.layers, made.kept) == (4 * 7, 1)
    assert changed.model.layers[1].mlp.up_proj is own
    assert model.model.layers[0].mlp.up_proj.weight.shape == own.weight.shape, "the model itself is not touched"
    assert isinstance(changed.lm_head, BlockLinear)
    assert changed.lm_head.kind.bits == 8


def test_block_weights_of_more_bits_are_rounded_again() -> None:
    model = quantise_model(copy.deepcopy(tiny_llama(torch.float32)), 8)
    changed, made = rounding(model, 4, Ticking())
    assert (made.layers, made.kept) == (4 * 7, 1), "the output layer has its 8 bits already"
    assert changed.model.layers[0].mlp.up_proj.kind.bits == 4
    assert model.model.layers[0].mlp.up_proj.kind.bits == 8
    assert rounding(model, 8, Ticking())[1].layers == 0


def test_bits_are_checked() -> None:
    for wrong in (3, 16, "4", 4.0, None):
        with pytest.raises(OptionError, match=r"bits=.*: weights are rounded to 4 or 8 bits"):
            build("quantised", tiny_target(), {"bits": wrong})
        with pytest.raises(OptionError, match="4 or 8 bits"):
            build("cascade", tiny_target(), {"bits": wrong})


# the drafter


def test_the_pocket_model_agrees_with_its_rounded_self() -> None:
    """Every token drafted, on texts of its own: 8 bits are nearly the model, 4 bits come near."""
    llm = LLM("pocket", max_num_seqs=1, clock=Ticking(0.001))
    rates = []
    for bits in (8, 4):
        options = {"bits": bits, "confidence_threshold": 0.0, "exit_policy": "target", "adaptive": False}
        llm.use("quantised", {**options, "num_speculative_tokens": 1})
        llm.stats = Stats()
        llm.generate(["def add(a, b):", "Once upon a time", "Question: What is 7 + 8?"], SamplingParams(max_tokens=60))
        rates.append(llm.stats.draft_acceptance_rate)
    assert rates[0] > 0.9
    assert rates[1] > 0.8
    made = llm.target.copies
    assert sum(copy_.seconds for copy_ in made.values()) < 5.0
    assert made[4].bytes < made[8].bytes < sum(p.numel() for p in llm.model.parameters()) * 1.5


def test_sampled_drafts_share_the_noise() -> None:
    """At temperature 1 a draft without the noise would be right one time in ten."""
    target = tiny_target()
    drafter = build("quantised", target, {"bits": 8, "exit_policy": "target", "confidence_threshold": 0.0})
    (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(temperature=1.0, max_tokens=100, seed=4))
    assert sequence.stats.draft_acceptance_rate > 0.9
