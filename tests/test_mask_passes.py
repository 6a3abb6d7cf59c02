"""A short pass with masks as one source of `auto`: run where it pays, and the plain text in every case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.drafters.auto import Auto
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.estimators import TRUSTED
from selfdraft.drafting.inner_passes import TOGETHER
from selfdraft.drafting.mask_passes import EXPECTED, MaskPasses, expected
from selfdraft.drafting.mask_prediction import MaskTokens, Place
from selfdraft.drafting.mask_source import MASKS
from selfdraft.drafting.source_tree import Sources, SourceTree
from selfdraft.errors import MissingMasks, OptionError
from selfdraft.models.target import HFTarget
from selfdraft.types import Budget, PassVariant, SamplingParams
from tests.clocks import Passes, on_passes
from tests.models import VOCAB, random_adapters, run, tiny_llama

GREEDY = SamplingParams(max_tokens=60)
WARM = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
PROMPTS = [[(i * i * 7 + k) % VOCAB for i in range(9)] for k in range(2)]
NEVER = [11, 12, 13]
"""Tokens that no answer has: as many as there are guesses for a place. (Others, however unlikely, may be guessed right
by the noise of the place alone.)"""
PROFILE = Profile((1, 64), (1.0, 1.5), (0.0, 0.0))


def masked_target(short: float, *, slots: int = 1, profile: Profile | None = None) -> HFTarget:
    """A model with masks for `s3d`, on a clock where a whole pass takes 1 s and a short one `short`."""
    model = tiny_llama()
    target = HFTarget(model, slots=slots, adapters=[a for a in random_adapters(model) if a.method == "s3d"])
    target.profile = profile
    return on_passes(target, Passes(1.0, short, 1 / 64))


def counting(target: HFTarget, drafter: Auto, right: bool) -> list[int]:
    """Rows of the short passes that will be run. `right`: their masks say what they say, else what never comes."""
    inner, rows_run = drafter.inner, list[int]()
    assert isinstance(inner, MaskPasses)
    forward: Callable[..., Tensor] = target.forward

    def counted(rows: Rows, short: PassVariant | None = None) -> Tensor:
        if short is not None:
            rows_run.append(len(rows))
        answers = forward(rows, short)
        if short is None or right:
            return answers
        wrong = answers.new_full(answers.shape, -100.0)
        wrong[:, NEVER] = 100.0
        return wrong

    target.forward = counted  # type: ignore[method-assign]
    return rows_run


def answers(drafter: str, target: HFTarget, options: dict[str, object], sampling: SamplingParams) -> list[list[int]]:
    return [sequence.output for sequence in run(target, build(drafter, target, options), PROMPTS, sampling)]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("short", [0.01, 8.0])
def test_the_text_is_plain_and_masks_are_a_source_only_where_they_pay(short: float, sampling: SamplingParams) -> None:
    plain = answers("none", masked_target(short), {}, sampling)
    target = masked_target(short)
    drafter = build("auto", target, {"s3d": True})
    assert isinstance(drafter, Auto)
    rows = counting(target, drafter, right=True)
    found = run(target, drafter, PROMPTS, sampling)
    assert [sequence.output for sequence in found] == plain
    if short > 1:
        assert 2 <= len(rows) <= 3, "one that opens it, the trial that shows its price, and one behind the first pause"
    elif not sampling.greedy:  # greedy text soon repeats itself here, and copies say it all
        assert len(rows) > 1 + TRUSTED, "more than what is tried anyway"


@pytest.mark.parametrize(("acceptance", "most"), [((), 1 + TRUSTED), ((0.3, 0.2, 0.1), 3)])
def test_what_training_said_of_the_masks_spares_most_trials(acceptance: tuple[float, ...], most: int) -> None:
    """A pass of half a step is worth 0.3 + 0.06 + 0.006 tokens by the card: it is not tried again and again."""
    model = tiny_llama()
    (adapter,) = (one for one in random_adapters(model) if one.method == "s3d")
    target = on_passes(HFTarget(model, adapters=[replace(adapter, acceptance=acceptance)]), Passes(1.0, 0.5, 1 / 64))
    drafter = build("auto", target, {"s3d": True})
    assert isinstance(drafter, Auto)
    rows = counting(target, drafter, right=False)
    wrong = replace(WARM, max_tokens=20, ignore_eos=True, logit_bias=dict.fromkeys(NEVER, -100.0))
    run(target, drafter, PROMPTS[:1], wrong)
    assert 1 < len(rows) <= most
    assert (len(rows) > 3) == (most > 3)


def test_a_pass_whose_masks_are_never_right_ends() -> None:
    target = masked_target(0.25)
    drafter = build("auto", target, {"s3d": True})
    assert isinstance(drafter, Auto)
    rows = counting(target, drafter, right=False)
    found = run(target, drafter, 6 * PROMPTS, replace(WARM, ignore_eos=True, logit_bias=dict.fromkeys(NEVER, -100.0)))
    steps = sum(sequence.stats.num_steps for sequence in found)
    assert len(rows) < steps / 4
    assert isinstance(drafter.inner, MaskPasses)
    assert min(gain.value for gain in drafter.inner.gains) < 0.5


def test_what_a_pass_said_counts_for_one_step() -> None:
    tree = SourceTree(Sources(request=True), 8, lambda: 0.0, masks=MaskTokens(range(100, 103)), hang=False)
    assert tree.groups is None
    sequence = Sequence([1, 2, 3], 1, SamplingParams(), max_length=12)
    said = Place(torch.tensor([5, 6]), torch.tensor([9.0, 0.0]), torch.zeros(2), 1.0)
    wide, free = Budget(8, 8, 8), [0.0] * 8
    assert tree.draft([sequence], [wide], free) == [EMPTY]
    tree.foresee(sequence, [said, said])
    (draft,) = tree.draft([sequence], [wide], free)
    assert draft.tokens[:1] == (5,)
    assert {*draft.sources} == {MASKS}
    sequence.tokens += [5, 7]
    tree.learn([sequence], [Result(draft, (0,), (5, 7))])
    assert tree.draft([sequence], [wide], free) == [EMPTY]


def test_what_masks_bring_is_counted_beside_trees_of_the_same_expectation() -> None:
    assert expected(EMPTY) == 0
    chain = Draft((1, 2, 3), (-1, 0, 1), ("copy",) * 3, 3, (0.9, 0.9, 0.9))
    assert expected(chain) == 2
    sure = Draft(tuple(range(9)), tuple(range(-1, 8)), ("copy",) * 9, 9, (1.0,) * 9)
    assert expected(sure) == EXPECTED - 1


def test_a_large_batch_runs_no_short_pass() -> None:
    target = masked_target(0.01, slots=TOGETHER + 1)
    drafter = build("auto", target, {"s3d": True})
    assert isinstance(drafter, Auto)
    rows = counting(target, drafter, right=True)
    prompts = [[(i * i * 7 + k) % VOCAB for i in range(9)] for k in range(TOGETHER + 1)]
    run(target, drafter, prompts, SamplingParams(max_tokens=12, ignore_eos=True), slots=len(prompts))
    opened, *others = rows
    assert opened == TOGETHER + 1
    assert max(others) <= TOGETHER * 4, "each has a row and 3 masks; those that are left at the end may run one"


def test_a_short_pass_is_run_only_where_it_is_asked_for() -> None:
    """It needs the stock model in memory, which a second start leaves out."""

    def inner(options: dict[str, object]) -> object:
        return build("auto", masked_target(0.25, profile=PROFILE), options).inner  # type: ignore[attr-defined]

    assert inner({}) is None
    assert inner({"s3d": False}) is None
    assert isinstance(inner({"bits": False, "s3d": True}), MaskPasses)


def test_two_ways_at_once_and_other_values_are_refused() -> None:
    target = masked_target(0.25)
    with pytest.raises(OptionError, match="s3d and bits are two ways to draft"):
        build("auto", target, {"s3d": True, "bits": 4})
    model = tiny_llama()
    with pytest.raises(OptionError, match="s3d and masks are two ways to draft"):
        build("auto", HFTarget(model, adapters=random_adapters(model)), {"s3d": True, "masks": True})
    with pytest.raises(OptionError, match="s3d='yes' is neither True nor False"):
        build("auto", target, {"s3d": "yes"})
    with pytest.raises(MissingMasks, match="selfdraft train --recipe s3d"):
        build("auto", HFTarget(tiny_llama()), {"s3d": True})
