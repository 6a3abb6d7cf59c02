"""Keys and values as codes of 8 bits: drafted and plain decoding read the same codes, fast and plain."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfdraft import LLM, SamplingParams
from selfdraft.cli.doctor import bytes_per_token
from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import NAMES
from selfdraft.errors import OptionError, UnsupportedModel
from selfdraft.models.exactness import Shapes
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.kv_codes import decode, encode, row_bytes
from selfdraft.models.load import open_target
from selfdraft.models.proof import whole_model
from selfdraft.models.proof.kept import ProofStore, identity_of
from selfdraft.models.runner.runner import Runner
from selfdraft.models.target import HFTarget
from selfdraft.types import Skip
from tests.clocks import on_passes
from tests.models import random_adapters, run, tiny_llama, unavailable
from tests.test_oracle import prompts

fast_only = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
PATHS = [False, pytest.param(True, marks=fast_only)]


def target_of(fast: bool, dtype: torch.dtype = torch.float32, slots: int = 1) -> HFTarget:
    model = tiny_llama(dtype)
    shapes = Shapes(1, 0, 1) if fast else Shapes(4, 64)
    made = HFTarget(
        model, slots=slots, adapters=random_adapters(model), fast=fast, kv_cache_dtype="int8", shapes=shapes
    )
    return on_passes(made)


@pytest.mark.parametrize("wide", [1, 4, 7, 64])
def test_a_code_is_the_nearest(wide: int) -> None:
    rows = torch.randn(3, 50, wide, generator=torch.Generator().manual_seed(wide)) * 10
    stored = encode(rows)
    assert stored.shape == (3, 50, row_bytes(wide))
    most = rows.abs().amax(-1, keepdim=True)
    again = decode(stored, wide, torch.float64)
    assert ((again - rows).abs() <= most / 254 * 1.00001).all()
    assert torch.equal(stored[..., :wide].abs().amax(-1), torch.full((3, 50), 127, dtype=torch.int8))
    assert torch.equal(encode(again.float())[..., :wide], stored[..., :wide])


def test_a_row_is_coded_by_itself_and_a_broken_one_stays_broken() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0] * 4, [1e-38] * 4, [3e38, 1.0, 0.0, 0.0]])
    assert torch.equal(encode(rows), torch.cat([encode(row[None]) for row in rows]))
    assert torch.equal(decode(encode(rows), 4, torch.float32)[1:3], torch.zeros(2, 4))
    assert decode(encode(rows), 4, torch.float32)[3, 0] == pytest.approx(3e38)
    for broken in (float("nan"), float("inf")):
        assert decode(encode(torch.tensor([[1.0, broken, 2.0]])), 3, torch.float32).isnan().all()
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert encode(ties)[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_moving_and_copying_take_scales_along() -> None:
    cache, heads, wide = KVCache(2, 8, "int8"), 2, 6
    rows = torch.randn(heads, 7, wide, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 7)[:, None]
    cache.write(0, 0, 0, rows, rows + 1)
    known = [part.clone() for part in cache.view(0, 0, 7)]
    cache.keep(0, 2, [1, 3, 4])
    for part, before in zip(cache.view(0, 0, 5), known, strict=True):
        assert torch.equal(part[0], before[0][:, [0, 1, 3, 5, 6]])
    cache.reserve(40)
    cache.copy(1, 0, 5)
    for part, before in zip(cache.view(0, 1, 5), known, strict=True):
        assert torch.equal(part[0], before[0][:, [0, 1, 3, 5, 6]])
    lanes = torch.tensor([[0, 2], [4, 1]])
    for part, whole in zip(cache.gather(0, 1, lanes), cache.view(0, 1, 5), strict=True):
        assert torch.equal(part, whole[0][:, lanes].transpose(0, 1))


@fast_only
@pytest.mark.parametrize("order", [(0, 2, 3), (1, 4), (3,), (2, 0, 1)])
@torch.inference_mode()
def test_keep_of_the_fast_runner_is_that_of_the_cache(order: tuple[int, ...]) -> None:
    target = target_of(fast=True, slots=2)
    sequence = Sequence(prompts()[12][:20], 20, SamplingParams(), slot=1)
    target.forward(pack([(sequence, 20, EMPTY)]))
    twin = copy.deepcopy(target.cache)
    target.keep(1, 5, order)
    twin.keep(1, 5, order)
    for layer, strip in twin.keys.items():
        assert torch.equal(target.cache.keys[layer], strip)
        assert torch.equal(target.cache.values[layer], twin.values[layer])


@fast_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_runner_writes_the_codes_of_the_plain_path(dtype: torch.dtype) -> None:
    """Of the first layer, whose keys and values differ by rounding alone: nearly all codes, never by more than one."""
    caches = []
    for fast in (True, False):
        target = target_of(fast, dtype)
        sequence = Sequence(prompts()[15], 60, SamplingParams(), slot=0)
        target.forward(pack([(sequence, 60, EMPTY)]))
        caches.append([store[0][0, :, :60, :8].int() for store in (target.cache.keys, target.cache.values)])
    for mine, theirs in zip(*caches, strict=True):
        apart = (mine - theirs).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < (0.001 if dtype == torch.float32 else 0.1)


@fast_only
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 0.002), (torch.bfloat16, 0.06)])
def test_logits_are_those_of_the_plain_path(dtype: torch.dtype, near: float) -> None:
    """Trees, masks and skips: to rounding, and to a code that rounding makes the next one."""
    text = prompts()[15][:53]
    sequence = Sequence(list(text), 53, SamplingParams(), slot=0)
    tree = Draft((5, 6, 7, 8, 9), (-1, -1, 1, 0, 2), ("",) * 5, 5)
    some = Skip(frozenset({1, 2}), frozenset({2}))

    def passes(target: HFTarget) -> list[Tensor]:
        sequence.num_cached, sequence.tokens = 0, list(text)
        masks = tree.with_probes(list(target.extras.masks_for("space").ids), [-4, 0, 1, -1], "space")
        said = [target.forward(pack([(sequence, 53, EMPTY)]))]
        sequence.num_cached = 52
        for draft, skip in ((tree, None), (masks, None), (tree, some), (EMPTY, some)):
            said.append(target.forward(pack([(sequence, 1, draft)]), skip))
        target.keep(0, 52, [0, 2, 3])
        sequence.num_cached, sequence.tokens = 55, [*text, 6, 7, 8]
        return [*said, target.forward(pack([(sequence, 1, tree)]))]

    for i, (a, b) in enumerate(zip(passes(target_of(True, dtype)), passes(target_of(False, dtype)), strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=near), (i, (a - b).abs().max())


@pytest.mark.parametrize("fast", PATHS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_every_drafter_says_what_plain_decoding_says(name: str, fast: bool) -> None:
    asked, sampling = [prompts()[i] for i in (4, 9, 15)], SamplingParams(max_tokens=24)
    wanted = [sequence.output for sequence in run(target_of(fast), "none", asked, sampling)]
    said = run(target_of(fast, slots=3), name, asked, sampling, slots=3, chunk=7)
    assert [sequence.output for sequence in said] == wanted


@pytest.mark.parametrize("runner", ["plain", pytest.param("fast", marks=fast_only)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_proved_and_promised(runner: str, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    target = open_target(model, slots=1, runner="fast" if runner == "fast" else "plain", kv_cache_dtype="int8")
    assert target.cache.dtype == "int8"
    assert target.runs.startswith(runner)
    if runner == "fast":
        assert target.exactness.level == "bitwise"
    report = whole_model.prove(target, model)
    assert report.codes is not None
    assert report.codes < 0.5


@fast_only
@pytest.mark.parametrize("fault", ["scale", "codes"])
def test_codes_that_are_read_wrongly_are_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read codes as if something else lay in the cache; the first parts of the proof cannot see that."""
    real = Runner.run

    def broken(self: Runner, *args: object, **kwargs: object) -> object:
        said = real(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.cache.dtype == "int8":
            for strip in self.cache.values.values():
                if fault == "codes":
                    strip[..., :8] = strip[..., :8].flip(-1)
                else:
                    strip[..., -4:] = torch.full((1,), 0.5).view(torch.int8)
        return said

    monkeypatch.setattr(Runner, "run", broken)
    with pytest.raises(UnsupportedModel, match="codes of 8 bits"):
        open_target(tiny_llama(torch.float32), slots=1, runner="fast", exactness="token", kv_cache_dtype="int8")


def test_a_proof_of_one_is_none_of_the_other(tmp_path: Path) -> None:
    model, proofs = tiny_llama(torch.float32), ProofStore(tmp_path)
    open_target(model, slots=1, kv_cache_dtype="int8", proofs=proofs)
    open_target(model, slots=1, kv_cache_dtype="auto", proofs=proofs)
    assert len([*tmp_path.iterdir()]) == 2
    options = {"exactness": "bitwise", "runner": "auto", "context": None, "kv_cache_dtype": "int8"}
    assert proofs.read(identity_of(model, [], options)) is not None


def test_an_unknown_way_is_named() -> None:
    for wrong in ("int4", "", "INT8"):
        with pytest.raises(OptionError, match=f"kv_cache_dtype='{wrong}' is unknown; there are 'auto' and 'int8'"):
            open_target(tiny_llama(), slots=1, kv_cache_dtype=wrong)  # type: ignore[arg-type]


@torch.inference_mode()
def test_memory_is_less_than_half_and_reported() -> None:
    caches = {"auto": KVCache(3, 40), "int8": KVCache(3, 40, "int8")}
    for cache in caches.values():
        cache.open(0, 3, 64, 64, torch.empty(0))
    assert bytes_per_token(caches["auto"]) == 2 * 3 * 64 * 4
    assert bytes_per_token(caches["int8"]) == 2 * 3 * (64 + 4)
    assert caches["int8"].bytes == 3 * 40 * 2 * 3 * 68


def test_a_second_start_reads_the_same_codes() -> None:
    """Through the kept start where there is one; and `LLM` hands the option on."""
    said = []
    for _ in range(2):
        llm = LLM("pocket", drafter="merged", kv_cache_dtype="int8")
        assert llm.target.cache.dtype == "int8"
        said.append(llm.generate("Once upon a time", SamplingParams(max_tokens=16))[0].outputs[0].token_ids)
    assert said[0] == said[1]
    plain = LLM("pocket", drafter="none", kv_cache_dtype="int8")
    assert plain.generate("Once upon a time", SamplingParams(max_tokens=16))[0].outputs[0].token_ids == said[0]
