"""Rounded copies: kept for the next start with the bits of the first one, and made unasked where they pay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from selfdraft import LLM
from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import build, copy_bits
from selfdraft.drafters.auto import Auto
from selfdraft.drafting.cost_model import Profile
from selfdraft.models import rounded
from selfdraft.models.checkpoint.gguf_blocks import load_blocks
from selfdraft.models.facts import Facts
from selfdraft.models.pocket import POCKET
from selfdraft.models.rounded import MOST_UNASKED, PART, why_no_copy
from selfdraft.models.target import HFTarget
from selfdraft.types import Rounded, SamplingParams, middle
from tests import gguf_files
from tests.models import tiny_target
from tests.test_second_start import (
    GREEDY,
    PROMPT,
    cache,
    compiled,
    cut,
    elsewhere,
    emptied,
    flipped,
    folder,
    from_kept,
    opened,
    other,
    same_bits,
    text_of,
    touched,
)

__all__ = ["cache", "folder"]
pytestmark = pytest.mark.skipif(not compiled(), reason="there is no C++ compiler on this machine")
SLOW = Profile((1, 64), (0.1, 6.4), (0.0, 0.0))
"""A machine on which whole passes take long, and each row as long as the first."""
QUICK = Profile((1, 64), (0.001, 0.002), (0.0, 0.0))


def drafted(target: HFTarget, bits: int) -> list[Tensor]:
    """Logits of the copy: of the next token behind a prompt, and of a tree."""
    tokens = [(11 * i + 5) % target.vocab for i in range(20)]
    sequence = Sequence(tokens, len(tokens), SamplingParams(max_tokens=4), slot=1)
    target.forward(pack([(sequence, 19, EMPTY)]))
    sequence.num_cached = 19
    tree = Draft.branches([[5, 6, 7], [5, 8], [9]], "test")
    return [target.forward(pack([(sequence, 1, each)]), Rounded(bits)).clone() for each in (EMPTY, tree)]


def with_copy(model: str | Path, bits: int = 4, **options: object) -> LLM:
    return opened(model, drafter="quantised", speculative_config={"method": "quantised", "bits": bits}, **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_kept_copy_has_the_same_bits_and_needs_no_stock_model(cache: Path, bits: int) -> None:
    first = with_copy(POCKET, bits)
    assert not from_kept(first)
    again = with_copy(POCKET, bits)
    assert same_bits(drafted(first.target, bits), drafted(again.target, bits))
    assert text_of(again) == text_of(opened(POCKET, cache=False))
    assert from_kept(again)
    one, other_one = first.target.copies[bits], again.target.copies[bits]
    assert (one.bytes, one.layers, one.kept) == (other_one.bytes, other_one.layers, other_one.kept)


def test_every_number_of_bits_has_a_copy_of_its_own(cache: Path) -> None:
    with_copy(POCKET, 4)
    assert not from_kept(with_copy(POCKET, 8))
    assert from_kept(with_copy(POCKET, 4))
    assert from_kept(with_copy(POCKET, 8))


def test_options_share_the_copy(cache: Path) -> None:
    with_copy(POCKET)
    opened(POCKET, max_model_len=64)
    assert from_kept(with_copy(POCKET, max_model_len=64))
    assert len([*(cache.parent / "copies").iterdir()]) == 2


def test_copies_of_checkpoints_that_are_gone_are_removed(cache: Path, folder: Path) -> None:
    with_copy(folder)
    with_copy(folder, 8)
    moved = folder.rename(folder.with_name("moved"))
    with_copy(POCKET)
    assert len([*(cache.parent / "copies").iterdir()]) == 2
    with_copy(moved)
    assert len([*(cache.parent / "copies").iterdir()]) == 4, "pocket's copy stays"
    assert from_kept(with_copy(POCKET))


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


ODD: dict[str, tuple[str, Callable[[Path], None]]] = {
    "blocks cut": ("blocks", cut),
    "blocks flipped": ("blocks", flipped),
    "blocks emptied": ("blocks", emptied),
    "blocks gone": ("blocks", Path.unlink),
    "tape flipped": ("tape", flipped),
    "tape gone": ("tape", Path.unlink),
    "version": ("tape", other("identity", lambda identity: {**identity, "torch": "0.1"})),  # type: ignore[dict-item]
    "sizes": ("tape", other("sizes", lambda sizes: sizes[:-1])),  # type: ignore[index]
    "copy": ("tape", other("copy", lambda _: {})),
    "weights elsewhere": ("tape", elsewhere),
}


@pytest.mark.parametrize("oddity", ODD)
def test_what_is_odd_is_passed_over_and_written_anew(cache: Path, oddity: str) -> None:
    right = drafted(with_copy(POCKET).target, 4)
    kind, change = ODD[oddity]
    (file,) = (cache.parent / "copies").glob(f"*.{kind}")
    change(file)
    llm = with_copy(POCKET)
    assert not from_kept(llm)
    assert same_bits(right, drafted(llm.target, 4))
    assert from_kept(with_copy(POCKET))


def test_a_checkpoint_that_changed_has_a_new_copy(cache: Path, folder: Path) -> None:
    before = drafted(with_copy(folder).target, 4)
    touched(folder / "model.safetensors")
    opened(folder)
    llm = with_copy(folder)
    assert not from_kept(llm)
    assert not same_bits(before, drafted(llm.target, 4))


def test_a_cache_that_cannot_be_written_is_none(cache: Path) -> None:
    (cache.parent / "copies").write_text("a file where the folder would be")
    assert text_of(with_copy(POCKET)) == text_of(with_copy(POCKET))


# unasked


def made(target: HFTarget, **options: object) -> Auto:
    drafter = build("auto", target, options)
    assert isinstance(drafter, Auto)
    return drafter


@pytest.fixture
def target() -> HFTarget:
    """A model of float weights on the fast runner, and a machine on which a copy pays."""
    found = opened(POCKET, cache=False).target
    found.profile = SLOW
    return found


def test_a_copy_is_made_unasked_where_it_pays(target: HFTarget) -> None:
    assert copy_bits(made(target)) == 4
    assert 4 in target.copies


@pytest.mark.parametrize("options", [{"bits": False}, {"masks": True}, {"s3d": True}, {"skip_set": middle(4, 1)}])
def test_it_is_not_where_something_else_was_asked_for(target: HFTarget, options: dict[str, object]) -> None:
    assert copy_bits(made(target, **options)) is None
    assert not target.copies


@pytest.mark.parametrize("profile", [None, QUICK])
def test_nor_where_passes_take_no_time_or_were_not_measured(target: HFTarget, profile: Profile | None) -> None:
    target.profile = profile
    assert copy_bits(made(target)) is None


def test_nor_where_memory_is_short(target: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "available", lambda: round(rounded.BYTES * PART * target.facts.rounded_weights) - 4)
    assert "are free" in target.extras.why_no_copy()
    assert copy_bits(made(target)) is None
    monkeypatch.setattr(rounded, "available", lambda: None)
    assert copy_bits(made(target)) == 4


def test_nor_on_the_plain_path() -> None:
    plain = tiny_target()
    plain.profile = SLOW
    assert "plain path" in plain.extras.why_no_copy()
    assert copy_bits(made(plain)) is None


def test_a_large_model_is_asked_for() -> None:
    assert why_no_copy(MOST_UNASKED) == "" or "free" in why_no_copy(MOST_UNASKED)
    assert why_no_copy(MOST_UNASKED + 1) == "making it takes long for 1.3 billion weights"


def test_weights_of_few_bits_are_not_rounded_unasked(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file, GGMLQuantizationType.Q4_0)
    facts = Facts.of(load_blocks(file, torch.float32))
    assert facts.rounded_weights == 0
    assert "few bits" in why_no_copy(facts.rounded_weights)


def test_the_text_is_plain_with_a_copy_that_nobody_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first start and at the second one, which needs no stock model for it."""
    monkeypatch.setattr("selfdraft.llm.profile_of", lambda *_, **__: SLOW)
    plain = text_of(opened(POCKET, cache=False))
    for start in range(2):
        llm = opened(POCKET, drafter="auto")
        (answer,) = llm.generate(PROMPT, GREEDY)
        assert answer.outputs[0].text == plain
        assert 4 in llm.target.copies
        assert from_kept(llm) == bool(start)
