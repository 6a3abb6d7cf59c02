"""How often a step waits for its device, and sends something there: counted on one that is not there (`far.py`)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from selfdraft.core.sequence import open_sequence
from selfdraft.drafters import NAMES, build
from selfdraft.engine.engine import Engine
from selfdraft.models.adapters import placed
from selfdraft.models.target import HFTarget
from selfdraft.types import Rounded, SamplingParams
from tests.clocks import Machine
from tests.far import FAR, Noted, watching
from tests.models import random_adapters, tiny_llama

GREEDY = SamplingParams(max_tokens=100)
SAMPLED = replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9)
WARM, COUNTED = 3, 3
"""Steps before counting begins (the prompt, first drafts), and steps that are counted."""
OPTIONS: dict[str, dict[str, object]] = {
    "lookahead": {"adaptive": False},
    "merged": {"masks": True},
    "auto": {"masks": True},
    "s3d": {"min_probability": 0.0},
    "space": {"min_probability": 0.0},
}
ALLOWED: dict[str, tuple[tuple[int, int], ...]] = {
    "none": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "lookup": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "suffix": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "context": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "recycling": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "prediction": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "lookahead": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "layer_skip": ((2, 4), (2, 6), (2, 8), (2, 10)),
    "quantised": ((3, 6), (4, 12), (2, 8), (3, 15)),  # a link is one wait as before; a copy that is trusted makes more
    "s3d": ((2, 5), (2, 7), (2, 9), (2, 13)),
    "space": ((1, 3), (1, 5), (1, 6), (1, 10)),
    "merged": ((1, 2), (1, 5), (1, 5), (1, 10)),
    "auto": ((1, 3), (1, 5), (1, 6), (1, 10)),
    "cascade": ((2, 2), (3, 3), (4, 4), (7, 5)),
}
"""Most host waits and uploads of a step: greedy and sampled with one request, greedy and sampled with three.

These may only fall. A figure that has fallen is written here, so that it stays there.
"""


@cache
def short_llama() -> LlamaForCausalLM:
    """Two blocks: how often a step waits depends on no number of blocks."""
    config = copy.deepcopy(tiny_llama(torch.float32).config)
    config.num_hidden_layers = 2
    return LlamaForCausalLM(config).eval()


def far_target(slots: int) -> HFTarget:
    """A target on the device that is not there, with adapters, whose passes have prices of their own."""
    stock = short_llama()
    target = Machine(0.01, 0.0001).run(
        HFTarget(copy.deepcopy(stock).to(FAR), slots=slots, adapters=random_adapters(stock))
    )
    for bits in (4, 8):  # rounding weights is work of the host; a pass over them asks no more than one over these
        target._views[Rounded(bits)] = target._view
    return target


def noted_steps(drafter: str, sampling: SamplingParams, count: int) -> list[Noted]:
    """What each counted step of `count` requests asked of the device."""
    target = far_target(count)
    engine = Engine(target, build(drafter, target, OPTIONS.get(drafter, {})), slots=count)
    for i in range(count):
        prompt = [1 + i, 2, 3, 4, 5, 1 + i, 2, 3]
        engine.submit(open_sequence(prompt, sampling, seed=i, eos=frozenset(), context=target.max_length))
    for _ in range(WARM):
        with watching(Noted()):
            engine.advance()
    found = []
    for _ in range(COUNTED):
        found.append(Noted())
        with watching(found[-1]):
            assert engine.advance()
    return found


def most(steps: list[Noted]) -> tuple[int, int]:
    """Waits and uploads of the steps with most of them."""
    return max(one.waits.total() for one in steps), max(one.uploads.total() for one in steps)


@pytest.mark.parametrize("drafter", NAMES)
def test_no_step_waits_or_sends_more_often_than_before(drafter: str) -> None:
    found = []
    for count in (1, 3):
        for sampling in (GREEDY, SAMPLED):
            steps = noted_steps(drafter, sampling, count)
            found.append(most(steps))
            mixed = sum((one.mixes for one in steps), start=steps[0].mixes)
            assert not mixed, f"{drafter}: operations that a GPU refuses: {mixed}"
    lines = "; ".join(f"{line} {times}" for line, times in steps[-1].waits.most_common(8))
    assert tuple(found) == ALLOWED[drafter], f"{drafter}: {tuple(found)}; the last step waited at {lines}"


def test_plain_decoding_asks_for_nothing_but_the_answers() -> None:
    (noted, *_) = noted_steps("none", GREEDY, 1)
    assert [*noted.waits] == [line for line in noted.waits if line.startswith("core/told.py:")]


def test_gate_rows_that_do_not_lie_together_are_numbers_of_the_device() -> None:
    rows = placed({0: [2, 3, 4], 1: [0, 5]}, torch.device(FAR))
    assert rows[0] == slice(2, 5)
    assert isinstance(rows[1], Tensor)
    assert rows[1].device.type == FAR


def test_the_watcher_can_tell() -> None:
    far, near, noted = torch.zeros(4, device=FAR), torch.zeros(4), Noted()
    with watching(noted):
        for ask in (
            Tensor.tolist,
            Tensor.cpu,
            lambda x: x[0].item(),
            lambda x: bool(x.sum() > 1),
            lambda x: x.to("cpu"),
        ):
            ask(far)
        for ask in (lambda x: int(x.argmax()), lambda x: x[x.argmax()], lambda x: (x > 0).nonzero(), Tensor.numpy):
            ask(far)
        assert torch.equal(far, far)
        assert noted.counts()[:3] == (10, 0, 0)
        near.to(FAR)
        far.copy_(near)
        far[[0, 1]] += far[torch.tensor([0, 1])] + torch.tensor([1.0, 2.0], device=FAR)
        assert noted.counts()[:3] == (10, 6, 0)
        far.index_add_(0, torch.tensor([0, 1]), torch.zeros(2, device=FAR))
        assert near.tolist() == (near + near).tolist()
    assert noted.counts()[:3] == (10, 6, 1)
