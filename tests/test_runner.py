"""The fast runner says what the plain path says: the same text with every drafter, the same bits in any company."""

from __future__ import annotations

import copy
import gc
from typing import Literal

import pytest
import torch
from torch import Tensor, is_tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfdraft.core.rows import Rows, chain_rows, pack
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import build
from selfdraft.errors import RunnerUnavailable
from selfdraft.models.exactness import NATURAL
from selfdraft.models.load import open_target
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.one_layer import run_floats
from selfdraft.models.target import HFTarget
from selfdraft.prove.doctor import trial
from selfdraft.types import SamplingParams, Skip
from tests.clocks import on_passes
from tests.models import VOCAB, random_adapters, run, tiny_llama, unavailable
from tests.test_families import FAMILIES, NEW, generated
from tests.test_families import build as build_family
from tests.test_families import prompts as family_prompts
from tests.test_oracle import prompts, text_of

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fast_target(dtype: torch.dtype, slots: int = 1) -> HFTarget:
    model = tiny_llama(dtype)
    return on_passes(HFTarget(model, slots=slots, adapters=random_adapters(model), fast=True))


@pytest.mark.parametrize("index", range(0, 16, 3))
def test_the_text_is_that_of_the_plain_path(index: int) -> None:
    """float32: rounding is far below the gaps between logits here."""
    for sampling in ("greedy", "temperature", "penalties"):
        assert text_of("fast float32", index, sampling) == text_of("plain float32", index, sampling)


def both(dtype: torch.dtype) -> tuple[HFTarget, HFTarget]:
    return fast_target(dtype), HFTarget(tiny_llama(dtype), adapters=random_adapters(tiny_llama(dtype)))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 3e-6), (torch.bfloat16, 0.05)])
def test_logits_of_trees_masks_and_skips(dtype: torch.dtype, near: float) -> None:
    """Every kind of pass against the plain path, to a few units of the last place."""
    fast, plain = both(dtype)
    sequence = Sequence([3, 1, 4, 1, 5, 9, 2], 7, SamplingParams(), slot=0)
    tree = Draft((5, 6, 7, 8, 9), (-1, -1, 1, 0, 2), ("",) * 5, 5)
    masks = tree.with_probes(list(fast.extras.masks_for("space").ids), [-4, 0, 1, -1], "space")
    short = Draft.chain([5, 6], "").with_probes(list(fast.extras.masks_for("s3d").ids), [-3, 0, 1], "s3d")
    some = Skip(frozenset({1, 2}), frozenset({2}))

    def passes(target: HFTarget) -> list[Tensor]:
        sequence.num_cached, sequence.tokens = 0, sequence.tokens[:7]
        said = [target.forward(pack([(sequence, 7, EMPTY)]))]
        target.keep(0, 0, range(7))
        sequence.num_cached = 6
        for draft, skip in ((tree, None), (masks, None), (short, some), (tree, some), (EMPTY, some)):
            said.append(target.forward(pack([(sequence, 1, draft)]), skip))
        # a drafted chain, resumed behind the blocks that it has computed
        for place, token in ((6, 2), (7, 5)):
            said.append(target.forward(chain_rows([(0, place, token)]), some))
        said.append(target.forward(pack([(sequence, 1, Draft.chain([5, 8], ""))])))
        target.keep(0, 6, [0, 1])
        return said

    for i, (a, b) in enumerate(zip(passes(fast), passes(plain), strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=near), (i, (a - b).abs().max())


def odd_llama(sharp: float = 1.0, heads: int = 3, wide: int = 14) -> PreTrainedModel:
    """No size is a multiple of what a vector holds; `sharp` is what the scores of attention are multiplied by."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=42,
        intermediate_size=71,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=wide,
        max_position_embeddings=128,
        initializer_range=0.5,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight *= sharp
    return model.eval()


def odd_gpt2() -> PreTrainedModel:
    """The same with layer norms, biases and learned positions; they start at random, too."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=30, n_head=3, n_inner=53, n_layer=2, n_positions=128))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


ODD = {
    "llama": odd_llama,
    "sharp": lambda: odd_llama(8.0),
    "wide heads": lambda: odd_llama(heads=6, wide=118),  # 64 + 32 + 16 + 6: every width that values are summed in
    "gpt2": odd_gpt2,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-4), (torch.bfloat16, 0.4)])
def test_odd_sizes_and_sharp_attention(name: str, dtype: torch.dtype, near: float) -> None:
    """Tails of rows everywhere, and scores whose exponentials overflow unless the largest is taken away first."""
    model = ODD[name]().to(dtype)
    sequence = Sequence([(7 * i * i + 3) % VOCAB for i in range(41)], 41, SamplingParams(), slot=0)
    tree = Draft((5, 6, 7, 8, 9), (-1, -1, 1, 0, 2), ("",) * 5, 5)

    def passes(target: HFTarget) -> Tensor:
        sequence.num_cached = 0
        said = [target.forward(pack([(sequence, 40, EMPTY)]))]
        target.keep(0, 0, range(40))
        sequence.num_cached = 40
        return torch.cat([*said, target.forward(pack([(sequence, 1, tree)]))])

    fast, plain = passes(HFTarget(model, fast=True)), passes(HFTarget(copy.deepcopy(model).double()))
    worst = (fast.double() - plain).abs().max()
    assert worst < near * plain.abs().max(), (worst, plain.abs().max())


@pytest.mark.parametrize("dtype", TYPES.values())
@pytest.mark.parametrize(("out", "wide"), [(1, 1), (16, 16), (17, 33), (5, 130), (35, 1101)])
def test_products_of_every_size(out: int, wide: int, dtype: torch.dtype) -> None:
    """A linear layer alone, against float64; a row has the same bits beside any number of others."""
    draw = torch.Generator().manual_seed(out)
    weight, bias, x = (torch.randn(size, generator=draw).to(dtype) for size in ((out, wide), (out,), (70, wide)))

    def said(count: int, first: int = 0, threads: int = 1) -> Tensor:
        return run_floats(x[first : first + count], weight, bias, threads=threads)

    alone = torch.cat([said(1, row) for row in range(len(x))])
    wanted = x.double() @ weight.double().T + bias.double()
    scale = x.double().abs() @ weight.double().abs().T + 1
    assert ((alone - wanted).abs() / scale).max() < (2e-6 if dtype == torch.float32 else 4e-3)
    for count in (*range(2, 18), 64, 65, 70):
        for threads in (1, 2, 3):
            assert torch.equal(said(count, 0, threads), alone[:count]), (count, threads)


@pytest.mark.parametrize("dtype", TYPES.values())
def test_bits_do_not_depend_on_the_company(dtype: torch.dtype) -> None:
    """One row at a time, all rows in one pass, beside other slots, and with two threads."""
    target = fast_target(dtype, slots=3)
    text = prompts()[15]

    def rows(*parts: tuple[int, int, int]) -> Rows:
        made = [
            Sequence(text[:stop], stop, SamplingParams(), slot=slot, num_cached=start) for slot, start, stop in parts
        ]
        return pack([(sequence, len(sequence.tokens) - sequence.num_cached, EMPTY) for sequence in made])

    alone = [target.forward(rows((0, place, place + 1)))[-1] for place in range(len(text))]
    for together in (2, 3, 5, 17, 60):
        for start in range(0, len(text), together):
            stop = min(start + together, len(text))
            beside = [(1, 0, 5)] * (start % 2 == 0)
            said = target.forward(rows((2, start, stop), *beside))[0]
            assert torch.equal(said, alone[stop - 1]), (together, stop)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(target.forward(rows((1, 0, len(text))))[0], alone[-1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 3), (1, 4), (3,), (2, 0, 1)])
@torch.inference_mode()
def test_keep_is_that_of_the_cache(order: tuple[int, ...]) -> None:
    target = fast_target(torch.bfloat16, slots=2)
    target.forward(chain_rows([(0, 0, 1), (1, 0, 2)]))
    for store in (target.cache.keys, target.cache.values):
        for strip in store.values():
            strip.normal_(generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(target.cache)
    target.keep(1, 5, order)
    twin.keep(1, 5, order)
    for layer, strip in twin.keys.items():
        assert torch.equal(target.cache.keys[layer], strip)
        assert torch.equal(target.cache.values[layer], twin.values[layer])


@pytest.mark.parametrize("dtype", TYPES.values())
def test_it_is_promised_and_holds(dtype: torch.dtype) -> None:
    target = open_target(tiny_llama(dtype), slots=1, runner="fast")
    assert (target.exactness.level, target.shapes, target.runs) == ("bitwise", NATURAL, "fast")

    def request() -> Sequence:
        return open_sequence([3, 1, 4, 1, 5], SamplingParams(max_tokens=90), seed=0, eos=frozenset(), context=512)

    found = trial(target, build("none", target), [request], str(dtype), str(target.shapes))
    assert (found.tokens_equal, found.rows_bitwise_equal) == (found.tokens, found.rows) == (90, 90)


DENSE = [name for name, family in FAMILIES.items() if not family.experts]


@pytest.mark.parametrize("name", DENSE)
def test_families(name: str) -> None:
    """The stock modules of every family can be traced, and say what `generate` says; float32."""
    family = FAMILIES[name]
    model = build_family(family.config, family.options, family.model, torch.float32)
    target = on_passes(open_target(model, slots=2, adapters=random_adapters(model), runner="fast"))
    assert target.exactness.level == "bitwise"
    for drafter in ("lookup", "layer_skip", "space"):
        texts = run(target, drafter, family_prompts(), SamplingParams(max_tokens=NEW), slots=2)
        assert [sequence.output for sequence in texts] == generated(name), drafter


class Odd(nn.Linear):
    """A layer with an operation that no tape has."""

    def forward(self, x: Tensor) -> Tensor:
        odd: Tensor = super().forward(x) + torch.special.bessel_j0(x).sum(-1, keepdim=True)
        return odd


def test_what_cannot_be_traced_runs_plainly() -> None:
    model = copy.deepcopy(tiny_llama(torch.float32))
    layer = model.model.layers[1].self_attn.o_proj
    odd = Odd(layer.in_features, layer.out_features, bias=False)
    odd.weight = layer.weight
    model.model.layers[1].self_attn.o_proj = odd
    assert "bessel_j0" in open_target(model, slots=1).runs
    with pytest.raises(RunnerUnavailable, match="bessel_j0"):
        open_target(model, slots=1, runner="fast")
    assert "float64" in open_target(tiny_llama(torch.float64), slots=1).runs


def test_a_machine_without_a_compiler_runs_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_build, "COMPILERS", ("no-such-compiler",))
    kernel_build.library.cache_clear()
    try:
        target = open_target(tiny_llama(torch.float32), slots=1)
        assert target.runs == "plain: there is no C++ compiler (no-such-compiler) on this machine"
    finally:
        kernel_build.library.cache_clear()
    stock = HFTarget(tiny_llama(torch.float32), shapes=target.shapes)
    assert target.runner is None
    plainly, wanted = (run(each, "none", [[3, 1, 4]], SamplingParams(max_tokens=9)) for each in (target, stock))
    assert plainly[0].output == wanted[0].output


@pytest.mark.parametrize("runner", ["fast", "plain"])
def test_the_proof_leaves_no_weights_to_the_collector(runner: Literal["fast", "plain"]) -> None:
    """The command line loads with the collector off and then freezes what is there: that once kept 1 GB for good."""
    model = tiny_llama(torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        open_target(model, slots=1, runner=runner)
        gc.collect()
        left = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in gc.garbage if is_tensor(one)
        }
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert sum(left.values()) < weights / 2  # states of a few tokens
