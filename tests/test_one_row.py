"""One row on the CPU says what whole rows say elsewhere, and no step asks torch's threads for help."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfdraft.core.noise import gumbel
from selfdraft.core.one_row import contenders, cooled, drawn, leading, widened
from selfdraft.core.sampler import choose, logprob, process, score_rows
from selfdraft.core.told import NAN
from selfdraft.drafting.autoregressive import chance
from selfdraft.models.exactness import NATURAL
from selfdraft.models.runner.draw import contenders_by
from selfdraft.models.runner.kernel_build import library
from selfdraft.models.runner.runner import likeliest
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.models import run, tiny_llama, unavailable

VOCAB = 50_000
WARM = SamplingParams(temperature=0.8)
SHAPES = {"peaked": 6.0, "usual": 3.0, "flat": 0.3, "level": 0.0}
"""Spread of the logits: from one clear best to all alike."""
TRUNCATED = {
    "none": WARM,
    "top_k": replace(WARM, top_k=50),
    "top_p": replace(WARM, top_p=0.95),
    "all of it": replace(WARM, top_p=0.9999999),
    "min_p": replace(WARM, min_p=0.02),
    "together": replace(WARM, temperature=1.5, top_k=3000, top_p=0.7, min_p=0.001),
}
GRAIN = 32_768
"""So many numbers torch leaves to one thread (its GRAIN_SIZE)."""
PICKING = {f"aten.{name}" for name in ("embedding.default", "index.Tensor", "index_put_.default", "gather.default")}
"""What reads or writes only a few of the numbers that it is given."""
ALONE = {"aten.empty.memory_format", "aten.log_softmax.int"}
"""What one thread does however many numbers there are: nothing, and one row after the other."""


def row(shape: str, number: int = 0) -> Tensor:
    drawn = torch.randn(VOCAB, generator=torch.Generator().manual_seed(number)) * SHAPES[shape]
    drawn[7::1000] = float("-inf")
    return drawn


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_look_for_the_same_token(shape: str) -> None:
    """Of a row of odd length, too, of one that is cut, and of one where nothing is left."""
    if unavailable():
        pytest.skip(unavailable())
    search = contenders_by(library())
    for seed in range(20):
        scores = cooled(row(shape, seed)[: VOCAB - 37 * seed].numpy(), TRUNCATED["top_k"] if seed % 3 == 0 else WARM)
        found = search(scores, seed, 3 * seed)
        assert drawn(scores, seed, 3 * seed, search) == drawn(scores, seed, 3 * seed)
        assert np.isfinite(scores[found]).all()
        assert (np.diff(found) > 0).all()
        assert len(found) < 100
    assert not len(search(np.full(50, -np.inf, np.float32), 1, 2))
    assert search(np.array([-700.0, 0.0, -np.inf], np.float32), 1, 2).tolist() == [1]


def test_a_row_that_the_kernels_cannot_take_is_looked_through_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if unavailable():
        pytest.skip(unavailable())
    search, scores = contenders_by(library()), cooled(row("flat").numpy(), WARM)
    for other in (scores.astype(np.float64), scores[::3]):
        assert search(other, 5, 6).tolist() == contenders(other, 5, 6).tolist()
    assert len(search(scores, 5, 6)) > 1
    monkeypatch.setattr("selfdraft.models.runner.draw.MOST", 1)
    assert search(scores, 5, 6).tolist() == contenders(scores, 5, 6).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 64, 100, 1000, VOCAB])
def test_the_kernels_name_the_likeliest_tokens_in_order(dtype: torch.dtype, vocab: int) -> None:
    """Of equals the lowest id first, and both zeros are equal; rows that lie apart, and fewer tokens than wanted."""
    if unavailable():
        pytest.skip(unavailable())
    rows = torch.stack([row(shape)[:vocab] for shape in SHAPES] + [torch.zeros(vocab), -row("flat")[:vocab]])
    rows[4, ::2] = -0.0
    rows = torch.cat([rows, rows], 1).to(dtype)[:, :vocab]
    for count in (1, 3, 64, 900):
        found = likeliest(library(), rows, count)
        assert found is not None
        wanted = np.argsort(-rows.double().numpy(), axis=1, kind="stable")[:, :count]
        assert found[1].tolist() == wanted.tolist()
        assert torch.equal(found[0], rows.double().gather(1, found[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 70, VOCAB - 1])
def test_a_row_with_nan_has_no_likeliest_token(dtype: torch.dtype, place: int) -> None:
    if unavailable():
        pytest.skip(unavailable())
    rows = torch.stack([row("usual"), row("usual", 1), row("usual", 2)]).to(dtype)
    rows[1, place], rows[2, place] = float("nan"), -torch.tensor(float("nan"))
    found = likeliest(library(), rows, 2)
    assert found is not None
    assert found[1][:, 0].tolist() == [int(rows[0].argmax()), NAN, NAN]
    assert likeliest(library(), rows.double(), 2) is None, "numpy does it"
    assert likeliest(library(), rows.T, 2) is None


@pytest.mark.parametrize("count", [1, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_sums_of_score_and_noise_are_among_the_contenders(shape: str, count: int) -> None:
    seen = 0
    for seed in range(20):
        scores = row(shape, seed) / 0.8
        scores -= scores.max()
        noisy = scores.double() + gumbel(seed, 3 * seed, torch.arange(VOCAB))
        found = contenders(scores.numpy(), seed, 3 * seed, count)
        assert set(noisy.topk(count).indices.tolist()) <= set(found.tolist())
        assert np.isfinite(scores.numpy()[found]).all()
        assert (np.diff(found) > 0).all()
        seen += len(found)
    assert seen / 20 < 4 * count + 4, "nearly all tokens are out of reach, so their noise is not worked out"


@pytest.mark.parametrize("top", [float("-inf"), float("inf")])
def test_a_row_without_a_best_score_has_no_token_left(top: float) -> None:
    """As on other devices: a bias of +inf leaves no order."""
    scores = np.full(300, -np.inf, np.float32)
    scores[5] = top
    sampling = replace(WARM, top_k=9, top_p=0.5, min_p=0.1)
    assert not np.isfinite(cooled(scores, sampling)).any()
    assert not torch.isfinite(score_rows(torch.from_numpy(scores)[None], sampling)).any()


def test_contenders_where_little_or_nothing_is_left() -> None:
    nothing = np.full(50, -np.inf, np.float32)
    assert not len(contenders(nothing, 1, 2))
    few = nothing.copy()
    few[[9, 4]] = [0.0, -700.0]
    assert contenders(few, 1, 2).tolist() == [9]
    assert contenders(few, 1, 2, 5).tolist() == [4, 9]
    assert contenders(few[[4, 9]], 1, 2, 5).tolist() == [0, 1], "fewer tokens than are wanted"


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_cut_as_whole_rows_are(shape: str, name: str) -> None:
    """Of equal scores the lowest ids stay, as many as the mass of all of them says, whichever were sorted first."""
    for number in range(3):
        logits = row(shape, number)
        here = torch.from_numpy(cooled(logits.numpy(), TRUNCATED[name]))
        there = score_rows(logits[None], TRUNCATED[name])[0]
        differ = (here != there).sum()
        assert differ <= (1 if "top_p" in name or name in ("all of it", "together") else 0), "rounding moves one token"
        assert torch.isfinite(here).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_widened_to_the_same_numbers(dtype: torch.dtype) -> None:
    logits = torch.cat([torch.randn(3, 400) * 9, torch.tensor([[0.0, -0.0, float("inf"), float("nan")] * 100])])
    found = torch.from_numpy(widened(logits.to(dtype)))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found.nan_to_num(5.5), logits.to(dtype).to(found.dtype).nan_to_num(5.5))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_scores_of_any_type_come_back_from_a_processor(dtype: torch.dtype, temperature: float) -> None:
    """As do those that are no piece of memory of their own."""
    sampling = SamplingParams(
        temperature=temperature, top_p=0.9, logits_processors=(lambda path, scores: scores.to(dtype).flip(0),)
    )
    logits = torch.arange(61.0) % 17
    scores = process(logits, sampling, [1], 1, frozenset())
    wanted = process(logits.flip(0), replace(sampling, logits_processors=()), [1], 1, frozenset())
    assert torch.equal(scores.double(), wanted.double())
    assert choose(scores, sampling, 3, 4) == choose(wanted, sampling, 3, 4)


def test_leading_scores_and_their_logarithms() -> None:
    scores = np.array([1.0, 3.0, 3.0, -np.inf, 2.0, 3.0], np.float32)
    assert [leading(scores, count).tolist() for count in (0, 1, 2, 4)] == [[], [1], [1, 2], [1, 2, 5, 4]]
    assert leading(scores, 9).tolist() == [1, 2, 5, 4, 0, 3]
    logits = row("usual").bfloat16()
    exact = logits.double().log_softmax(-1)
    said = logprob(logits, 11, 5)
    assert said.logprob == pytest.approx(float(exact[11]), abs=1e-5)
    ordered = exact.sort(descending=True, stable=True)
    assert [token for token, _ in said.top] == ordered.indices[:5].tolist()
    assert [value for _, value in said.top] == pytest.approx(ordered.values[:5].tolist(), abs=1e-5)
    assert chance(widened(logits), 11) == pytest.approx(float(exact[11].exp()), rel=1e-4)


class Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes torch operations that make, or look through, more numbers than torch gives to one thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        touched = args[1:] if str(func) in PICKING else (*args, made)
        most = max((one.numel() for one in touched if isinstance(one, Tensor)), default=0)
        if most > GRAIN and not func.is_view and str(func) not in ALONE:
            self.seen.add(str(func))
        return made


WAYS = {
    "greedy": SamplingParams(max_tokens=24, ignore_eos=True),
    "warm": replace(WARM, max_tokens=24, ignore_eos=True, seed=5),
    "cut": replace(WARM, max_tokens=24, ignore_eos=True, top_k=900, top_p=0.9, min_p=0.001, logprobs=3),
    "penalties": replace(WARM, max_tokens=24, ignore_eos=True, presence_penalty=0.5, repetition_penalty=1.2),
    "processor": replace(WARM, max_tokens=24, ignore_eos=True, logits_processors=(lambda path, scores: scores,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drafter", ["none", "merged", "lookahead"])
def test_a_step_leaves_nothing_to_torchs_threads(drafter: str, way: str) -> None:
    """They wait for each other: milliseconds at every operation where another process has the core."""
    if unavailable():
        pytest.skip(unavailable())
    model = tiny_llama(torch.bfloat16, vocab=VOCAB)
    target = HFTarget(model, slots=2, shapes=NATURAL, fast=True)
    with Wide() as wide:
        run(target, drafter, [[5, 6, 7, 8, 5, 6, 7], [9, 9, 8]], WAYS[way], slots=2)
    assert wide.seen == set()
