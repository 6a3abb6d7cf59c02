"""On an NVIDIA GPU: graphs are captured and replayed, Triton's kernels say what their specification says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from selfdraft.drafters import NAMES, build
from selfdraft.models.attention import Scores
from selfdraft.models.graph.plain_tree_attention import Reach, attend_plainly
from selfdraft.models.graph.sheet import Part, Sheet, SheetSize
from selfdraft.models.load import open_target
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.clocks import on_passes
from tests.glue_kernels import SEEN, compared, programs
from tests.models import random_adapters, run
from tests.terminal import typed
from tests.test_families import FAMILIES, NEW, prompts
from tests.test_families import build as build_model
from tests.test_oracle import EOS, MIXED, OPTIONS, Way, decode
from tests.tree_kernels import CASES, lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


def model_of(name: str) -> PreTrainedModel:
    family = FAMILIES[name]
    return build_model(family.config, family.options, family.model, torch.float32).cuda()


def opened(name: str, slots: int, runner: str = "fast", level: str = "bitwise") -> HFTarget:
    model = model_of(name)
    adapters = random_adapters(model.cpu())
    target = open_target(
        model.cuda(),
        slots=slots,
        adapters=adapters,
        runner="fast" if runner == "fast" else "plain",
        exactness="bitwise" if level == "bitwise" else "token",
    )
    return on_passes(target)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_say_what_the_specification_says(case: str) -> None:
    from selfdraft.models.graph.tree_attention import attend_fused

    heads, key_heads, width, deep, how = CASES[case]
    which, device = lines(600), torch.device("cuda")
    draw = torch.Generator(device).manual_seed(2)
    keys, values = (torch.randn(3, key_heads, 1024, size, generator=draw, device=device) for size in (width, deep))
    query = torch.randn(12, heads, width, generator=draw, device=device)
    tile = max(1, 16 // (heads // key_heads))
    sheet = Sheet(SheetSize(12, 12, tile), device)
    sheet.fill(which, Part(0, len(which), 3), (), trash=1023)
    sinks = None if how.sinks is None else how.sinks.to(device)
    how = Scores(how.scale, how.window, how.cap, sinks)
    exact = Scores(how.scale, how.window, how.cap, None if sinks is None else sinks.double())
    said = attend_fused(query, keys, values, sheet.parts, Reach(1024, 256, tile), how)[: len(which)]
    wanted = attend_plainly(query.double(), keys.double(), values.double(), sheet.parts, Reach(1024, 256, tile), exact)[
        : len(which)
    ]
    torch.testing.assert_close(said.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SEEN)
def test_the_kernels_of_glue_say_what_their_specification_says(name: str, dtype: torch.dtype) -> None:
    """And a row says the same alone."""
    for program in programs(model_of(name).to(dtype)):
        found = compared(program, "cuda")
        assert found["alone"] == 1
        assert found["fused"] <= 2 * found["plain"] + 4 * torch.finfo(dtype).eps, found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_through_graphs(name: str) -> None:
    """Plain and drafted text are one text, and the passes are graphs."""
    target = opened(name, 2)
    assert target.runs.startswith("fast: graphs"), target.runs
    sampling = SamplingParams(max_tokens=NEW)
    plain = [sequence.output for sequence in run(target, "none", prompts(), sampling, slots=2)]
    for drafter in ("lookup", "space", "s3d"):
        drafted = [sequence.output for sequence in run(target, drafter, prompts(), sampling, slots=2)]
        assert drafted == plain or target.exactness.level == "token"


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_drafter_through_graphs(name: str, slots: int) -> None:
    target = opened("llama", slots)
    plain = [one.output for one in decode(target, build("none", target), MIXED, Way(slots=slots))]
    drafted = [one.output for one in decode(target, build(name, target, OPTIONS.get(name)), MIXED, Way(slots=slots))]
    assert drafted == plain
    assert len(EOS) == 1


def test_a_replayed_pass_waits_for_nothing() -> None:
    target = opened("llama", 1)
    decode(target, build("none", target), MIXED[4:6], Way())
    assert target.graphs is not None
    graph = next(graph for graph in target.graphs._graphs.values() if graph.replay is not None)
    assert graph.replay is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_given_back_with_the_target() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    target = opened("llama", 1)
    decode(target, build("none", target), MIXED[4:6], Way())
    assert target.graphs is not None
    target.graphs.close()
    del target
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 2**24


def test_an_adapter_is_trained_and_used_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With own texts, in half precision as the checkpoint is."""
    for name in ("peft", "accelerate"):
        pytest.importorskip(name)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    stories = ("Once upon a time", "The little dog", "Lily and Ben", "One day a bird")
    data.write_text("".join(json.dumps({"prompt": f"{story} was"}) + "\n" for story in stories), "utf-8")
    sizes = {"steps": 4, "every": 2, "max-length": 48, "groups": 3, "batch-size": 2, "distill-tokens": 12}
    words = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    there = ["--model", "pocket", "--device", "cuda"]
    done = typed(monkeypatch, capsys, "train", "--distill", *there, "--data", data, *words, "--output", out)
    assert done.code == 0, done.err
    more = ("--drafter", "space", "--adapter", out)
    said = [
        typed(monkeypatch, capsys, "generate", stories[0], *there, "--max-new-tokens", 16, *way) for way in ((), more)
    ]
    assert [one.code for one in said] == [0, 0]
    assert said[0].out.startswith(said[1].out[:8])
