"""Where a model runs: names of devices, GPUs that are not there or too small, and models that cannot be decoded."""

from __future__ import annotations

import copy
import re
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from selfdraft import LLM
from selfdraft.errors import LoadError, OptionError, RunnerUnavailable, UnsupportedModel
from selfdraft.models import device as devices
from selfdraft.models import load
from selfdraft.models.device import (
    BEHIND,
    GIB,
    Room,
    check_placement,
    dtype_on,
    file_bytes,
    gpu_facts,
    moved,
    pick_device,
)
from selfdraft.models.graph.cuda import cuda_settings
from selfdraft.models.kv_cache import KVCache, KVCacheDtype
from selfdraft.models.load import open_target
from selfdraft.models.proof.whole_model import Report
from selfdraft.models.runner.runner import Runner
from selfdraft.models.start import opening
from selfdraft.protocols import DraftExtras
from selfdraft.types import SamplingParams, check_device
from tests.models import run, tiny_llama, tiny_target

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Card:
    """A GPU that is not there, as torch would tell of it."""

    capability: tuple[int, int] = (9, 0)
    free: int = 80 * GIB


def cards(patch: pytest.MonkeyPatch, *there: Card) -> None:
    """Torch with CUDA, and these GPUs in the machine."""
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "is_available", lambda: bool(there))
    patch.setattr(torch.cuda, "device_count", lambda: len(there))
    patch.setattr(torch.cuda, "get_device_capability", lambda device: there[device.index].capability)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (there[device.index].free, 80 * GIB))
    patch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")


@pytest.mark.parametrize("name", ["", "gpu", "mps", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1", "CUDA", "cuda:99999"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(OptionError, match=r"device .* is unknown; there are auto, cpu, cuda and cuda:NUMBER") as raised:
        check_device(name)
    assert "\n" not in str(raised.value)


def test_without_a_cuda_build_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match=r"device='cuda': this torch \(.*\) was built without CUDA; install"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == CPU


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch)
    with pytest.raises(OptionError, match=r"torch finds no GPU here; see what nvidia-smi says"):
        pick_device("cuda:0")
    cards(monkeypatch, Card())
    with pytest.raises(OptionError, match=r"device='cuda:1': there is only cuda:0"):
        pick_device("cuda:1")
    cards(monkeypatch, Card(), Card())
    with pytest.raises(OptionError, match=r"device='cuda:2': there are cuda:0 to cuda:1"):
        pick_device("cuda:2")
    assert pick_device("cuda:1").index == 1
    assert pick_device("cuda").index == 0


def test_auto_takes_the_first_gpu_that_can_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, Card((7, 5)), Card(free=8 * GIB), Card())
    assert pick_device("auto", 2 * GIB).index == 1
    assert pick_device("auto", 8 * GIB).index == 2
    assert pick_device("auto", 90 * GIB) == CPU


def test_dtype_follows_the_device_that_the_model_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whether a GPU exists: a CPU beside one has no bfloat16 units because of it."""
    cards(monkeypatch, Card(), Card((7, 5)))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert dtype_on("auto", CPU, "plain") == torch.float32
    assert dtype_on("auto", torch.device("cuda", 0)) is None
    assert dtype_on("auto", torch.device("cuda", 1)) == torch.float16
    assert dtype_on("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(OptionError, match=r"Card 1 \(compute capability 7.5\) has no bfloat16 units.*'float16'"):
        dtype_on("bfloat16", torch.device("cuda", 1))


def test_weights_that_do_not_fit_are_refused_before_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, Card(free=1000))
    with pytest.raises(LoadError, match=r"cuda:0 has 0.0 GiB free, and the weights take .* use device 'cpu'"):
        moved(tiny_llama(), torch.device("cuda", 0))
    assert moved(tiny_llama(), CPU) is tiny_llama()


def test_memory_that_ends_while_a_model_is_proved_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMany more lines")

    monkeypatch.setattr(load, "open_target", full)
    with pytest.raises(LoadError, match=r"cpu has too little memory to load this model .* or use device 'cpu'") as seen:
        LLM(tiny_llama(torch.float32), drafter="none")
    assert "\n" not in str(seen.value)
    cards(monkeypatch, Card())
    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(LoadError, match=r"cuda:0 has too little memory"):
        moved(tiny_llama(), torch.device("cuda", 0))


def test_room_is_arithmetic() -> None:
    room = Room(free=int(64 * GIB), token_bytes=128 * 1024, slots=16, context=131072)
    assert room.places == (int(0.92 * 64 * GIB) - GIB) // (16 * 128 * 1024) - BEHIND == 29378
    assert room.take(None) == room.places
    assert room.take(8192) == 8192
    assert replace(room, context=4096).take(None) == 4096
    with pytest.raises(OptionError, match=r"16 requests of 32768 tokens: 64.0 GiB .* 0.125 MiB .* so 29378 tokens fit"):
        room.take(32768)
    with pytest.raises(OptionError, match=r"so 0 tokens fit; lower max_num_seqs"):
        replace(room, free=GIB).take(None)


def test_what_a_token_takes_is_what_the_cache_takes() -> None:
    target = tiny_target(torch.float32, slots=3)
    assert target.token_bytes() == 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    target.hold(500, BEHIND)
    assert target.max_length == 500
    assert target.cache.places == 512 + BEHIND  # canonical shapes go to the end of a piece
    assert {keys.shape[2] for keys in target.cache.keys.values()} == {768}
    assert target.cache.bytes == target.token_bytes() * 3 * 768


def test_a_long_text_with_drafts_does_not_make_the_cache_grow() -> None:
    target = tiny_target(torch.float32)
    target.hold(80, BEHIND)
    before = target.cache.places
    (sequence,) = run(target, "merged", [[1, 2, 3] * 10], SamplingParams(max_tokens=200))
    assert len(sequence.tokens) == 80
    assert target.cache.places == before


def test_room_is_taken_when_a_target_is_opened_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tiny_target(torch.float32, slots=2)
    cards(monkeypatch, Card(free=int((GIB + 2 * 400 * target.token_bytes()) / 0.92)))
    monkeypatch.setattr(target, "facts", replace(target.facts, device=torch.device("cuda", 0)))
    opening._take_room(target, None)
    assert target.max_length in (143, 144)
    assert "has room for 2 requests of 14" in caplog.text
    with pytest.raises(OptionError, match="no memory for 2 requests of 300 tokens"):
        opening._take_room(target, 300)


def broken(name: str) -> LlamaForCausalLM:
    model = copy.deepcopy(tiny_llama(torch.float32))
    block = model.model.layers[1]
    if name == "meta":
        block.mlp.to("meta")
    elif name == "hooks":
        block._hf_hook, block.forward = object(), types.MethodType(type(block).forward, block)
    elif name == "forward":
        block.mlp.forward = types.MethodType(type(block.mlp).forward, block.mlp)
    return model


REASONS = {
    "meta": r"has weights that are not in memory \(on 'meta', or moved to disk by device_map\); load it whole",
    "hooks": r"accelerate's hooks \(device_map\) run modules .*remove_hook_from_module",
    "forward": r"the forward of module 'model.layers.1.mlp' was replaced \(use_kernels, or a patch\)",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_model_that_would_not_run_as_it_is_is_refused_with_the_true_reason(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=REASONS[name]) as raised:
        open_target(broken(name), slots=1)
    assert "\n" not in str(raised.value)


def test_a_model_on_two_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_llama(torch.float32))
    here = [types.SimpleNamespace(device=torch.device("cuda", index), data=0) for index in (0, 1)]
    monkeypatch.setattr(type(model), "parameters", lambda self: iter(here))
    monkeypatch.setattr(type(model), "buffers", lambda self: iter(()))
    with pytest.raises(UnsupportedModel, match=r"lies on 2 devices \(cuda:0, cuda:1\), and has to lie on one"):
        check_placement(model)


def test_a_model_split_over_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_llama(torch.float32))
    split = type("DTensor", (), {"device": torch.device("cuda", 0), "data": 0})()
    monkeypatch.setattr(type(model), "parameters", lambda self: iter([split]))
    with pytest.raises(UnsupportedModel, match=r"is split over several processes \(tp_plan\)"):
        check_placement(model)


def test_a_leaf_with_its_own_forward_is_left_alone() -> None:
    model = copy.deepcopy(tiny_llama(torch.float32))
    norm = model.model.norm
    norm.forward = types.MethodType(type(norm).forward, norm)
    check_placement(model)


def test_a_loaded_model_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, Card())
    model = tiny_llama(torch.float32)
    with pytest.raises(OptionError, match=r"device='cuda': the model is loaded already, on cpu; move it"):
        LLM(model, device="cuda", drafter="none")
    assert LLM(model, drafter="none", runner="plain").target.facts.device == CPU


def test_weights_in_blocks_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfdraft.llm import where_of

    cards(monkeypatch, Card())
    assert where_of("pocket", "auto", "int8") == CPU
    assert where_of("pocket", "auto", "none").type == "cuda"
    with pytest.raises(OptionError, match=r"quantization='int8' has kernels for CPUs alone: leave it out on cuda:0"):
        LLM("pocket", device="cuda", quantization="int8", cache=False)


@pytest.mark.parametrize("place", ["mps", "cuda:0", "xpu"])
def test_elsewhere_than_on_a_cpu_passes_take_the_plain_path(place: str) -> None:
    with pytest.raises(RunnerUnavailable, match=f"the fast runner is made for CPUs; the model is on {place}"):
        Runner(torch.float32, torch.device(place), KVCache(1, 256), 0)


NO_GRAPHS = {
    "codes of 8 bits": "graphs store keys and values as they are; leave out kv_cache_dtype to have them",
    "quantised": "graphs have no quantised weights",
    "float64": "attention on a GPU computes in float32 at most; take another dtype than float64",
    "Triton": r"graphs need Triton \(.*\): pip install 'selfdraft\[gpu\]'",
    "no GPU": "graphs are replayed by an NVIDIA GPU; the model is on cpu",
}


@pytest.mark.parametrize("why", NO_GRAPHS)
def test_where_there_are_no_graphs_the_plain_path_says_why(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: `auto` runs plainly and names the reason, `fast` makes an error of it."""
    model = copy.deepcopy(tiny_llama(torch.float32))
    dtype = torch.float64 if why == "float64" else torch.float32
    place = CPU if why == "no GPU" else torch.device("cuda", 0)
    monkeypatch.setattr(load, "_open_fast", load._open_graphs)  # what is taken on a GPU
    monkeypatch.setattr(load, "cuda_settings", lambda *_: cuda_settings(place, dtype))
    monkeypatch.setattr(load, "is_quantised", lambda _: why == "quantised")
    if why == "Triton":
        monkeypatch.setitem(sys.modules, "selfdraft.models.graph.tree_attention", None)
    stored: KVCacheDtype = "int8" if why == "codes of 8 bits" else "auto"
    target = open_target(model, slots=1, kv_cache_dtype=stored)
    assert re.fullmatch(f"plain: {NO_GRAPHS[why]}", target.runs)
    with pytest.raises(RunnerUnavailable, match=NO_GRAPHS[why]):
        open_target(model, slots=1, kv_cache_dtype=stored, runner="fast")


@pytest.mark.parametrize("drafter", ["quantised", "cascade", "auto with bits"])
def test_drafters_that_round_weights_say_that_they_cannot(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfdraft.drafters import build

    target = tiny_target(torch.float32)
    extras = DraftExtras(unrounded="these have kernels for CPUs alone, while the model is on cuda:0")
    monkeypatch.setattr(type(target), "extras", property(lambda self: extras))
    with pytest.raises(RunnerUnavailable, match=rf"{drafter} drafts with rounded weights, .* use another drafter"):
        build(drafter.split()[0], target, {"bits": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "_device", torch.device("cuda", 0))
        assert "CPUs alone" in target._unrounded


def test_conditions_name_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, Card())
    told = gpu_facts(torch.device("cuda", 0))
    assert (told["gpu"], told["compute_capability"], told["cuda"], told["tf32"]) == ("Card 0", "9.0", "13.0", False)
    assert not gpu_facts(CPU)


def test_a_refusal_under_tf32_says_so() -> None:
    for coarse in (True, False):
        with pytest.raises(UnsupportedModel) as raised:
            Report("Some", coarse=coarse).compare("its own dtype", 1.0, 0.1, lambda: 0.0)
        assert ("torch.set_float32_matmul_precision" in str(raised.value)) == coarse


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    (tmp_path / "b.bin").write_bytes(b"12")
    assert file_bytes(tmp_path) == 4
    assert file_bytes(tmp_path / "none") == 0
    assert devices.chunk_on(CPU) == 256
    assert devices.chunk_on(torch.device("cuda", 0)) == 2048
